"""Find a model's files by the name that a user gives: built in, a path, or a hub id."""

from __future__ import annotations

import re
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
    file_in_cache,
    from_hub,
    parts_for,
)
from safelight.weights.library import (
    ENDINGS,
    VARIABLE,
    Library,
    is_tokenizer_folder,
    open_library,
)

BUILT_IN = ("embedded", "embedded-fast", "embedded-unconditional")
MODELS = Path(__file__).parent.parent / "models"
PREVIEWS = "preview_vae"
"""The subfolder with a model's own tiny autoencoder for previews; diffusers ignores it."""
HUB_ID = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@(\w[\w.-]*))?")
"""A hub id: "org/name", or "org/name@revision" with a branch, a tag or a commit."""
IN_REPOSITORY = re.compile(rf"{HUB_ID.pattern}/(\w[\w./-]*\.(?:safetensors|bin|pth))")
"""A file of a repository: a hub id, and the file's place in it."""


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
      models folder, or a hub id ("org/name", "org/name@revision"). A hub model is taken from the
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


def find_ip_adapter(name: str | Path, *, models_dir: str | Path | None = None) -> Source:
    """Find the file of an IP-Adapter: a path, a name in the models folder, or one in a repository.

    name: of the last kind are "org/name/folder/file.safetensors" and "org/name@revision/file.bin".
      They are taken from the hub's cache alone, as a repository holds many adapters.

    Raises SafelightError, one line that says what is missing and how to get it.
    """
    name, library = str(name), open_library(models_dir)
    here = on_disk(name) is not None or (library and library.matches(name, "ip_adapter"))
    if not here and (inside := IN_REPOSITORY.fullmatch(name)) and ".." not in name:
        path = file_in_cache(*inside.groups())
        return Source(path.stem, path)
    if not here and HUB_ID.fullmatch(name):
        raise SafelightError(
            f"{printable(name, 60)} may be a repository of many IP-Adapters: give the place of a "
            "file in it, as in h94/IP-Adapter/models/ip-adapter_sd15.safetensors",
            code="no_model",
        )
    return _find(name, "ip_adapter", library, False, MODEL)


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
    hub_id = HUB_ID.fullmatch(name)
    # "models/sd15.safetensors" is a file that is not there, not a repository.
    if hub_id is None or name.endswith(ENDINGS) or ".." in name:
        named = kind.replace("_", " ")
        built_in = f"not built in ({', '.join(BUILT_IN)}), " if kind == "model" else ""
        folder = f"{VARIABLE} not set" if library is None else "not in the models folder"
        raise SafelightError(
            f"no {named} {printable(repr(name), 40)}: {built_in}no file or folder here, "
            f'{folder}, no hub id ("org/name")',
            code="no_model",
        )
    return Source(name, from_hub(hub_id[1], hub_id[2], download=download, layout=layout))


def _has_config(folder: Path) -> bool:
    """Return whether a folder is that of a model, or of one network."""
    return any((folder / name).is_file() for name in ("model_index.json", "config.json"))


def _holds_parts(folder: Path) -> bool:
    """Return whether a folder is that of a model, or of a tokenizer."""
    return (folder / "model_index.json").is_file() or is_tokenizer_folder(folder)


def is_cached(hub_id: re.Match[str], kind: str) -> bool:
    """Return whether a model, a part of one or one network is in the hub's cache.

    hub_id: a match of HUB_ID.
    """
    networks = {"vae": VAE, "controlnet": CONTROLNET, "image_encoder": IMAGE_ENCODER}
    layout = networks.get(kind, MODEL)
    try:
        from_hub(*hub_id.groups(), download=False, layout=layout)
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
