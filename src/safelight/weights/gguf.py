"""Read what a GGUF file says about itself, and refuse what is inconsistent.

Only texts and numbers of the metadata are kept. Lists, such as a tokenizer's words, are skipped
unless `read_gguf_lists` asks for them.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Collection
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from safelight.weights.check import (
    ITEM_SIZES,
    MAX_DIMS,
    MAX_METADATA,
    MAX_STRING,
    MAX_TENSORS,
    Header,
    TensorInfo,
    refusal,
)

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_BYTES = 2**26
"""Bytes before the tensors. A tokenizer of 250,000 words takes 12 million."""
MAX_LISTED = 2**20
"""Texts in all lists of a file: a tokenizer has its words and as many merges of two."""
MAX_LISTED_BYTES = 2**12
"""Bytes of one text in a list that is read. Qwen's longest merge, of blanks, has 513."""
MAX_ALIGNMENT = 2**16
_GGML_DIMS = 4

ALIGNMENT = "general.alignment"
ORIGINAL_SHAPE = "comfy.gguf.orig_shape."
"""Begins the key of the shape that a tensor had before it was flattened to be quantised."""

BLOCKS = {
    "Q4_0": (32, 18),
    "Q4_1": (32, 20),
    "Q5_0": (32, 22),
    "Q5_1": (32, 24),
    "Q8_0": (32, 34),
    "Q2_K": (256, 84),
    "Q3_K": (256, 110),
    "Q4_K": (256, 144),
    "Q5_K": (256, 176),
    "Q6_K": (256, 210),
    "IQ4_NL": (32, 18),
    "IQ4_XS": (256, 136),
}
"""How many numbers a block has, and how many bytes, by type: those that `quantised` decodes.

That module needs PyTorch, and a header is read without it.
"""

_TYPES = dict(
    enumerate(
        (
            *("F32", "F16", "Q4_0", "Q4_1", "Q4_2", "Q4_3", "Q5_0", "Q5_1", "Q8_0", "Q8_1"),
            *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_K", "IQ2_XXS", "IQ2_XS", "IQ3_XXS"),
            *("IQ1_S", "IQ4_NL", "IQ3_S", "IQ2_S", "IQ4_XS", "I8", "I16", "I32", "I64", "F64"),
            *("IQ1_M", "BF16"),
        )
    )
) | {34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0"}
"""The types of tensors, by their numbers in a file."""
_SUPPORTED = "F16, BF16, F32, Q4_0 to Q8_0, Q2_K to Q6_K, IQ4_NL, IQ4_XS"

_UINT32, _INT32, _TEXT, _LIST, _INT64 = 4, 5, 8, 9, 11
_NUMBERS = {
    **dict(enumerate("BbHh")),
    _UINT32: "I",
    _INT32: "i",
    6: "f",
    7: "?",
    **dict(enumerate("Qqd", 10)),
}
"""The types of numbers in the metadata, as `struct` names them."""


def read_gguf_header(path: Path, name: str | None = None) -> Header:
    """Read and check the header of a GGUF file; the tensors themselves are not touched.

    name: what to call the file in errors, if not by the last part of its path. Shapes are in
    PyTorch's order, and those from before a tensor was flattened.

    Raises SafelightError, one line of at most 200 characters, if the file is anything else, if
    the header is malformed or ambiguous, if a type is not supported, or if the tensors do not fill
    the rest of the file, with gaps only where they are aligned.
    """
    return _read(path, name or path.name, ())[0]


def read_gguf_lists(path: Path, keys: Collection[str], name: str | None = None) -> dict[str, Any]:
    """Return lists of the metadata by their keys, without those that are not there.

    A list of numbers of one byte is bytes, any other a list of texts or of numbers. Raises as
    `read_gguf_header` does, also for one with a text that is too long.
    """
    return _read(path, name or path.name, keys)[1]


def _read(path: Path, name: str, keys: Collection[str]) -> tuple[Header, dict[str, Any]]:
    try:
        if not path.is_file():
            raise refusal(name, "not a file; a .gguf file is needed")
        with path.open("rb", buffering=2**16) as file:
            reader = _Reader(path, name, file, frozenset(keys))
            return reader.header(), reader.lists
    except OSError as e:
        raise refusal(name, f"cannot be read ({e.strerror})") from None


class _Reader:
    """Read a header left to right, once. wanted: keys of the lists that are kept."""

    def __init__(
        self, path: Path, name: str, file: BinaryIO, wanted: frozenset[str] = frozenset()
    ) -> None:
        self.path, self.name, self.file = path, name, file
        self.wanted, self.lists = wanted, dict[str, Any]()
        self.size = os.fstat(file.fileno()).st_size
        self.at = self.listed = 0
        self.alignment = 32
        self.metadata: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}

    def header(self) -> Header:
        if self.take(4) != MAGIC:
            raise refusal(self.name, "not a GGUF file")
        self.check_version()
        count, entries = self.number("Q"), self.number("Q")
        if not 0 < count <= MAX_TENSORS:
            self.fail(f"{count} tensors; 1 to {MAX_TENSORS} are read")
        if entries > MAX_METADATA:
            self.fail(f"{entries} metadata entries; {MAX_METADATA} are the most")
        self.read_metadata(entries)
        tensors: dict[str, TensorInfo] = {}
        for _ in range(count):
            key = self.text()
            if key in tensors:
                self.fail(f"{key!r:.60} is there twice")
            tensors[key] = self.tensor(key)
        tensors = dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)))
        start = self.aligned(self.at)
        self.check_layout(tensors, self.size - start)
        return Header(self.path, self.name, tensors, self.metadata, "gguf", start)

    def check_version(self) -> None:
        version = self.number("I")
        if version in VERSIONS:
            return
        if version and not version % 2**16:
            raise refusal(self.name, "a GGUF file in big-endian order; little-endian is needed")
        known = " and ".join(map(str, VERSIONS))
        raise refusal(self.name, f"a GGUF file of version {version}; {known} are read")

    def read_metadata(self, count: int) -> None:
        seen: set[str] = set()
        for _ in range(count):
            key = self.text()
            if key in seen:
                self.fail(f"{key!r:.60} is there twice")
            seen.add(key)
            kind = self.number("I")
            if key == ALIGNMENT and kind != _UINT32:
                self.fail(f"{ALIGNMENT} is no uint32")
            if key.startswith(ORIGINAL_SHAPE):
                self.shapes[key.removeprefix(ORIGINAL_SHAPE)] = self.shape(key, kind)
            elif kind == _LIST and key in self.wanted:
                self.lists[key] = self.read_list(key)
            elif kind == _LIST:
                self.skip_list()
            elif kind == _TEXT:
                self.read_value(key)
            elif kind in _NUMBERS:
                self.metadata[key] = str(self.number(_NUMBERS[kind]))
            else:
                self.fail(f"{key!r:.60} has unknown type {kind}")
        self.alignment = alignment = int(self.metadata.get(ALIGNMENT, self.alignment))
        if not 0 < alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
            self.fail(f"{ALIGNMENT} {alignment} is no power of two up to {MAX_ALIGNMENT}")

    def shape(self, key: str, kind: int) -> tuple[int, ...]:
        """Return the shape of a tensor before it was flattened."""
        inner, count = (self.number("I"), self.number("Q")) if kind == _LIST else (0, 0)
        letter = {_INT32: "i", _INT64: "q"}.get(inner)  # ComfyUI-GGUF's, stable-diffusion.cpp's
        if letter is None:
            self.fail(f"{key!r:.80} is no list of int32 or int64")
        if count > MAX_DIMS:
            self.fail(f"{key!r:.80} has {count} numbers, {MAX_DIMS} are the most")
        return struct.unpack(f"<{count}{letter}", self.take(struct.calcsize(letter) * count))

    def read_value(self, key: str) -> None:
        length = self.number("Q")
        if length <= MAX_STRING:
            self.metadata[key] = self.decode(self.take(length))
        else:
            self.skip(length)

    def read_list(self, key: str) -> Any:
        """Return a list; see `read_gguf_lists`."""
        kind, count = self.number("I"), self.number("Q")
        letter = _NUMBERS.get(kind)
        if letter is None and kind != _TEXT:
            self.fail(f"{key!r:.60} is a list of type {kind}")
        if letter is not None and struct.calcsize(letter) == 1:
            return self.take(count)
        self.listed += count
        if self.listed > MAX_LISTED:
            self.fail(f"more than {MAX_LISTED} members of lists")
        if letter is not None:
            raw = self.take(count * struct.calcsize(f"<{letter}"))
            return list(struct.unpack(f"<{count}{letter}", raw))
        return [self.listed_text(key) for _ in range(count)]

    def listed_text(self, key: str) -> str:
        length = self.number("Q")
        if length > MAX_LISTED_BYTES:
            self.fail(f"{key!r:.60} has a text of {length} bytes, {MAX_LISTED_BYTES} are the most")
        return self.decode(self.take(length))

    def skip_list(self) -> None:
        kind, count = self.number("I"), self.number("Q")
        if kind in _NUMBERS:
            self.skip(count * struct.calcsize(_NUMBERS[kind]))
            return
        if kind != _TEXT:
            self.fail("a list of lists" if kind == _LIST else f"a list of unknown type {kind}")
        self.listed += count
        if self.listed > MAX_LISTED:
            self.fail(f"more than {MAX_LISTED} texts in lists")
        # Nothing but plain calls, because a tokenizer has hundreds of thousands.
        at, end = self.at, min(self.size, MAX_BYTES)
        read, seek = self.file.read, self.file.seek
        for _ in range(count):
            at += 8 + int.from_bytes(read(8), "little")
            if at > end:
                break
            seek(at)
        self.skip(at - self.at)

    def tensor(self, key: str) -> TensorInfo:
        """Return the tensor whose description comes next."""
        dims = self.number("I")
        if dims > _GGML_DIMS:
            self.fail(f"{key!r:.60} has {dims} dimensions, {_GGML_DIMS} are the most")
        stored: tuple[int, ...] = struct.unpack(f"<{dims}Q", self.take(8 * dims))[::-1]
        kind, start = self.number("I"), self.number("Q")
        dtype = _TYPES.get(kind, f"type {kind}")
        numbers, size = BLOCKS.get(dtype) or (1, ITEM_SIZES.get(dtype, 0))
        if not size:
            raise refusal(self.name, f"{key!r:.54} is {dtype}; supported: {_SUPPORTED}")
        count = math.prod(stored)
        if math.prod(side or 1 for side in stored) >= 2**63:
            self.fail(f"{key!r:.60}: the shape {stored} is too large")
        row = stored[-1] if stored else 1
        if row % numbers or (dtype in BLOCKS and not count):
            self.fail(f"{key!r:.60}: {dtype} has blocks of {numbers}, which fill no {stored}")
        shape = self.shapes.get(key, stored)
        if min(shape, default=0) < 0 or math.prod(shape) != count:
            self.fail(f"{key!r:.60}: {stored} cannot have been {shape}")
        if start % self.alignment:
            self.fail(f"{key!r:.60} starts at {start}, no multiple of {self.alignment}")
        return TensorInfo(dtype, shape, start, start + count // numbers * size)

    def check_layout(self, tensors: dict[str, TensorInfo], size: int) -> None:
        """Refuse holes, overlaps, and a file that is too short or too long.

        tensors: in the order of their bytes. size: of all their bytes, in the file.
        """
        end = 0
        for key, info in tensors.items():
            if info.start != self.aligned(end):
                what = "overlaps the tensor" if info.start < end else "leaves a hole"
                self.fail(f"{key!r:.60} starts at {info.start} and {what} before it")
            end = info.end
        if end > size:
            there = max(size, 0)
            raise refusal(self.name, f"cut short: {there} bytes of tensors, the header lists {end}")
        if size > self.aligned(end):
            raise refusal(self.name, f"{size - end} bytes after the last tensor")

    def aligned(self, at: int) -> int:
        return -(-at // self.alignment) * self.alignment

    def text(self) -> str:
        """Return a key or a name."""
        length = self.number("Q")
        if length > MAX_STRING:
            self.fail(f"a name of {length} bytes, {MAX_STRING} are the most")
        return self.decode(self.take(length))

    def decode(self, raw: bytes) -> str:
        try:
            return raw.decode()
        except UnicodeDecodeError:
            self.fail("a text that is not valid UTF-8")

    def number(self, kind: str) -> int:
        """Return a number. kind: as `struct` names it."""
        return struct.unpack(f"<{kind}", self.take(struct.calcsize(f"<{kind}")))[0]

    def take(self, count: int) -> bytes:
        self.move(count)
        found = self.file.read(count)
        if len(found) < count:
            self.cut_short()
        return found

    def skip(self, count: int) -> None:
        self.move(count)
        self.file.seek(self.at)

    def move(self, count: int) -> None:
        if self.at + count > self.size:
            self.cut_short()
        if self.at + count > MAX_BYTES:
            raise refusal(self.name, f"a header of over {MAX_BYTES >> 20} MB")
        self.at += count

    def cut_short(self) -> NoReturn:
        raise refusal(self.name, f"cut short: {self.size} bytes do not hold its header")

    def fail(self, why: str) -> NoReturn:
        raise refusal(self.name, f"bad header at byte {self.at}: {why}")
