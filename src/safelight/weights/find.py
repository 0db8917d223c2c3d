"""Find a model's files by the name that a user gives: built in, a path, or a hub id."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from safelight.errors import SafelightError
from safelight.weights.check import printable
from safelight.weights.hub import (
    CONTROLNET,
    IMAGE_ENCODER,
    MODEL,
    VAE,
    Layout,
    from_hub,
    parts_for,
)
from safelight.weights.hub_names import HubName, hub_name
from safelight.weights.library import VARIABLE, Library, is_tokenizer_folder, open_library
from safelight.weights.matching import close_name

BUILT_IN = ("embedded", "embedded-fast", "embedded-unconditional")
MODELS = Path(__file__).parent.parent / "models"
PREVIEWS = "preview_vae"
"""The subfolder with a model's own tiny autoencoder for previews; diffusers ignores it."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where a model's files are: a single file, or a folder in diffusers' layout.

    name: what it is called, as text that can be written anywhere. path: may hold any bytes.
    """

    name: str
    path: Path

    def __post_init__(self) -> None:
        # A name that is not UTF-8 comes as lone surrogates, which no recipe and no log can hold.
        object.__setattr__(self, "name", self.name.encode(errors="replace").decode())


Given = str | Path
"""What a user gives for a model or a part: a path, a name in the models folder, or a hub id."""


def find(
    name: str | Path | Source, *, download: bool = True, models_dir: str | Path | None = None
) -> Source:
    """Find a model by name.

    name: a built-in model ("embedded"), the path of a folder or of a single file, a name in the
      models folder, or a name of the hub: a repository ("org/name", "org/name@revision"), a file
      in it ("org/name/file.gguf"), or the address of either. What is on the hub is taken from the
      cache if it is complete there, and downloaded if not, unless HF_HUB_OFFLINE is set. A Source
      was found already, and is returned as it is.
    download: False takes a hub model from the cache alone.
    models_dir: the models folder, in place of that of SAFELIGHT_MODELS.

    Raises SafelightError, one line that says what is missing and how to get it.
    """
    if isinstance(name, Source):
        return name
    if str(name) in BUILT_IN:
        if not (MODELS / name).is_dir():
            raise SafelightError(
                f"the built-in model {name!r} is not part of this installation", code="no_model"
            )
        return Source(str(name), MODELS / name)
    return _find(str(name), "model", open_library(models_dir), download, MODEL)


def find_vae(
    name: str | Path, *, download: bool = True, models_dir: str | Path | None = None
) -> Source:
    """Find an autoencoder: a path, a name in the models folder, or a hub id. See `find`."""
    return _find(str(name), "vae", open_library(models_dir), download, VAE)


@dataclass(frozen=True, slots=True)
class PartsFinder:
    """Finds what lends a single file what it lacks.

    names: of model folders, text encoders, autoencoders and tokenizers, in the order in which they
    are asked. Each is looked for when it is known what is lacking, because nothing else is
    downloaded. download, models_dir: see `find`.
    """

    names: tuple[str, ...] = ()
    download: bool = True
    models_dir: str | Path | None = None

    def __bool__(self) -> bool:
        return bool(self.names)

    def find(self, number: int, file: Source, lacking: Collection[str]) -> Source:
        """Return where one of `names` is. file: the single file. lacking: what it lacks still.

        Raises SafelightError if it is not there.
        """
        name, library = self.names[number], self.library
        found = on_disk(name)
        if found is not None and (not found.path.is_dir() or _holds_parts(found.path)):
            return found
        if library is not None and (entry := library.part(name)) is not None:
            return Source(entry.name, entry.path)
        layout = parts_for(file.path, lacking, self.names[:number])
        return _find(name, "model", library, self.download, layout)

    @property
    def library(self) -> Library | None:
        """The models folder, None if there is none."""
        return open_library(self.models_dir)


def parts_finder(
    given: Given | Sequence[Given] | None,
    *,
    download: bool = True,
    models_dir: str | Path | None = None,
) -> PartsFinder:
    """Return what finds the parts that a single file lacks. See `find`.

    given: one thing or several; None for none, where the models folder may have a tokenizer still.
    """
    if given is None:
        given = ()
    names = (given,) if isinstance(given, str | Path) else given
    return PartsFinder(tuple(map(str, names)), download, models_dir)


def find_controlnet(
    name: str | Path, *, download: bool = True, models_dir: str | Path | None = None
) -> Source:
    """Find a ControlNet: a path, a name in the models folder, or a hub id. See `find`."""
    return _find(str(name), "controlnet", open_library(models_dir), download, CONTROLNET)


def find_ip_adapter(
    name: str | Path, *, download: bool = True, models_dir: str | Path | None = None
) -> Source:
    """Find the file of an IP-Adapter: a path, a name in the models folder, or a file on the hub.

    Of the last kind are "org/name/folder/file.safetensors" and "org/name@revision/file.bin", as a
    repository holds many adapters. See `find`.

    Raises SafelightError, one line that says what is missing and how to get it.
    """
    name, library = str(name), open_library(models_dir)
    here = on_disk(name) is not None or (library and library.matches(name, "ip_adapter"))
    hub = hub_name(name)
    if not here and hub is not None and hub.file is None:
        raise SafelightError(
            f"{printable(name, 60)} may be a repository of many IP-Adapters: give the place of a "
            "file in it, as in h94/IP-Adapter/models/ip-adapter_sd15.safetensors",
            code="no_model",
        )
    return _find(name, "ip_adapter", library, download, MODEL)


def find_image_encoder(
    name: str | Path, *, download: bool = True, models_dir: str | Path | None = None
) -> Source:
    """Find an image encoder: a path, a name in the models folder, or a hub id. See `find`."""
    return _find(str(name), "image_encoder", open_library(models_dir), download, IMAGE_ENCODER)


def find_upscaler(
    name: str | Path, *, models_dir: str | Path | None = None, takes_paths: bool = True
) -> Source:
    """Find an upscaler: the path of a file, a name in the models folder, or A1111's name of one.

    takes_paths: False takes names alone, as a server does.

    Raises SafelightError, one line that says what is missing and how to get it.
    """
    from safelight.upscaling.names import ALIASES

    library, given = open_library(models_dir), str(name)
    found = on_disk(given) if takes_paths else None
    if found is not None and found.path.is_file():
        return found
    if library is None:
        here = "no such file here, and " if takes_paths else ""
        raise SafelightError(
            f"no upscaler {printable(repr(given), 60)}: {here}{VARIABLE} is not set",
            code="no_model",
        )
    if given in ALIASES and not library.matches(given, "upscaler"):
        given = ALIASES[given]
    entry = library.find(given, "upscaler")
    return Source(entry.name, entry.path)


def find_previews(source: Source) -> Source | None:
    """Return the tiny autoencoder for previews that lies in a model's folder, if one does."""
    path = source.path / PREVIEWS
    return Source(f"{source.name}/{PREVIEWS}", path) if path.is_dir() else None


def _find(name: str, kind: str, library: Library | None, download: bool, layout: Layout) -> Source:
    found = on_disk(name)
    # A folder without a config is no model, and must not hide a model of the same name.
    if found is not None and (not found.path.is_dir() or _has_config(found.path)):
        return found
    if library is not None and library.matches(name, kind):
        entry = library.find(name, kind)
        return Source(entry.name, entry.path)
    if found is not None:
        return found  # the error of loading it says what is missing
    hub = hub_name(name)
    if hub is None or looks_local(hub):
        raise _not_found(name, kind, library)
    return Source(str(hub), from_hub(hub, download=download, layout=layout))


def _not_found(name: str, kind: str, library: Library | None) -> SafelightError:
    """Return the error for a name that nothing has, with the closest name that something has."""
    told = f"no {kind.replace('_', ' ')} {printable(repr(name), 40)}"
    known = [*BUILT_IN] if kind == "model" else []
    if library is not None:
        known += [entry.name for entry in library.entries(kind)]
    if (near := close_name(name, known)) is not None:
        why = f"no such file or folder, nor such a name; did you mean {printable(repr(near), 60)}?"
    else:
        built_in = f"not built in ({', '.join(BUILT_IN)}), " if kind == "model" else ""
        folder = f"{VARIABLE} not set" if library is None else "not in the models folder"
        why = f'{built_in}no file or folder here, {folder}, no hub id ("org/name")'
    return SafelightError(f"{told}: {why}", code="no_model")


def hub_file(name: str, kind: str, library: Library | None) -> HubName | None:
    """Return the file on the hub that a name means; None for other names.

    kind: "lora" or "embedding". A name that the models folder has means the file there.
    """
    if library is not None and library.matches(name, kind):
        return None
    hub = hub_name(name)
    return hub if hub is not None and hub.file is not None else None


def file_on_hub(hub: HubName, kind: str) -> Path:
    """Return the path of a file on the hub, downloaded if it is not in the cache.

    kind: "lora" or "embedding", for errors. Raises SafelightError if it cannot be had.
    """
    if looks_local(hub):
        raise SafelightError(
            f"no {kind} {printable(str(hub), 80)}: no file here", code="no_model", field=f"{kind}s"
        )
    return from_hub(hub)


def looks_local(hub: HubName) -> bool:
    """Return whether the name of a file on the hub is rather a path with a mistake.

    It is if its first folder is here: nothing is downloaded for a mistyped path.
    """
    return hub.file is not None and Path(hub.repo.split("/")[0]).is_dir()


def _has_config(folder: Path) -> bool:
    """Return whether a folder is that of a model, or of one network."""
    return any((folder / name).is_file() for name in ("model_index.json", "config.json"))


def _holds_parts(folder: Path) -> bool:
    """Return whether a folder is that of a model, or of a tokenizer."""
    return (folder / "model_index.json").is_file() or is_tokenizer_folder(folder)


def is_cached(hub: HubName, kind: str) -> bool:
    """Return whether a model, a part of one or one network is in the hub's cache."""
    networks = {"vae": VAE, "controlnet": CONTROLNET, "image_encoder": IMAGE_ENCODER}
    layout = networks.get(kind, MODEL)
    try:
        from_hub(hub, download=False, layout=layout)
    except SafelightError:
        return False
    return True


def on_disk(name: str) -> Source | None:
    """Return what lies at a path, None if nothing does."""
    try:
        path = Path(name).expanduser()
        if name and path.exists():
            # A file of the hub's cache is a link to a blob, whose name is a digest.
            return Source(path.stem if path.is_file() else path.resolve().name, path)
    except (OSError, RuntimeError, ValueError):
        pass  # too long, a NUL in it, no home: not a path
    return None
