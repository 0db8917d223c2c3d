"""Textual inversions: vectors that stand for words which a model was never taught.

arXiv:2208.01618. A file comes from a stranger, in one of these layouts:

- diffusers: {token: vectors}
- A1111: {"string_to_param": {"*": vectors}, "name": …}
- {"emb_params": vectors}
- for SDXL, {"clip_l": vectors, "clip_g": vectors}, or text_encoders_0 and text_encoders_1
- a list of {token: vectors}
- `bundle_emb.<name>.…` in the file of a LoRA
- a PNG whose text `sd-ti-embedding` is A1111's layout as JSON in base64

All but the last are safetensors or a pickle, which runs no code: see `safelight.weights.headers`.
PyTorch is imported when the vectors are read.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from safelight.errors import SafelightError
from safelight.picture import opened, reason
from safelight.weights.check import Header, printable, refusal
from safelight.weights.headers import plain_header_of
from safelight.weights.kinds import PNG_TEXT

if TYPE_CHECKING:
    from torch import Tensor

MAX_FILE = 64 * 2**20
"""Bytes. 75 vectors for SDXL take 600 KB; what is larger is something else."""

MAX_VECTORS = 512
MAX_WIDTH = 2**16
PNG = b"\x89PNG\r\n\x1a\n"
BUNDLE = "bundle_emb."

Place = Literal["clip_l", "clip_g", ""]
"""Which text encoder vectors are for; empty where a file does not say."""

_PLACES: tuple[Place, ...] = ("clip_l", "clip_g")
_NAMES = {"text_encoders_0": "clip_l", "text_encoders_1": "clip_g"}
_FLOATS = ("F16", "BF16", "F32", "F64")
_NAMELESS = ("*", "emb_params")
_LISTED = re.compile(r"\d+\.")
_FITS = {(768,): "Stable Diffusion 1", (1024,): "Stable Diffusion 2", (768, 1280): "SDXL"}


@dataclass(frozen=True, slots=True)
class Vectors:
    """Vectors for one text encoder: how many, of how many numbers, and the tensors they are in."""

    place: Place
    count: int
    width: int
    keys: tuple[str, ...] = ()


@dataclass(frozen=True)
class EmbeddingFile:
    """A textual inversion in a file.

    name: the file's name without its ending, as A1111 and ComfyUI call it. token: what the file
    itself calls it, None if it does not. header: of the file. numbers: the vectors, if the file is
    a picture.
    """

    name: str
    token: str | None
    vectors: tuple[Vectors, ...]
    path: Path
    header: Header | None = None
    numbers: tuple[tuple[float, ...], ...] = ()

    @property
    def widths(self) -> tuple[int, ...]:
        """The widths of the vectors for all text encoders, in ascending order."""
        return tuple(sorted(one.width for one in self.vectors))

    @property
    def is_bundled(self) -> bool:
        """Whether it lies inside the file of a LoRA."""
        return any(key.startswith(BUNDLE) for one in self.vectors for key in one.keys)

    @property
    def count(self) -> int:
        """How many tokens it takes in a prompt."""
        return max(one.count for one in self.vectors)

    def fitting(self, widths: Mapping[str, int]) -> dict[str, Vectors]:
        """Return the vectors of each text encoder of a model, by the encoders' names.

        widths: of the vectors that each encoder reads. Raises SafelightError unless some fit each.
        """
        found: dict[str, Vectors] = {}
        if not widths:
            raise _refusal(self.name, "this model reads no embeddings")
        # Only SDXL's refiner reads one half of an embedding for two; elsewhere half would be lost.
        whole = len(self.vectors) <= len(widths) or any(name.endswith("_2") for name in widths)
        for encoder, width in widths.items():
            place = "clip_g" if encoder.endswith("_2") else "clip_l"
            fit = [one for one in self.vectors if one.width == width]
            exact = [one for one in fit if one.place == place] or [v for v in fit if v.place == ""]
            # With one encoder there is no doubt about which is meant.
            exact = exact or [one for one in fit if len(widths) == 1]
            if not exact or not whole:
                mine, theirs = self.widths, tuple(sorted(widths.values()))
                raise _refusal(
                    self.name,
                    f"vectors of {_listed(mine)} numbers{_family(mine)}; "
                    f"this model reads {_listed(theirs)}{_family(theirs)}",
                )
            found[encoder] = exact[0]
        if len({one.count for one in found.values()}) > 1:
            counts = " and ".join(f"{one.count}" for one in found.values())
            raise _refusal(self.name, f"{counts} vectors for two text encoders; as many are needed")
        return found

    def read(self, vectors: Vectors) -> Tensor:
        """Return some of its vectors, float32 [count, width].

        Raises SafelightError if they cannot be read, or are not finite.
        """
        import torch

        from safelight.weights.tensors import open_tensors

        if self.header is None:
            found = torch.tensor(self.numbers, dtype=torch.float32)
        else:
            with _about_embeddings(), open_tensors(self.header) as tensor:
                rows = [tensor(key).to(torch.float32) for key in vectors.keys]
                found = torch.cat([each.reshape(-1, vectors.width) for each in rows])
        if not bool(found.isfinite().all()):
            raise _refusal(self.path.name, "its vectors hold NaN or Inf")
        return found


def look_at(path: Path, name: str | None = None) -> EmbeddingFile:
    """Return what a file holds, without reading its vectors.

    name: what it is called by, if not by the file. Raises SafelightError, one line, if it is no
    embedding, or a damaged or hostile one.
    """
    try:
        if not path.is_file():
            raise _refusal(path.name, "there is no such file")
        if path.stat().st_size > MAX_FILE:
            raise _refusal(path.name, f"over {MAX_FILE >> 20} MiB: too large to be an embedding")
        with path.open("rb") as file:
            is_picture = file.read(len(PNG)) == PNG
    except OSError as error:
        raise _refusal(path.name, f"cannot be read ({error.strerror})") from None
    if is_picture:
        return _look_at_picture(path, name)
    name = name or path.stem
    with _about_embeddings():
        header = plain_header_of(path, "an embedding")
    for key, told in header.tensors.items():
        if told.dtype not in _FLOATS:
            raise _refusal(path.name, f"{printable(key, 40)} is {told.dtype}; vectors are floats")
    shapes = {key: told.shape for key, told in header.tensors.items()}
    token, vectors = _understand(shapes, header.metadata.get("name"), path.name)
    return EmbeddingFile(name, token, vectors, path, header)


def bundled(
    header: Header, is_named: Callable[[str], bool], warnings: list[str] | None
) -> list[EmbeddingFile]:
    """Return the embeddings inside the file of a LoRA; they are keys that begin with BUNDLE.

    One with vectors for a text encoder's output, as OneTrainer trains them, cannot be used: it is
    left out, with a line in `warnings`. is_named: whether the prompts use a name.

    Raises SafelightError as `look_at` does, and for a name in the prompts that cannot be used.
    """
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for key, told in header.tensors.items():
        if key.startswith(BUNDLE):
            name, _, inner = key.removeprefix(BUNDLE).partition(".")
            found.setdefault(name, {})[inner] = told.shape
    embeddings: list[EmbeddingFile] = []
    for name, shapes in found.items():
        if outputs := [key for key in shapes if key.endswith("_out")]:
            why = f"{name:.40} has {outputs[0]:.20}, vectors for the text encoder's output"
            if is_named(name):
                raise _refusal(header.name, f"{why}: they are not supported")
            if warnings is not None:
                warnings.append(f"{_refusal(header.name, why)}; it is left out")
            continue
        _, vectors = _understand(shapes, None, header.name)
        keyed = tuple(
            replace(v, keys=tuple(f"{BUNDLE}{name}.{k}" for k in v.keys)) for v in vectors
        )
        embeddings.append(EmbeddingFile(name, None, keyed, header.path, header))
    return embeddings


# --- layouts --------------------------------------------------------------------------------------


def _understand(
    shapes: Mapping[str, tuple[int, ...]], named: str | None, file: str
) -> tuple[str | None, tuple[Vectors, ...]]:
    """Return a file's token and vectors. shapes: of its tensors. named: the `name` in the file."""
    keys = list(shapes)
    if all(key.startswith("string_to_param.") for key in keys):
        if len(keys) != 1:
            raise _refusal(file, "string_to_param must hold the vectors of one embedding")
        return _token(named), (_vectors("", keys, shapes, file),)
    placed = {_NAMES.get(key, key): key for key in keys}
    if placed.keys() <= set(_PLACES):
        if len(placed) < len(keys):
            raise _refusal(file, "vectors for one text encoder under two names")
        return None, tuple(_vectors(p, [placed[p]], shapes, file) for p in _PLACES if p in placed)
    if all(_LISTED.match(key) for key in keys):
        widths: dict[int, list[str]] = {}
        for key in sorted(keys, key=lambda key: int(key.partition(".")[0])):
            widths.setdefault(shapes[key][-1] if shapes[key] else 0, []).append(key)
        return None, tuple(_vectors("", each, shapes, file) for each in widths.values())
    if len(keys) > 1:
        told = printable(", ".join(sorted(keys)[:4]), 60)
        raise _refusal(file, f"{len(keys)} tensors in it ({told}); an embedding has one")
    return _token(keys[0]), (_vectors("", keys, shapes, file),)


def _token(token: str | None) -> str | None:
    """Return the name that a file gives, None for a placeholder."""
    if token is None or not token.strip() or token in _NAMELESS or len(token) > 256:
        return None
    return token.strip()


def _vectors(
    place: Place, keys: Sequence[str], shapes: Mapping[str, tuple[int, ...]], file: str
) -> Vectors:
    """Return the description of the vectors of some tensors, one after the other."""
    for key in keys:
        shape = shapes[key]
        if len(shape) not in (1, 2) or 0 in shape:
            raise _refusal(file, f"vectors of shape {shape!s:.40}; expected (number, width)")
    count = sum(1 if len(shapes[key]) == 1 else shapes[key][0] for key in keys)
    width = shapes[keys[0]][-1]
    if count > MAX_VECTORS or width > MAX_WIDTH:
        raise _refusal(file, f"{count} vectors of {width}; an embedding has at most {MAX_VECTORS}")
    return Vectors(place, count, width, tuple(keys))


def _look_at_picture(path: Path, name: str | None) -> EmbeddingFile:
    """Return the embedding in a picture's text. Without a name it is called what the text says."""
    with _about_embeddings(), opened(path, path.name) as image:
        try:
            text = cast("Any", image).text.get(PNG_TEXT)  # reads to the end of the file
        except Exception as error:  # decoders of broken files raise anything
            why = f"the picture is damaged or cut off ({reason(error)})"
            raise refusal(path.name, why) from None
    if text is None:
        raise _refusal(path.name, f"a picture without an embedding in it (text {PNG_TEXT!r})")
    try:
        content = json.loads(base64.b64decode(text, validate=True))
        [rows] = (one["TORCHTENSOR"] for one in content["string_to_param"].values())
        rows = rows if isinstance(rows[0], list) else [rows]
        numbers = tuple(tuple(float(number) for number in row) for row in rows)
        named = content.get("name")
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError, binascii.Error):
        raise _refusal(path.name, f"its text {PNG_TEXT!r} is damaged") from None
    if len({len(row) for row in numbers}) != 1:
        raise _refusal(path.name, f"its text {PNG_TEXT!r} is damaged")
    shapes = {"string_to_param.*": (len(numbers), len(numbers[0]))}
    token, vectors = _understand(shapes, named if isinstance(named, str) else None, path.name)
    return EmbeddingFile(name or token or path.stem, token, vectors, path, numbers=numbers)


@contextmanager
def _about_embeddings() -> Iterator[None]:
    """Turn an error within the block into one about an embedding."""
    try:
        yield
    except SafelightError as error:
        raise SafelightError(f"embedding {error}", code=error.code, field="embeddings") from None


def _refusal(name: str, why: str) -> SafelightError:
    return SafelightError(str(refusal(f"embedding {name}", why)), field="embeddings")


def _listed(widths: tuple[int, ...]) -> str:
    return " and ".join(map(str, widths))


def _family(widths: tuple[int, ...]) -> str:
    return f" ({_FITS[widths]})" if widths in _FITS else ""
