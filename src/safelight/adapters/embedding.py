"""Textual inversions: vectors that stand for words which a model was never taught.

arXiv:2208.01618. A file comes from a stranger, in one of these layouts:

- diffusers: {token: vectors}, as safetensors or as a pickle
- A1111: {"string_to_param": {"*": vectors}, "name": …}, a pickle
- {"emb_params": vectors}, safetensors
- for SDXL, {"clip_l": vectors, "clip_g": vectors}
- a list of {token: vectors}, a pickle
- `bundle_emb.<name>.…` in the file of a LoRA
- a PNG whose text `sd-ti-embedding` is A1111's layout as JSON in base64

Pickles are read with `torch.load(weights_only=True)`, which runs no code of theirs.
"""

from __future__ import annotations

import base64
import binascii
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from safelight.errors import SafelightError
from safelight.picture import opened
from safelight.weights.check import Header, printable, read_header, refusal
from safelight.weights.digest import digest_file

MAX_FILE = 64 * 2**20
"""Bytes. 75 vectors for SDXL take 600 KB; what is larger is something else."""

MAX_VECTORS = 512
PNG = b"\x89PNG\r\n\x1a\n"
PNG_TEXT = "sd-ti-embedding"
BUNDLE = "bundle_emb."

Place = Literal["clip_l", "clip_g", ""]
"""Which text encoder vectors are for; empty where a file does not say."""

_PLACES: tuple[Place, ...] = ("clip_l", "clip_g")
_NAMELESS = ("*", "emb_params")
_FITS = {(768,): "Stable Diffusion 1", (1024,): "Stable Diffusion 2", (768, 1280): "SDXL"}


@dataclass(frozen=True, eq=False)
class Embedding:
    """A textual inversion.

    name: its file's, without the ending: what it is called by in A1111 and ComfyUI. token: what
    the file itself calls it, None if it does not. sha256: of the file. vectors: each for a text
    encoder, float32 [n, width].
    """

    name: str
    token: str | None
    sha256: str
    vectors: tuple[tuple[Place, Tensor], ...]

    @property
    def widths(self) -> tuple[int, ...]:
        """The numbers of each vector, of all text encoders."""
        return tuple(sorted(tensor.shape[1] for _, tensor in self.vectors))

    def fitting(self, widths: Mapping[str, int]) -> dict[str, Tensor]:
        """Return the vectors of each text encoder of a model, by the encoders' names.

        widths: what each encoder reads. Raises SafelightError if one has none that fit.
        """
        found: dict[str, Tensor] = {}
        for encoder, width in widths.items():
            place = "clip_g" if encoder.endswith("_2") else "clip_l"
            fit = [(p, v) for p, v in self.vectors if v.shape[1] == width]
            exact = [v for p, v in fit if p == place] or [v for p, v in fit if p == ""]
            # With one encoder there is no doubt about which is meant.
            exact = exact or [v for _, v in fit if len(widths) == 1]
            if not exact:
                raise self._unfit(widths)
            found[encoder] = exact[0]
        if len({len(vectors) for vectors in found.values()}) > 1:
            counts = " and ".join(f"{len(vectors)}" for vectors in found.values())
            raise _refusal(self.name, f"{counts} vectors for two text encoders; as many are needed")
        return found

    def _unfit(self, widths: Mapping[str, int]) -> SafelightError:
        mine, theirs = self.widths, tuple(sorted(widths.values()))
        return _refusal(
            self.name,
            f"vectors of {_listed(mine)} numbers{_family(mine)}; "
            f"this model reads {_listed(theirs)}{_family(theirs)}",
        )


def read_embedding(path: Path, name: str | None = None) -> Embedding:
    """Return the textual inversion of a file. name: what it is called by, if not by the file.

    Raises SafelightError, one line, if it is none, or a damaged or hostile one.
    """
    name = name or path.stem
    shown = path.name
    try:
        if not path.is_file():
            raise _refusal(shown, "there is no such file")
        if path.stat().st_size > MAX_FILE:
            raise _refusal(shown, f"over {MAX_FILE >> 20} MiB: too large to be an embedding")
        with path.open("rb") as file:
            head = file.read(16)
    except OSError as error:
        raise _refusal(shown, f"cannot be read ({error.strerror})") from None
    sha256 = digest_file(path).sha256
    if head.startswith(PNG):
        content = _read_png(path)
        named = content.get("name")  # a picture's file is often called something else
        name = named if isinstance(named, str) and named else name
    elif head.startswith((b"PK\x03\x04", b"\x80")):
        content = _read_pickle(path)
    else:
        content = _read_safetensors(read_header(path))
    token, vectors = _understand(content, shown)
    if not digest_file(path).sha256 == sha256:
        raise _refusal(shown, "it changed while it was read; try again")
    return Embedding(name, token, sha256, vectors)


def read_bundle(header: Header, sha256: str) -> list[Embedding]:
    """Return the textual inversions inside a LoRA's file. sha256: of the file.

    Raises SafelightError as `read_embedding` does.
    """
    there = [key for key in header.tensors if key.startswith(BUNDLE)]
    found: dict[str, dict[str, Any]] = {}
    for key, tensor in _read_safetensors(header, there).items():
        name, _, rest = key.removeprefix(BUNDLE).partition(".")
        outer, dot, inner = rest.partition(".")
        one = found.setdefault(name, {})
        if dot:
            one.setdefault(outer, {})[inner] = tensor
        else:
            one[outer] = tensor
    return [
        Embedding(name, None, sha256, _understand(content, header.name)[1])
        for name, content in found.items()
    ]


# --- files ----------------------------------------------------------------------------------------


def _read_safetensors(header: Header, keys: list[str] | None = None) -> dict[str, Tensor]:
    try:
        with safe_open(header.path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in keys or header.tensors}
    except (SafetensorError, OSError) as error:
        raise _refusal(header.name, f"cannot be read: {error}") from None


def _read_pickle(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about old ways of saving
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of a broken or hostile file, anything
        if "weights_only" in str(error).lower():
            why = "refused: this pickle would run code, not only hold numbers"
            raise _refusal(path.name, why) from None
        raise _refusal(path.name, f"damaged, or no embedding ({type(error).__name__})") from None


def _read_png(path: Path) -> dict[str, Any]:
    with opened(path, path.name) as image:
        text = cast("Any", image).text.get(PNG_TEXT)
    if text is None:
        raise _refusal(path.name, f"a picture without an embedding in it (text {PNG_TEXT!r})")
    try:
        content = json.loads(base64.b64decode(text, validate=True), object_hook=_tensor)
    except (ValueError, TypeError, RecursionError, binascii.Error):
        content = None
    if not isinstance(content, dict):
        raise _refusal(path.name, f"its text {PNG_TEXT!r} is damaged")
    return content


def _tensor(found: dict[str, Any]) -> Any:
    """Return the tensor that A1111's JSON holds as nested lists."""
    if "TORCHTENSOR" not in found:
        return found
    return torch.tensor(found["TORCHTENSOR"], dtype=torch.float32)


# --- layouts --------------------------------------------------------------------------------------


def _understand(content: Any, name: str) -> tuple[str | None, tuple[tuple[Place, Tensor], ...]]:
    """Return the token and the vectors of what a file holds. name: of the file."""
    if isinstance(content, list):
        return None, _of_list(cast("list[Any]", content), name)
    if not isinstance(content, Mapping) or not content:
        raise _refusal(name, "no embedding in it: expected vectors by name")
    found = {str(key): value for key, value in cast("Mapping[Any, Any]", content).items()}
    if "string_to_param" in found:
        params = found["string_to_param"]
        if not isinstance(params, Mapping) or len(cast("Mapping[Any, Any]", params)) != 1:
            raise _refusal(name, "string_to_param must hold the vectors of one embedding")
        [vectors] = cast("Mapping[Any, Any]", params).values()
        token = found.get("name")
        return _token(token), (("", _checked(vectors, name)),)
    if set(found) <= set(_PLACES):
        return None, tuple((p, _checked(found[p], name)) for p in _PLACES if p in found)
    if len(found) > 1:
        keys = printable(", ".join(sorted(found)[:4]), 60)
        raise _refusal(name, f"{len(found)} things in it ({keys}); an embedding has one")
    [(token, vectors)] = found.items()
    return _token(token), (("", _checked(vectors, name)),)


def _of_list(content: list[Any], name: str) -> tuple[tuple[Place, Tensor], ...]:
    """Return the vectors of a list of {token: vectors}, those of one width joined."""
    widths: dict[int, list[Tensor]] = {}
    for one in content:
        if not isinstance(one, Mapping):
            raise _refusal(name, "a list of other things than vectors by name")
        for value in cast("Mapping[Any, Any]", one).values():
            vectors = _checked(value, name)
            widths.setdefault(vectors.shape[1], []).append(vectors)
    if not widths:
        raise _refusal(name, "an empty list")
    return tuple(("", _checked(torch.cat(each), name)) for each in widths.values())


def _token(token: object) -> str | None:
    """Return the name that a file gives, None for one that stands for any."""
    if not isinstance(token, str) or not token.strip() or token in _NAMELESS or len(token) > 256:
        return None
    return token.strip()


def _checked(vectors: object, name: str) -> Tensor:
    """Return vectors as float32 [n, width]."""
    usable = isinstance(vectors, Tensor) and vectors.layout == torch.strided
    if not usable or not vectors.is_floating_point():
        raise _refusal(name, "no embedding: something else stands in the place of its vectors")
    if vectors.ndim not in (1, 2) or 0 in vectors.shape:
        raise _refusal(name, f"vectors of shape {tuple(vectors.shape)}; expected (number, width)")
    rows = 1 if vectors.ndim == 1 else vectors.shape[0]
    if rows > MAX_VECTORS or vectors.shape[-1] > 2**16:
        raise _refusal(name, f"{rows} vectors; an embedding has at most {MAX_VECTORS}")
    found = vectors.detach().to("cpu", torch.float32).reshape(rows, -1).contiguous()
    if not bool(found.isfinite().all()):
        raise _refusal(name, "its vectors hold NaN or Inf")
    return found


def _refusal(name: str, why: str) -> SafelightError:
    return SafelightError(str(refusal(f"embedding {name}", why)), field="embeddings")


def _listed(widths: tuple[int, ...]) -> str:
    return " and ".join(map(str, widths))


def _family(widths: tuple[int, ...]) -> str:
    return f" ({_FITS[widths]})" if widths in _FITS else ""
