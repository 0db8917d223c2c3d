"""The user's models folder: models, LoRAs, embeddings and other networks, by name.

All are found by name. The folder may be laid out as A1111 or ComfyUI have it, or be a flat one. A
name is looked up in a list of what is there. It is never made into a path, so that no name leads
out of the folder.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from safelight.errors import SafelightError
from safelight.paths import expanded
from safelight.weights.cache import keep, recall, stamp_of
from safelight.weights.check import printable
from safelight.weights.digest import digest_file, known_digest, old_digest, tensors_digest
from safelight.weights.headers import header_of
from safelight.weights.kinds import holds_embedding, kind_of
from safelight.weights.matching import close_name, last_part, stem

VARIABLE = "SAFELIGHT_MODELS"
"""The environment variable that names the folder."""

SUBFOLDERS = {
    "model": ("stable-diffusion", "checkpoints", "diffusers", "diffusion_models", "unet"),
    "lora": ("lora", "loras", "lycoris"),
    "embedding": ("embeddings",),
    "vae": ("vae", "vae-approx", "vae_approx"),
    "text_encoder": ("text_encoders", "text_encoder", "clip"),
    "controlnet": ("controlnet", "t2i_adapter"),
    "ip_adapter": ("ipadapter", "ip-adapter", "ip_adapter"),
    "image_encoder": ("clip_vision",),
    "upscaler": (
        *("upscalers", "upscale_models", "esrgan", "realesrgan", "swinir", "dat", "hat"),
        "scunet",
    ),
}
"""The kinds of file, and the folders that A1111 and ComfyUI keep each in.

They lie in the folder itself or in its `models`, and are compared without regard to case. A1111
keeps IP-Adapters among the ControlNets.
"""

_INSIDE = {"controlnet": ("ip_adapter", "image_encoder"), "ip_adapter": ("image_encoder",)}
"""What else lies in the folders of a kind; see `_kind_in`."""

PARTS = ("text_encoder", "vae")
"""The kinds of files that lend a model's file what it lacks."""

_COMFYUI = ("comfy/text_encoders/t5_tokenizer", "comfy/text_encoders/qwen25_tokenizer")
_FORGE = ("backend/huggingface/*/tokenizer*", "backend/huggingface/*/*/tokenizer*")
_ABOVE = 2
"""How far above the models folder an installation may be: ComfyUI/models/…"""

GGUF = ".gguf"
"""The ending of models and text encoders in few bits. Nothing else is read from such files."""

ENDINGS = (".safetensors", ".sft", ".ckpt", ".pt", ".pth", ".bin", GGUF)
PICTURE = ".png"
"""The ending of a picture, which may hold an embedding."""

IN_FOLDER = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
"""The files of LoRAs that PEFT and diffusers write, each into a folder of its own."""

MAX_DEPTH = 8
MAX_FILES = 100_000
_FACTS = "facts-8"
"""The name of what `facts_of` remembers. Raise the number when `kind_of` changes its answers."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A file, or a folder in diffusers' layout, of the library.

    kind: a key of SUBFOLDERS. name: its path below the folder of its kind, without the ending, as
    in "anime/eyes".
    """

    kind: str
    name: str
    path: Path

    @property
    def file_name(self) -> str:
        """Its name with its ending."""
        return self.name + (self.path.suffix if self.path.is_file() else "")


class Library:
    """A models folder. It is read again at each call, so that new files are found.

    Raises SafelightError if the folder is not there.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = expanded(root)
        if not self.root.is_dir():
            raise SafelightError(
                f"there is no models folder {printable(str(root)[-100:], 100)!r}", code="no_model"
            )

    def entries(self, kind: str | None = None) -> list[Entry]:
        """Return what is there, of one kind or of all, in the order of kinds and names."""
        found, _ = self._scan(kind)
        return sorted(
            (entry for entry in found if kind in (None, entry.kind)),
            key=lambda entry: ([*SUBFOLDERS].index(entry.kind), entry.name.casefold(), entry.path),
        )

    def find(self, name: str, kind: str) -> Entry:
        """Return the entry of a name.

        name: as `Entry.name`, or its last part, with or without the ending; its whole path
          below the models folder; of a LoRA also what its training called it (`ss_output_name`).
          If nothing has the name, case is ignored.

        Raises SafelightError with the code "no_model" if there is none, or more than one.
        """
        found = self.matches(name, kind)
        if len(found) == 1:
            return found[0]
        shown, named = printable(repr(name), 60), kind.replace("_", " ")
        field = {"lora": "loras", "embedding": "embeddings"}.get(kind)
        if found:
            both = " and ".join(printable(self._inside(entry), 60) for entry in found[:2])
            raise SafelightError(
                f"{named} {shown} could be {both}: give more of its path, or its ending",
                code="no_model",
                field=field,
            )
        why = f"no {named} {shown} in the models folder"
        links = [p for p in self._scan()[1] if p.name.casefold() == Path(name).name.casefold()]
        if links:
            why = f"{named} {shown} is a link to a folder, which is not followed; link its files"
        elif near := close_name(name, [entry.name for entry in self.entries(kind)]):
            why += f"; did you mean {printable(repr(near), 60)}?"
        elif there := [printable(e.name, 40) for e in self.entries(kind)[:4]]:
            why += f"; there are {', '.join(there[:3])}{' …' if len(there) > 3 else ''}"
        raise SafelightError(why, code="no_model", field=field)

    def matches(self, name: str, kind: str) -> list[Entry]:
        """Return the entries that a name may mean, by the most exact reading that finds any."""
        entries = self.entries(kind)
        folded = name.casefold()
        readings: tuple[Callable[[Entry], bool], ...] = (
            lambda entry: name in (entry.name, entry.file_name, self._inside(entry)),
            lambda entry: name in (last_part(entry.name), last_part(entry.file_name)),
            lambda entry: folded in (entry.name.casefold(), entry.file_name.casefold()),
            lambda entry: (
                folded in (last_part(entry.name).casefold(), last_part(entry.file_name).casefold())
            ),
            lambda entry: kind == "lora" and name == facts_of(entry.path).get("alias"),
        )
        for reading in readings:
            found = [entry for entry in entries if reading(entry)]
            if found:
                return found
        return []

    def part(self, name: str) -> Entry | None:
        """Return what a name means for the parts of a model, None if nothing has it.

        A model's folder comes first, then a text encoder, an autoencoder, an installed tokenizer,
        any other model, and an image encoder, which may be a whole CLIP. Raises SafelightError if
        several of a kind have the name.
        """
        if any(entry.path.is_dir() for entry in self.matches(name, "model")):
            return self.find(name, "model")
        for kind in PARTS:
            if self.matches(name, kind):
                return self.find(name, kind)
        installed = (entry for entry in self.tokenizers() if entry.name == name)
        if (found := next(installed, None)) is not None:
            return found
        last = next((kind for kind in ("model", "image_encoder") if self.matches(name, kind)), None)
        return None if last is None else self.find(name, last)

    def tokenizers(self) -> list[Entry]:
        """Return the tokenizers that an installation of ComfyUI or Forge around the folder has.

        Their kind is "tokenizer".
        """
        found: list[Entry] = []
        # The folder may be a link to another disk, and the installation around either.
        around = [
            base
            for here in (self.root.absolute(), self.root.resolve())
            for base in (here, *here.parents[:_ABOVE])
        ]
        for base in dict.fromkeys(around):
            places = [base / place for place in _COMFYUI]
            for pattern in _FORGE:
                try:
                    places += sorted(base.glob(pattern))
                except OSError:  # a folder that cannot be read
                    continue
            for path in filter(is_tokenizer_folder, places):
                inside = path.name.startswith("tokenizer")
                name = f"{path.parent.name}/{path.name}" if inside else path.name
                found.append(Entry("tokenizer", name, path))
        return found

    def by_hash(self, digest: str, kind: str) -> Entry | None:
        """Return the entry that has a hash, None if there is none.

        digest: in hex. The SHA-256 of the whole file, or its first 10 digits or more, as A1111
          names models; 12 digits of what A1111 or kohya's scripts name a LoRA by; 8 digits of
          A1111's old hash. Remembered hashes are compared before files are hashed.
        """
        digest = digest.lower()
        if not digest or set(digest) - set("0123456789abcdef") or len(digest) < 8:
            return None
        files = [entry for entry in self.entries(kind) if entry.path.is_file()]
        wanted = (_old_hash,) if len(digest) == 8 else (_remembered_hash, _whole_hash, _lora_hashes)
        for hashes in wanted:
            for entry in files:
                try:
                    if any(found.startswith(digest) for found in hashes(entry)):
                        return entry
                except (OSError, SafelightError):
                    continue  # not readable, or damaged: not what was asked for
        return None

    def _inside(self, entry: Entry) -> str:
        return entry.path.relative_to(self.root).as_posix()

    def _scan(self, only: str | None = None) -> tuple[list[Entry], list[Path]]:
        """Return all entries, and the links to folders, which are not followed.

        only: a kind; the folders of others are left out, which may hold thousands of files.
        """
        found: list[Entry] = []
        links: list[Path] = []
        homes = {name: kind for kind, names in SUBFOLDERS.items() for name in names}
        for base in (self.root, self.root / "models"):
            for path in _members(base):
                kind = homes.get(path.name.casefold())
                if kind is not None and path.is_dir():
                    if only not in (None, kind, *_INSIDE.get(kind, ())):
                        continue
                    if path.is_symlink():
                        links.append(path)
                    else:
                        found += _walk(path, kind, links)
                elif base is self.root and (is_model_folder(path) or _is_file(path)):
                    # A file in the root is what its content says.
                    kind = "model" if path.is_dir() else facts_of(path).get("kind")
                    if kind is not None:
                        found.append(Entry(kind, stem(path), path))
                elif path.is_symlink() and path.is_dir():
                    links.append(path)
            if len(found) > MAX_FILES:
                raise SafelightError(f"more than {MAX_FILES} files in the models folder")
        return found, links


def open_library(folder: str | Path | None = None) -> Library | None:
    """Return the library in a folder, or in that of SAFELIGHT_MODELS; None if neither is given.

    Raises SafelightError if the folder is not there.
    """
    given = folder if folder is not None else os.environ.get(VARIABLE) or None
    return None if given is None else Library(given)


def is_model_folder(path: Path) -> bool:
    """Return whether a path is a folder in diffusers' layout, and no link to one."""
    return not path.is_symlink() and (path / "model_index.json").is_file()


def is_tokenizer_folder(path: Path) -> bool:
    """Return whether a path is a folder that holds a tokenizer and no model."""
    if (path / "model_index.json").is_file():
        return False
    return any((path / name).is_file() for name in ("tokenizer.json", "vocab.json"))


def facts_of(path: Path) -> dict[str, str]:
    """Return what a file says about itself: its "kind", and the "alias" of a LoRA.

    It is empty if the file cannot be read. It is remembered, because a header takes milliseconds
    to read, and a folder may hold thousands.
    """
    try:
        real = path.resolve()
        stamp = stamp_of(real)
        facts = recall(_FACTS, real, stamp)
        if not isinstance(facts, dict):
            if path.suffix.lower() == PICTURE:
                told = {"kind": "embedding" if holds_embedding(real) else None}
            else:
                header = header_of(real)
                alias = header.metadata.get("ss_output_name")
                kind = kind_of(header.tensors)
                if header.format == "gguf" and kind != "text_encoder":
                    kind = "model"
                told = {"kind": kind, "alias": alias}
            facts = {key: value for key, value in told.items() if value is not None}
            keep(_FACTS, real, stamp, facts)
    except (OSError, SafelightError):
        return {}
    return facts


def _members(folder: Path) -> list[Path]:
    """Return the members of a folder that are not hidden, in the order of their names."""
    try:
        return sorted(p for p in folder.iterdir() if not p.name.startswith("."))
    except OSError:
        return []


def _walk(home: Path, kind: str, links: list[Path]) -> Iterator[Entry]:
    """Yield the entries below the folder of a kind; add links to folders to `links`."""
    waiting = [(home, 0)]
    while waiting:
        folder, depth = waiting.pop()
        for path in _members(folder):
            whole = (kind == "model" and is_model_folder(path)) or (
                kind in ("vae", "controlnet", "ip_adapter", "image_encoder")
                and not path.is_symlink()
                and (path / "config.json").is_file()
            )
            if kind == "lora" and folder != home and path.name in IN_FOLDER and path.is_file():
                yield Entry(kind, folder.relative_to(home).as_posix(), path)
            elif whole or _is_file(path, kind) or (kind == "embedding" and _is_picture(path)):
                name = (path.relative_to(home).parent / stem(path)).as_posix()
                yield Entry(_kind_in(kind, path), name, path)
            elif path.is_dir() and path.is_symlink():
                links.append(path)
            elif path.is_dir() and depth < MAX_DEPTH:
                waiting.append((path, depth + 1))


def _kind_in(kind: str, path: Path) -> str:
    """Return the kind of what lies in the folder of a kind: IP-Adapters lie in two of them.

    Their image encoders may lie beside them, as they are published.
    """
    if kind not in ("controlnet", "ip_adapter"):
        return kind
    if path.is_dir():
        return "image_encoder" if kind == "ip_adapter" else kind
    told = facts_of(path).get("kind")
    return told if told in ("ip_adapter", "image_encoder") else kind


def _is_file(path: Path, kind: str = "model") -> bool:
    """Return whether it is a weight file, or a link to one: people link their large files.

    kind: what the folder is for.
    """
    ending = path.suffix.lower()
    few = kind in ("model", "text_encoder")
    return ending in ENDINGS and (few or ending != GGUF) and path.is_file()


def _is_picture(path: Path) -> bool:
    """Return whether it is a PNG that holds an embedding, and no preview of one."""
    is_png = path.suffix.lower() == PICTURE and path.is_file()
    return is_png and facts_of(path).get("kind") == "embedding"


def _remembered_hash(entry: Entry) -> tuple[str, ...]:
    return (known_digest(entry.path) or "",)


def _whole_hash(entry: Entry) -> tuple[str, ...]:
    return (digest_file(entry.path).sha256,)


def _lora_hashes(entry: Entry) -> tuple[str, ...]:
    if entry.kind != "lora":
        return ()
    header = header_of(entry.path)
    if header.format != "safetensors":
        return ()
    return header.metadata.get("sshs_model_hash", "").lower(), tensors_digest(entry.path)


def _old_hash(entry: Entry) -> tuple[str, ...]:
    return (old_digest(entry.path),)
