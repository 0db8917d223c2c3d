"""Read what a checkpoint says about itself, and refuse what is inconsistent.

A file comes from a stranger. Its kind is decided by its bytes, and its header is read here,
strictly and within bounded memory, before any library opens it. Format:
https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import os
import re
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from safelight.errors import SafelightError

# In bytes, by the name of the type.
ITEM_SIZES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}
MAX_HEADER = 32 * 2**20
# Stable Diffusion has about 1,100 tensors. These bounds keep a hostile header of 32 MB from
# growing to gigabytes of Python objects.
MAX_TENSORS = 2**13
MAX_METADATA = 2**12
MAX_DIMS = 8
MAX_STRING = 2**10
LONG_METADATA = {"lora_adapter_metadata": 2**21}
"""Texts of the metadata that may be longer, and are read: their keys, and the most bytes.

Other long texts are skipped. These say how weights are used, so longer ones are refused.
"""

_MAGIC = (
    (b"PK\x03\x04", "a zip archive, as torch.save writes it; convert it to safetensors"),
    (b"\x80", "a pickle that torch.save did not write; convert it to safetensors"),
    (b"GGUF", "a GGUF file; a .safetensors file is needed"),
    (b"version https://git-lfs", "a Git LFS pointer in place of the weights (run: git lfs pull)"),
    (b"<", "a web page in place of the weights"),
)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor as the header describes it: bytes start to end of the data section."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    """A checked header.

    name: what to call the file in errors. tensors: in the order of their bytes. metadata: without
    texts over 1 KB, such as a thumbnail. format: of the file; "torch" if torch.save wrote it, see
    `pickles`. start: where the data section begins in the file, in bytes.
    """

    path: Path
    name: str
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    format: Literal["safetensors", "torch", "gguf"] = "safetensors"
    start: int = 0


def refusal(name: str, why: str, *, code: str = "invalid") -> SafelightError:
    """Return the error for a file that is refused.

    It is one line of at most 200 characters. A hostile name or key can neither break it nor push
    its end out of sight.
    """
    return SafelightError(f"{printable(name, 60)}: {printable(why, 138)}", code=code)


def axis(shapes: Mapping[str, tuple[int, ...]], name: str, place: int) -> int:
    """Return the length of an axis of a tensor; 0 if there is none, which no config may have."""
    shape = shapes.get(name, ())
    return shape[place] if place < len(shape) else 0


def printable(text: str, limit: int) -> str:
    """Return `text` on one line, cut at `limit`; invisible characters become `?`."""
    if len(text) > limit:
        text = text[: limit - 1] + "…"
    return "".join("?" if unicodedata.category(c)[0] in "CZ" and c != " " else c for c in text)


def read_header(path: Path, name: str | None = None) -> Header:
    """Read and check the header of a safetensors file; the tensors themselves are not touched.

    name: what to call the file in errors, if not by the last part of its path.

    Raises SafelightError, one line of at most 200 characters, if the file is anything else, if
    the header is malformed or ambiguous, or if the tensors do not fill the rest of the file
    exactly: no hole, no overlap, nothing left at the end.
    """
    name = name or path.name
    try:
        if not path.is_file():
            raise refusal(name, "not a file; a .safetensors file is needed")
        with path.open("rb") as f:
            size = os.fstat(f.fileno()).st_size
            length = _header_length(name, f.read(64), size)
            f.seek(8)
            text = f.read(length)
    except OSError as e:
        raise refusal(name, f"cannot be read ({e.strerror})") from None
    tensors, metadata = _Scanner(name, text).header()
    tensors = dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)))
    _check_layout(name, tensors, size - 8 - len(text))
    return Header(path, name, tensors, metadata, start=8 + len(text))


def _header_length(name: str, head: bytes, size: int) -> int:
    """Return the length of the header, from the first bytes of a file of `size` bytes."""
    if size == 0:
        raise refusal(name, "the file is empty; a .safetensors file is needed")
    if head[8:9] != b"{":
        for magic, kind in _MAGIC:
            if head.startswith(magic):
                raise refusal(name, f"this is {kind}")
    if head.startswith(b"\xff\xd8\xff"):
        raise refusal(name, "this is a JPEG picture, and no model")
    if size < 8:
        raise refusal(name, f"only {size} bytes long; a .safetensors file is needed")
    length = int.from_bytes(head[:8], "little")
    if length > MAX_HEADER:
        raise refusal(name, f"not a safetensors file: header of {length} bytes, over 32 MB")
    if length > size - 8:
        raise refusal(name, f"cut short: header of {length} bytes in a file of {size}")
    if length == 0 or head[8:9] != b"{":
        raise refusal(name, "not a safetensors file: its header is not a JSON object")
    return length


def _check_layout(where: str, tensors: dict[str, TensorInfo], size: int) -> None:
    end = 0
    for name, t in tensors.items():
        # Python's integers do not overflow, so a shape that would in C just fails to match.
        need = math.prod(t.shape) * ITEM_SIZES[t.dtype]
        if math.prod(d or 1 for d in t.shape) >= 2**63:
            raise refusal(where, f"{name!r:.60}: the shape {t.shape} is too large")
        if t.end - t.start != need:
            raise refusal(
                where, f"{name!r:.60}: {t.end - t.start} bytes do not hold {t.dtype} {t.shape}"
            )
        if t.start != end:
            what = "overlaps the tensor before it" if t.start < end else "leaves a hole before it"
            raise refusal(where, f"{name!r:.60} {what}: starts at {t.start} instead of {end}")
        end = t.end
    if end > size:
        raise refusal(where, f"cut short: {size} bytes of tensors, the header lists {end}")
    if end < size:
        raise refusal(where, f"{size - end} bytes after the last tensor")


class _Scanner:
    """Read the little JSON that a header may hold, left to right, once.

    json.loads would first build whatever a stranger nests in 32 MB; this stops at the first
    token that does not belong.
    """

    # Possessive quantifiers, so that a long string costs no backtracking memory.
    _TOKEN = re.compile(
        rb"[ \t\r\n]*+(?:(?P<mark>[][{}:,])"
        rb'|(?P<string>"[^"\\\x00-\x1f]*+(?:\\.[^"\\\x00-\x1f]*+)*+")'
        rb"|(?P<integer>(?:0|[1-9][0-9]{0,18}+)(?![0-9.eE])))"
    )

    def __init__(self, name: str, text: bytes) -> None:
        self.name, self.text, self.at = name, text, 0

    def header(self) -> tuple[dict[str, TensorInfo], dict[str, str]]:
        tensors: dict[str, TensorInfo] = {}
        metadata: dict[str, str] = {}
        for name in self.members("tensors", MAX_TENSORS):
            if name != "__metadata__":
                tensors[name] = self.tensor(name)
                continue
            for key in self.members("metadata entries", MAX_METADATA):
                value = self.token("string", "a string")
                if len(value) <= LONG_METADATA.get(key, MAX_STRING):
                    metadata[key] = self.decode(value)
                elif key in LONG_METADATA:
                    self.fail(f"{key} of {len(value)} bytes, {LONG_METADATA[key]} are the most")
        if self.text[self.at :].strip(b" \t\r\n"):
            self.fail("something after the header's end")
        return tensors, metadata

    def tensor(self, name: str) -> TensorInfo:
        found: dict[str, Any] = {}
        for key in self.members("entries of one tensor", 4):
            if key == "dtype":
                found[key] = self.string()
            elif key in ("shape", "data_offsets"):
                found[key] = self.integers()
            else:
                self.fail(f"unknown entry {key!r:.40} of tensor {name!r:.60}")
        if len(found) < 3:
            self.fail(f"{name!r:.60} needs dtype, shape and data_offsets")
        if found["dtype"] not in ITEM_SIZES:
            self.fail(f"{name!r:.60} has unknown dtype {found['dtype']!r:.20}")
        if len(found["data_offsets"]) != 2:
            self.fail(f"{name!r:.60} needs two data_offsets")
        return TensorInfo(found["dtype"], found["shape"], *found["data_offsets"])

    def members(self, what: str, limit: int) -> Iterator[str]:
        """Yield the keys of an object. The caller reads the value after each."""
        self.mark(b"{")
        if self.peek() == b"}":
            self.mark(b"}")
            return
        seen: set[str] = set()
        while True:
            key = self.string()
            if key in seen:
                self.fail(f"{key!r:.60} is there twice")
            if len(seen) == limit:
                self.fail(f"more than {limit} {what}")
            seen.add(key)
            self.mark(b":")
            yield key
            if self.mark(b",}") == b"}":
                return

    def integers(self) -> tuple[int, ...]:
        self.mark(b"[")
        if self.peek() == b"]":
            self.mark(b"]")
            return ()
        numbers: list[int] = []
        while True:
            numbers.append(int(self.token("integer", "a whole number")))
            if len(numbers) > MAX_DIMS:
                self.fail(f"a list of more than {MAX_DIMS} numbers")
            if self.mark(b",]") == b"]":
                return tuple(numbers)

    def string(self) -> str:
        raw = self.token("string", "a string")
        if len(raw) > MAX_STRING:
            self.fail(f"a name of {len(raw)} bytes, {MAX_STRING} are the most")
        return self.decode(raw)

    def decode(self, raw: bytes) -> str:
        try:
            if b"\\" not in raw:
                return raw[1:-1].decode()
            text = json.loads(raw.decode())
            text.encode()  # refuses a lone surrogate, which json.loads lets pass
        except UnicodeError:
            self.fail("a string that is not valid UTF-8")
        except ValueError:
            self.fail("a string with a bad escape")
        return text

    def mark(self, allowed: bytes) -> bytes:
        found = self._TOKEN.match(self.text, self.at)
        if found is None or not found["mark"] or found["mark"] not in allowed:
            self.fail(f"expected {' or '.join(map(chr, allowed))}")
        self.at = found.end()
        return found["mark"]

    def peek(self) -> bytes | None:
        found = self._TOKEN.match(self.text, self.at)
        return found["mark"] if found else None

    def token(self, kind: str, what: str) -> bytes:
        found = self._TOKEN.match(self.text, self.at)
        if found is None or found[kind] is None:
            self.fail(f"expected {what}")
        self.at = found.end()
        return found[kind]

    def fail(self, why: str) -> NoReturn:
        raise refusal(self.name, f"bad header at byte {self.at}: {why}")


def read_bytes(path: Path, limit: int, name: str | None = None) -> bytes:
    """Return the content of a file of at most `limit` bytes.

    name: what to call the file in errors, if not by the last part of its path.

    Raises SafelightError that names the file.
    """
    name = name or path.name
    try:
        # A pipe or a device would never end.
        if not path.is_file():
            raise refusal(name, "not a file")
        with path.open("rb") as f:
            raw = f.read(limit + 1)
    except OSError as e:
        raise refusal(name, f"cannot be read ({e.strerror})") from None
    if len(raw) > limit:
        raise refusal(name, f"over {limit} bytes, too large for what it is")
    return raw


def read_json(path: Path, limit: int = 2**20, name: str | None = None) -> dict[str, Any]:
    """Read a config: a JSON object of at most `limit` bytes, in UTF-8, with no key twice.

    All its numbers are finite, also when read as floats. name: as for `read_bytes`.

    Raises SafelightError that names the file.
    """
    name = name or path.name
    raw = read_bytes(path, limit, name)

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        if len(found) < len(items):
            raise ValueError("a key is there twice")
        return found

    def constant(text: str) -> NoReturn:
        raise ValueError(f"{text} is not a number")

    def number(text: str) -> float:
        if not math.isfinite(float(text)):
            raise ValueError(f"{text:.40} is beyond all numbers")
        return float(text)

    def integer(text: str) -> int:
        if len(text) > 300:  # so that it can become a float wherever one is needed
            number(text)
        return int(text)

    try:
        value = json.loads(
            raw.decode(),
            object_pairs_hook=pairs,
            parse_constant=constant,
            parse_float=number,
            parse_int=integer,
        )
    except UnicodeDecodeError:
        raise refusal(name, "not valid UTF-8") from None
    except RecursionError:
        raise refusal(name, "nested too deeply") from None
    except ValueError as e:
        raise refusal(name, f"not usable as JSON: {e}") from None
    if not isinstance(value, dict):
        raise refusal(name, "not a JSON object")
    return value
