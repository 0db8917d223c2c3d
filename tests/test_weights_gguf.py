"""GGUF files: what is read of them, to the bit, and what is refused."""

import gc
import json
import os
import struct
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize, quantize
from safetensors.torch import load_file, save_file

from safelight import cli
from safelight.adapters.embedding import look_at
from safelight.adapters.file import open_adapter
from safelight.errors import SafelightError
from safelight.fast.quantised import GGML, Quantised
from safelight.weights import gguf as module
from safelight.weights import inspect
from safelight.weights.autoencoders import with_autoencoders
from safelight.weights.cache import stamp_of
from safelight.weights.check import MAX_METADATA, MAX_TENSORS, TensorInfo, read_header
from safelight.weights.controlnets import with_controlnet
from safelight.weights.digest import REOPENED
from safelight.weights.find import Source, find
from safelight.weights.finite import FiniteCheck
from safelight.weights.folder import Folder
from safelight.weights.gguf import BLOCKS, MAX_BYTES, MAX_LISTED, read_gguf_header
from safelight.weights.headers import header_of, plain_header_of
from safelight.weights.library import Library
from safelight.weights.plan import read_plan
from safelight.weights.tensors import open_tensors
from test_weights_load import single_file
from weights_tiny import FAMILY, refused, text_folder, write

FLOATS = {
    "F32": (np.float32, torch.float32),
    "F16": (np.float16, torch.float16),
    "F64": (np.float64, torch.float64),
    "I8": (np.int8, torch.int8),
    "I16": (np.int16, torch.int16),
    "I32": (np.int32, torch.int32),
    "I64": (np.int64, torch.int64),
}


MAPS = Path("/proc/self/maps")
"""The mapped files of a process of Linux."""


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("SAFELIGHT_MODELS", raising=False)


def written(path, tensors, said=None, alignment=None):
    """Write a file with the library of the format.

    tensors: arrays, or pairs of a type and an array of bytes. said: called with the writer.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, "sd1")
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    if said is not None:
        said(writer)
    for name, tensor in tensors.items():
        kind, array = tensor if isinstance(tensor, tuple) else (None, tensor)
        writer.add_tensor(name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def coded(kind, rows, numbers, seed=0):
    """Return random blocks, with the scales of most of them small: uint8 [rows, bytes]."""
    per, size = BLOCKS[kind]
    random = np.random.default_rng(seed)
    blocks = random.integers(0, 256, (rows, numbers // per, size), np.uint8)
    return blocks.reshape(rows, -1)


def read(path, key="a", openable=None):
    with open_tensors(header_of(path), openable) as tensors:
        return tensors(key)


# --- what is read --------------------------------------------------------------------------------


def test_the_sizes_of_blocks_are_those_of_the_decoders_and_of_the_library():
    assert {k: (b.numbers, b.size) for k, b in GGML.items()} == BLOCKS
    for name, sizes in BLOCKS.items():
        assert gguf.GGML_QUANT_SIZES[Kind[name]] == sizes
    for kind in Kind:
        assert module._TYPES[kind.value] == kind.name


def same_bits(ours, theirs):
    """Return whether numbers are the same to the bit, and NaN where the others are."""
    mine = ours.numpy()
    both = np.isnan(theirs)
    return np.array_equal(np.isnan(mine), both) and np.array_equal(
        mine[~both].view(np.uint32), theirs[~both].view(np.uint32)
    )


@pytest.mark.parametrize("kind", BLOCKS)
def test_each_type_is_decoded_as_the_library_does_to_the_bit(kind, tmp_path):
    """Random bytes have all scales: small, large, negative, zero, NaN and infinite ones."""
    codes = coded(kind, 64, 512)
    size = BLOCKS[kind][1]
    ends = codes.reshape(-1, size)
    # Two bytes in each place where a scale may lie: NaN, both infinities, -0 and a small number.
    for row, half in enumerate((0x7E00, 0x7C00, 0xFC00, 0x8000, 0x0001)):
        ends[4 * row : 4 * row + 4] = 1
        for at in (0, 2, size - 4, size - 2):
            ends[4 * row : 4 * row + 4, at : at + 2] = np.frombuffer(struct.pack("<H", half), "u1")
    found = read(written(tmp_path / "x.gguf", {"a": (Kind[kind], codes)}))
    assert isinstance(found, Quantised)
    assert tuple(found.shape) == (64, 512)
    with np.errstate(all="ignore"):
        theirs = dequantize(codes, Kind[kind])
    assert np.isnan(theirs).any()
    assert np.isfinite(theirs).mean() > 0.5
    assert same_bits(found.to(torch.float32), theirs)
    assert same_bits(found[5:9].to(torch.float32), theirs[5:9])


@pytest.mark.parametrize("kind", FLOATS)
def test_plain_numbers_are_mapped_as_they_are(kind, tmp_path):
    array, dtype = FLOATS[kind]
    values = np.arange(-6, 6).reshape(2, 3, 2).astype(array)
    path = written(tmp_path / "x.gguf", {"a": values, "b": values[0]})
    found = read(path, "b")
    assert found.dtype == dtype
    assert torch.equal(found, torch.from_numpy(values[0].copy()))
    assert header_of(path).tensors["a"].dtype == kind
    found[0] = 7  # a private page
    assert torch.equal(read(path, "b"), torch.from_numpy(values[0].copy()))


def test_bfloat16_is_mapped(tmp_path):
    values = torch.randn(3, 5).bfloat16()
    raw = values.view(torch.uint8).numpy()
    path = written(tmp_path / "x.gguf", {"a": (Kind.BF16, raw)})
    assert torch.equal(read(path), values)


def test_a_header_says_shapes_types_places_and_texts(tmp_path):
    def said(writer):
        writer.add_string("general.name", "a ü")
        writer.add_string("general.description", "x" * 5000)
        writer.add_uint32("general.file_type", 15)
        writer.add_float32("scale", 0.5)
        writer.add_bool("yes", True)
        writer.add_int64("low", -(2**40))
        writer.add_array("words", ["a", "bc"])
        writer.add_array("counts", [1, 2, 3])

    tensors = {
        "late": np.ones((5, 3), np.float32),
        "scalar": np.array(2.0, np.float16),
        "coded": (Kind.Q4_K, coded("Q4_K", 6, 512)),
    }
    path = written(tmp_path / "x.gguf", tensors, said)
    header = read_gguf_header(path)
    assert (header.format, header.name, header.path) == ("gguf", "x.gguf", path)
    assert header.tensors == {
        "late": TensorInfo("F32", (5, 3), 0, 60),
        "scalar": TensorInfo("F16", (), 64, 66),
        "coded": TensorInfo("Q4_K", (6, 512), 96, 96 + 12 * 144),
    }
    assert header.metadata == {
        "general.architecture": "sd1",
        "general.name": "a ü",
        "general.file_type": "15",
        "scale": "0.5",
        "yes": "True",
        "low": str(-(2**40)),
    }
    reader = gguf.GGUFReader(path)
    assert header.start == reader.data_offset
    assert float(read(path, "scalar")) == 2


@pytest.mark.parametrize("alignment", [1, 8, 64, 4096])
def test_tensors_lie_where_the_alignment_says(alignment, tmp_path):
    tensors = {
        "a": np.arange(3, dtype=np.int8),
        "b": np.arange(5, dtype=np.float32),
        "c": (Kind.Q8_0, coded("Q8_0", 3, 32)),
        "d": np.arange(2, dtype=np.float64),
    }
    path = written(tmp_path / "x.gguf", tensors, alignment=alignment)
    header = header_of(path)
    theirs = {t.name: t.data_offset for t in gguf.GGUFReader(path).tensors}
    assert {k: header.start + t.start for k, t in header.tensors.items()} == theirs
    for key in "abd":
        assert torch.equal(read(path, key), torch.from_numpy(tensors[key]))
    codes = read(path, "c").codes
    assert np.array_equal(codes.numpy(), tensors["c"][1])


def test_an_empty_tensor_is_read(tmp_path):
    """ComfyUI marks files with them."""
    tensors = {"v_pred": np.ones(0, np.float32), "a": np.ones(2), "z": np.ones((0, 3), np.float16)}
    path = written(tmp_path / "x.gguf", tensors)
    assert header_of(path).tensors["v_pred"] == TensorInfo("F32", (0,), 0, 0)
    assert torch.equal(read(path, "v_pred"), torch.ones(0))
    assert torch.equal(read(path, "z"), torch.ones(0, 3).half())
    assert torch.equal(read(path), torch.ones(2, dtype=torch.float64))


def test_version_2_is_read_like_3(tmp_path):
    path = written(tmp_path / "x.gguf", {"a": np.ones(3, np.float32)})
    content = bytearray(path.read_bytes())
    content[4] = 2
    path.write_bytes(content)
    assert torch.equal(read(path), torch.ones(3))


def flattened(tmp_path, kind, shape):
    """Return a file with a tensor that was flattened to be quantised, and its numbers."""
    per = BLOCKS[kind][0]
    codes = coded(kind, int(np.prod(shape)) // per, per)
    key = f"{module.ORIGINAL_SHAPE}a"
    path = tmp_path / "x.gguf"
    written(path, {"a": (Kind[kind], codes)}, lambda writer: writer.add_array(key, [*shape]))
    with np.errstate(all="ignore"):
        return path, dequantize(codes, Kind[kind]).reshape(shape)


def test_a_flattened_tensor_has_its_shape_again(tmp_path):
    path, numbers = flattened(tmp_path, "Q5_K", (8, 64, 2, 2))
    found = read(path)
    assert header_of(path).tensors["a"].shape == (8, 64, 2, 2)
    assert isinstance(found, Quantised)
    assert same_bits(found[2:5].to(torch.float32), numbers[2:5])


def test_a_flattened_tensor_whose_rows_are_no_whole_blocks_is_decoded(tmp_path):
    path, numbers = flattened(tmp_path, "Q4_K", (32, 4, 3, 2, 2))
    found = read(path)
    assert isinstance(found, torch.Tensor)
    assert found.dtype == torch.float32
    assert same_bits(found, numbers)


def test_the_shape_of_another_tensor_changes_nothing(tmp_path):
    def said(writer):
        writer.add_array(f"{module.ORIGINAL_SHAPE}b", [4])

    path = written(tmp_path / "x.gguf", {"a": np.ones((2, 3), np.float32)}, said)
    assert header_of(path).tensors["a"].shape == (2, 3)


def test_the_file_that_is_given_is_opened(tmp_path):
    path = written(tmp_path / "x.gguf", {"a": np.ones(3, np.float32)})
    other = written(tmp_path / "other.gguf", {"a": np.zeros(3, np.float32)})
    with other.open("rb") as file:
        opened = REOPENED.format(file.fileno())
        where = opened if Path(opened).exists() else str(other)
        assert torch.equal(read(path, openable=where), torch.zeros(3))


def test_a_file_that_changed_after_its_header_was_read_is_refused(tmp_path):
    path = written(tmp_path / "x.gguf", {"a": np.ones(3, np.float32)})
    header = header_of(path)
    written(path, {"a": np.ones((1, 3), np.float32)})
    with pytest.raises(SafelightError, match="changed while it was read"), open_tensors(header):
        pass
    path.unlink()
    with pytest.raises(SafelightError, match="not a file"), open_tensors(header):
        pass


def test_tensors_stay_in_the_file_and_outlive_the_block(tmp_path):
    path = written(tmp_path / "x.gguf", {"a": (Kind.Q8_0, coded("Q8_0", 4, 64)), "b": np.ones(9)})
    found, plain = read(path), read(path, "b")
    before = found.to(torch.float32)
    gc.collect()
    assert torch.equal(found.to(torch.float32), before)
    assert torch.equal(plain, torch.ones(9, dtype=torch.float64))
    if MAPS.exists():
        assert MAPS.read_text().count(str(path)) == 2
        del found, plain
        gc.collect()
        assert str(path) not in MAPS.read_text()


@pytest.mark.parametrize("value", [1.0, float("nan"), float("inf"), 7e4])
def test_plain_numbers_are_checked_while_the_file_is_hashed(value, tmp_path):
    numbers = np.ones((4, 8), np.float32)
    numbers[3, 7] = value
    path = written(tmp_path / "x.gguf", {"a": (Kind.Q8_0, coded("Q8_0", 2, 32)), "b": numbers})
    header = header_of(path)
    check = FiniteCheck(header, {"a": torch.float16, "b": torch.float16})
    check.check_piece(memoryview(path.read_bytes()), 0)
    check.finish(path, stamp_of(path))
    assert set(check.finite_keys) == ({"b"} if value == 1 else set())


# --- what is refused -----------------------------------------------------------------------------


def text(value):
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def entry(key, kind, value=b""):
    return text(key) + struct.pack("<I", kind) + value


def listed(kind, count, value=b""):
    return struct.pack("<IQ", kind, count) + value


def described(name="a", dims=(2,), kind=0, offset=0, count=None):
    """Return how a header describes a tensor. dims: the shortest step first."""
    shape = struct.pack(f"<I{len(dims)}Q", len(dims) if count is None else count, *dims)
    return text(name) + shape + struct.pack("<IQ", kind, offset)


def framed(tensors=(), entries=(), data=b"\0" * 8, version=3, counts=None, alignment=32):
    tensors = tensors or (described(),)
    few = (len(tensors), len(entries)) if counts is None else counts
    head = b"GGUF" + struct.pack("<IQQ", version, *few) + b"".join(entries) + b"".join(tensors)
    return head + b"\0" * (-len(head) % alignment) + data


GOOD = framed()
TWO = [described(), described("b", offset=32)]
SHAPE = f"{module.ORIGINAL_SHAPE}a"
TOP = 2**63


def shaped(*numbers):
    return entry(SHAPE, 9, listed(5, len(numbers), struct.pack(f"<{len(numbers)}i", *numbers)))


def aligned(number, kind=4, code="I"):
    return [entry("general.alignment", kind, struct.pack(f"<{code}", number))]


# Each a whole file, and words that its refusal should hold.
BAD = {
    **{
        f"cut at {n}": (GOOD[:n], "cut short")
        for n in (4, 5, 8, 16, 23, 24, 32, 33, 60, len(GOOD) - 1)
    },
    "version 0": (framed(version=0), "version 0; 2 and 3"),
    "version 1": (framed(version=1), "version 1; 2 and 3"),
    "version 4": (framed(version=4), "version 4; 2 and 3"),
    "big-endian": (framed(version=3 << 24), "big-endian"),
    "no tensors": (framed(counts=(0, 0)), "0 tensors"),
    "too many tensors": (framed(counts=(MAX_TENSORS + 1, 0)), f"{MAX_TENSORS + 1} tensors"),
    "2^64 - 1 tensors": (framed(counts=(2**64 - 1, 0)), "tensors"),
    "more tensors than there are": (framed(counts=(2, 0), data=b""), "cut short"),
    "too many entries": (framed(counts=(1, MAX_METADATA + 1)), "metadata entries"),
    "more entries than there are": (framed(counts=(1, 2)), "cut short"),
    "tensor twice": (
        framed([described(), described(offset=32)], data=b"\0" * 40),
        "'a' is there twice",
    ),
    "key twice": (framed(entries=[entry("k", 0, b"1")] * 2), "'k' is there twice"),
    "long name": (framed([described("n" * 2000)]), "a name of 2000 bytes"),
    "long key": (framed(entries=[entry("n" * 2000, 0, b"1")]), "a name of 2000 bytes"),
    "name of 2^64 - 1 bytes": (framed([b"\xff" * 8]), "are the most"),
    "name that is not UTF-8": (framed([described(b"\xff\xfe")]), "UTF-8"),
    "key of a surrogate": (framed(entries=[entry(b"\xed\xa0\x80", 0, b"1")]), "UTF-8"),
    "value that is not UTF-8": (framed(entries=[entry("k", 8, text(b"\xc0\xaf"))]), "UTF-8"),
    "value beyond the file": (
        framed(entries=[entry("k", 8, struct.pack("<Q", 5000))]),
        "cut short",
    ),
    "value of 2^64 - 1 bytes": (framed(entries=[entry("k", 8, b"\xff" * 8)]), "cut short"),
    "unknown value": (framed(entries=[entry("k", 13)]), "unknown type 13"),
    "unknown list": (framed(entries=[entry("k", 9, listed(99, 1))]), "list of unknown type 99"),
    "list of lists": (framed(entries=[entry("k", 9, listed(9, 1))]), "a list of lists"),
    "list of 2^64 - 1": (framed(entries=[entry("k", 9, listed(12, 2**64 - 1))]), "cut short"),
    "words beyond the file": (
        framed(entries=[entry("k", 9, listed(8, 9, text("a")))]),
        "cut short",
    ),
    "word of 2^64 - 1 bytes": (
        framed(entries=[entry("k", 9, listed(8, 9, b"\xff" * 99))]),
        "cut short",
    ),
    "too many words": (
        framed(entries=[entry("k", 9, listed(8, MAX_LISTED + 1))]),
        "texts in lists",
    ),
    "too many words in two lists": (
        framed(
            entries=[entry("j", 9, listed(8, 1, text("a"))), entry("k", 9, listed(8, MAX_LISTED))]
        ),
        "texts in lists",
    ),
    "alignment 0": (framed(entries=aligned(0)), "no power of two"),
    "alignment 24": (framed(entries=aligned(24)), "no power of two"),
    "alignment 2^17": (framed(entries=aligned(2**17)), "no power of two"),
    "alignment of another type": (framed(entries=aligned(32, 10, "Q")), "no uint32"),
    "alignment in a list": (
        framed(entries=[entry("general.alignment", 9, listed(4, 0))]),
        "no uint32",
    ),
    "alignment of 64, data at 32": (
        framed([described("b" * 40)], entries=aligned(64), alignment=32),
        "cut short",
    ),
    "five dimensions": (framed([described(dims=(1,) * 5)]), "5 dimensions"),
    "2^32 - 1 dimensions": (framed([described(count=2**32 - 1)]), "dimensions"),
    "coded numbers, and none": (
        framed([described(dims=(256, 0), kind=12)], data=b""),
        "blocks of 256, which fill no (0, 256)",
    ),
    "too many numbers": (framed([described(dims=(2**32, 2**31))]), "is too large"),
    "numbers that overflow to their size": (
        framed([described(dims=(2**63, 2, 2**62, 2))]),
        "is too large",
    ),
    "a huge shape with a zero": (framed([described(dims=(2**62, 2**62, 0))]), "is too large"),
    "shape too large": (
        framed([described(dims=(3,))]),
        "cut short: 8 bytes of tensors, the header lists 12",
    ),
    "shape too small": (framed([described(dims=(1,))], data=b"\0" * 40), "36 bytes after the last"),
    "bytes after the padding": (framed(data=b"\0" * 33), "25 bytes after the last"),
    "no data": (framed(data=b""), "cut short"),
    "half a block": (
        framed([described(dims=(16, 4), kind=2)]),
        "Q4_0 has blocks of 32, which fill no (4, 16)",
    ),
    "rows of half a block": (framed([described(dims=(384, 2), kind=12)]), "which fill no (2, 384)"),
    "one coded number": (framed([described(dims=(), kind=8)]), "which fill no ()"),
    **{
        kind.name: (
            framed([described("t.weight", (256,), kind.value)]),
            f"'t.weight' is {kind.name}; supported: F16",
        )
        for kind in Kind
        if kind.name not in (*BLOCKS, *FLOATS, "BF16")
    },
    "a type that was removed": (framed([described(kind=4)]), "'a' is Q4_2; supported"),
    "an unknown type": (framed([described(kind=2**32 - 1)]), "type 4294967295; supported"),
    "a type and a long name": (
        framed([described("n" * 999, (256,), 16)]),
        "is IQ2_XXS; supported: F16, BF16, F32, Q4_0 to Q8_0, Q2_K to Q6_K, IQ4_NL, IQ4_XS",
    ),
    "offset between two places": (
        framed([described(offset=8)], data=b"\0" * 16),
        "no multiple of 32",
    ),
    "first tensor late": (framed([described(offset=32)], data=b"\0" * 40), "leaves a hole"),
    "hole": (
        framed([described(), described("b", offset=64)], data=b"\0" * 72),
        "'b' starts at 64 and leaves a hole",
    ),
    "same bytes": (framed([described(), described("b")]), "overlaps"),
    "overlap": (
        framed([described(dims=(9,)), described("b", offset=32)], data=b"\0" * 40),
        "overlaps",
    ),
    "offset of 2^64 - 32": (framed([described(offset=2**64 - 32)]), "leaves a hole"),
    "second tensor beyond the file": (framed(TWO), "cut short"),
    "original shape of other numbers": (framed(entries=[shaped(3)]), "(2,) cannot have been (3,)"),
    "original shape of no numbers": (framed(entries=[shaped(0)]), "cannot have been"),
    "original shape below 0": (framed(entries=[shaped(-1, -2)]), "cannot have been"),
    "original shape of nine": (framed(entries=[shaped(*[1] * 8, 2)]), "8 are the most"),
    "original shape of 2^60": (
        framed(entries=[entry(SHAPE, 9, listed(5, 2**60))]),
        "8 are the most",
    ),
    "original shape of uint32": (
        framed(entries=[entry(SHAPE, 9, listed(4, 1, b"\2" + b"\0" * 3))]),
        "no list of int32 or int64",
    ),
    "original shape in no list": (
        framed(entries=[entry(SHAPE, 5, b"\2\0\0\0")]),
        "no list of int32",
    ),
}


def test_long_lists_of_words_are_skipped_without_being_built(tmp_path):
    words, path = 250_000, tmp_path / "x.gguf"
    entries = [
        entry("tokens", 9, listed(8, words, b"".join(text(f"word{n}") for n in range(words)))),
        entry("scores", 9, listed(6, words, b"\0" * 4 * words)),
        entry("after", 8, text("it")),
    ]
    path.write_bytes(framed(entries=entries))
    tracemalloc.start()
    header = read_gguf_header(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert header.metadata == {"after": "it"}
    assert [*header.tensors] == ["a"]
    assert peak < 2**18


def test_the_plain_file_of_this_table_is_read(tmp_path):
    path = tmp_path / "x.gguf"
    for content in (
        GOOD,
        framed(data=b"\0" * 32),
        framed(TWO, data=b"\0" * 40),
        framed(TWO[::-1], data=b"\0" * 64),
        framed(entries=[shaped(1, 2)]),
        framed(
            entries=[entry("k", 9, listed(8, 2, text("a") + text(""))), *aligned(64)], alignment=64
        ),
    ):
        path.write_bytes(content)
        header = header_of(path)
        assert all(torch.equal(read(path, key).flatten(), torch.zeros(2)) for key in header.tensors)


@pytest.mark.parametrize("case", BAD)
def test_a_malformed_file_is_refused_in_one_line(case, tmp_path):
    content, words = BAD[case]
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    assert refused(lambda: header_of(path), words).startswith("x.gguf: ")


def test_a_header_without_end_is_refused(tmp_path):
    path = tmp_path / "x.gguf"
    entries = [entry("k", 8, struct.pack("<Q", MAX_BYTES))]
    with path.open("wb") as file:
        file.write(framed(entries=entries))
        file.truncate(2 * MAX_BYTES)  # a hole on the disk
    refused(lambda: header_of(path), "x.gguf: a header of over 64 MB")
    with path.open("wb") as file:
        file.write(framed(entries=[entry("k", 9, listed(8, 2, struct.pack("<Q", MAX_BYTES)))]))
        file.truncate(2 * MAX_BYTES)
    refused(lambda: header_of(path), "x.gguf: a header of over 64 MB")


@pytest.mark.parametrize(
    "content",
    [
        framed(counts=(MAX_TENSORS, MAX_METADATA), data=b"\0" * 2**20),
        framed(entries=[entry("k", 9, listed(8, MAX_LISTED))], data=b"\0" * 2**23),
        framed(entries=[entry("k", 9, listed(0, 2**40))]),
        framed([b"\0\0\0\0\0\0\0\x10"]),
    ],
)
def test_a_hostile_header_takes_little_memory(content, tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    with pytest.raises(SafelightError):
        read_gguf_header(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**18


def test_what_is_not_a_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "absent"):
        refused(lambda path=path: read_gguf_header(path), "not a file")
    write(tmp_path / "other.gguf", "a note to self")
    refused(lambda: read_gguf_header(tmp_path / "other.gguf"), "not a GGUF file")


def test_the_kind_is_decided_by_the_bytes(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(GOOD)
    assert header_of(tmp_path / "x.safetensors").format == "gguf"
    save_file({"a": torch.ones(2)}, tmp_path / "y.gguf")
    assert header_of(tmp_path / "y.gguf").format == "safetensors"
    refused(lambda: read_header(tmp_path / "x.safetensors"), "a GGUF file; a .safetensors file")


@pytest.mark.parametrize("look", [open_adapter, look_at, lambda p: plain_header_of(p, "a thing")])
def test_what_is_no_model_is_refused_as_a_gguf_file(look, tmp_path):
    path = written(tmp_path / "x.gguf", {"a.lora_down.weight": np.ones((2, 4), np.float32)})
    refused(lambda: look(path), "x.gguf: a GGUF file; a", "needs a .safetensors file")


def test_an_autoencoder_or_a_controlnet_in_a_gguf_file_is_refused(tmp_path):
    plan = read_plan(Source("m", text_folder(tmp_path / "m")))
    tensors = {"decoder.conv_in.weight": np.ones((2, 4, 3, 3), np.float32)}
    source = Source("x", written(tmp_path / "x.gguf", tensors))
    refused(lambda: with_autoencoders(plan, {"vae": source}), "a GGUF file; an autoencoder needs")
    refused(lambda: with_controlnet(plan, source), "a GGUF file; a ControlNet needs")


def test_a_folder_with_a_gguf_file_is_refused(tmp_path):
    write(tmp_path / "m/model_index.json", {"_class_name": "StableDiffusionPipeline"})
    written(tmp_path / "m/unet/diffusion_pytorch_model.safetensors", {"a": np.ones(3, np.float32)})
    folder = Folder(tmp_path / "m", "m")
    refused(lambda: folder.part_headers("unet"), "a GGUF file; a folder needs a .safetensors file")


# --- the models folder ---------------------------------------------------------------------------


@pytest.fixture
def root(tmp_path):
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


def model_file(path, kind="Q4_K"):
    key = "model.diffusion_model.input_blocks.1.1.proj_in.weight"
    return written(path, {key: (Kind[kind], coded(kind, 2, 256)), "b": np.ones(3, np.float16)})


def test_gguf_files_are_models_and_nothing_else(root):
    model_file(root / "flat.gguf")
    written(root / "odd.gguf", {"a.lora_down.weight": np.ones((2, 4), np.float32)})
    model_file(root / "checkpoints/sub/deep.GGUF")
    for folder in ("loras", "vae", "embeddings", "controlnet"):
        model_file(root / folder / "no.gguf")
    library = Library(root)
    assert [(e.kind, e.name) for e in library.entries()] == [
        ("model", "flat"),
        ("model", "odd"),
        ("model", "sub/deep"),
    ]
    for name in ("flat", "flat.gguf", "FLAT"):
        assert find(name, models_dir=root) == Source("flat", root / "flat.gguf")
    for name in ("deep", "sub/deep.GGUF", "checkpoints/sub/deep.GGUF"):
        assert find(name, models_dir=root).name == "sub/deep"
    refused(lambda: find("x/none.gguf", models_dir=root), "no model 'x/none.gguf'", "models folder")


def test_a_name_of_two_files_is_an_error_that_lists_both(root):
    model_file(root / "checkpoints/one.gguf")
    save_file({"a": torch.ones(2)}, root / "checkpoints/one.safetensors")
    refused(lambda: find("one", models_dir=root), "one.gguf and checkpoints/one.safetensors")
    assert find("one.gguf", models_dir=root).path.suffix == ".gguf"


def test_a_gguf_file_is_listed_with_its_precision(root, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(root / "none"))
    model_file(root / "checkpoints/one.gguf")
    (root / "checkpoints/broken.gguf").write_bytes(framed([described(kind=16)]))
    monkeypatch.setattr("safelight.weights.catalog.family_of_file", lambda _: Named())
    assert cli.run(["models", "--json", "--models-dir", str(root)]) == 0
    models = {each["name"]: each for each in json.loads(capsys.readouterr().out)}
    assert models["one"]["dtypes"] == ["F16", "Q4_K"]
    assert models["one"]["bytes"] == (root / "checkpoints/one.gguf").stat().st_size
    assert "IQ2_XXS; supported" in models["broken"]["why_not"]


class Named:
    name = "a family"


def test_inspect_tells_the_sizes_and_types_of_parts(tmp_path, monkeypatch):
    monkeypatch.setattr("safelight.families.sd.VARIANTS", (FAMILY,))
    plain = single_file(tmp_path / "plain.safetensors", FAMILY)
    tensors = {}
    for key, tensor in load_file(plain).items():
        values = tensor.numpy()
        is_coded = key.startswith("model.diffusion_model.") and key.endswith(
            ("to_q.weight", ".qkv")
        )
        tensors[key] = (Kind.Q8_0, quantize(values, Kind.Q8_0)) if is_coded else values
    found, wanted = inspect(written(tmp_path / "one.gguf", tensors)), inspect(plain)
    mine, theirs = found["components"]["unet"], wanted["components"]["unet"]
    codes = sum(tensor[1].size for tensor in tensors.values() if isinstance(tensor, tuple))
    assert codes
    assert found["dtypes"] == mine["dtypes"] == ["F32", "Q8_0"]
    assert mine["parameters"] == theirs["parameters"]
    assert mine["bytes"] == theirs["bytes"] - codes * 32 // 34 * 4 + codes
    for key in ("family", "parameters", "native_size", "prediction_type"):
        assert found[key] == wanted[key]
    for part in ("vae", "text_encoder"):
        assert found["components"][part] == wanted["components"][part]
