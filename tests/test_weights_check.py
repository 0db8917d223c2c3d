import io
import json
import os
import pickle
import struct
import tracemalloc
import zipfile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save, save_file

from safelight.errors import SafelightError
from safelight.weights.check import MAX_TENSORS, printable, read_header, read_json
from weights_tiny import raw_file, refused


def tensor(shape=(2,), offsets=(0, 8), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


GOOD = {"a": tensor()}
TWO = {"a": tensor(), "b": tensor(offsets=(8, 16))}
B = json.dumps(GOOD).encode()


def zipped():
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(2)}, buffer)
    return buffer.getvalue()


def nested_zip():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as z:
        z.writestr("../../evil", "x")
    return buffer.getvalue()


def framed(header, data=b"\0" * 8, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


# Each a whole file, and a word that its refusal should hold.
BAD = {
    "empty": (b"", "empty"),
    **{f"{n} bytes": (b"\x01" * n, f"only {n} bytes") for n in range(1, 8)},
    "eight zeros": (b"\0" * 8, "header"),
    "no header": (struct.pack("<Q", 0) + b"{}", "header"),
    "length 2^63": (framed(GOOD, length=2**63), "over 32 MB"),
    "length 2^64 - 1": (framed(GOOD, length=2**64 - 1), "over 32 MB"),
    "length 33 MB": (framed(GOOD, length=33 * 2**20), "over 32 MB"),
    "length beyond the file": (framed(GOOD, length=5000), "cut short"),
    "header cut short": (framed(B[:-1], b""), "bad header"),
    "header length one too small": (framed(B, length=len(B) - 1), "bad header"),
    "header length one too large": (framed(B, length=len(B) + 1), "after the header"),
    "data cut short": (framed(GOOD, b"\0" * 7), "cut short"),
    "no data": (framed(GOOD, b""), "cut short"),
    "trailing byte": (framed(GOOD, b"\0" * 9), "after the last"),
    "bytes and no tensors": (framed({}, b"\0"), "after the last"),
    "list": (framed(b"[]"), "not a JSON object"),
    "string": (framed(b'"a"'), "not a JSON object"),
    "number": (framed(b"1234"), "not a JSON object"),
    "null": (framed(b"null"), "not a JSON object"),
    "leading space": (framed(b" " + B), "not a JSON object"),
    "not UTF-8 name": (framed(B.replace(b'"a"', b'"\xff"')), "UTF-8"),
    "overlong UTF-8": (framed(B.replace(b'"a"', b'"\xc0\xaf"')), "UTF-8"),
    "surrogate escape": (framed(B.replace(b'"a"', b'"\\ud800"')), "UTF-8"),
    "bad escape": (framed(B.replace(b'"a"', b'"\\x41"')), "escape"),
    "raw newline in name": (framed(B.replace(b'"a"', b'"a\n"')), "expected a string"),
    "UTF-16": (framed(json.dumps(GOOD).encode("utf-16-le")), "bad header"),
    "byte order mark": (framed(b"\xef\xbb\xbf" + B), "not a JSON object"),
    "two objects": (framed(B + B), "after the header"),
    "trailing comma": (framed(B[:-1] + b",}"), "expected a string"),
    "single quotes": (framed(B.replace(b'"', b"'")), "expected a string"),
    "duplicate tensor": (framed(B[:-1] + b"," + B[1:]), "twice"),
    "duplicate by escape": (framed(B[:-1] + b"," + B[1:].replace(b'"a"', b'"\\u0061"')), "twice"),
    "duplicate dtype": (framed(B.replace(b'{"d', b'{"dtype":"F32","d')), "twice"),
    "duplicate metadata": (framed(b'{"__metadata__":{"k":"","k":""},' + B[1:]), "twice"),
    "metadata twice": (framed(b'{"__metadata__":{},"__metadata__":{},' + B[1:]), "twice"),
    "metadata not an object": (framed({"__metadata__": [], **GOOD}), "expected {"),
    "metadata of numbers": (framed({"__metadata__": {"k": 1}, **GOOD}), "expected a string"),
    "nested metadata": (framed({"__metadata__": {"k": {}}, **GOOD}), "expected a string"),
    "deep lists": (framed(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "expected {"),
    "deep objects": (framed(b'{"a":' * 100_000 + b"1" + b"}" * 100_000), "unknown entry"),
    "deep shape": (framed({"a": {**tensor(), "shape": [[2]]}}), "whole number"),
    "tensor null": (framed({"a": None}), "expected {"),
    "tensor empty": (framed({"a": {}}), "needs dtype"),
    "no dtype": (framed({"a": {"shape": [2], "data_offsets": [0, 8]}}), "needs dtype"),
    "no shape": (framed({"a": {"dtype": "F32", "data_offsets": [0, 8]}}), "needs dtype"),
    "no offsets": (framed({"a": {"dtype": "F32", "shape": [2]}}), "needs dtype"),
    "extra entry": (framed({"a": {**tensor(), "x": 1}}), "unknown entry"),
    "unknown dtype": (framed({"a": tensor(dtype="F33")}), "unknown dtype"),
    "empty dtype": (framed({"a": tensor(dtype="")}), "unknown dtype"),
    "dtype in lower case": (framed({"a": tensor(dtype="f32")}), "unknown dtype"),
    "dtype a number": (framed({"a": {**tensor(), "dtype": 32}}), "expected a string"),
    "negative shape": (framed({"a": tensor(shape=(-2,))}), "whole number"),
    "both negative": (framed({"a": tensor(shape=(-1, -2))}), "whole number"),
    "fraction in shape": (framed({"a": tensor(shape=(2.0,))}), "whole number"),
    "exponent in shape": (framed(B.replace(b"[2]", b"[2e0]")), "whole number"),
    "true in shape": (framed({"a": tensor(shape=(True, 2))}), "whole number"),
    "string in shape": (framed({"a": tensor(shape=("2",))}), "whole number"),
    "NaN in shape": (framed(B.replace(b"[2]", b"[NaN]")), "whole number"),
    "leading zero": (framed(B.replace(b"[2]", b"[02]")), "bad header"),
    "shape not a list": (framed({"a": {**tensor(), "shape": 2}}), "expected ["),
    "long number": (framed(B.replace(b"[2]", b"[" + b"9" * 5000 + b"]")), "whole number"),
    "shape overflows 64 bits": (framed({"a": tensor(shape=(2**32, 2**32 + 1))}), "too large"),
    "shape overflows to its size": (
        framed({"a": tensor(shape=(2**62, 2, 2, 2), offsets=(0, 0))}, b""),
        "too large",
    ),
    "huge shape with a zero": (
        framed({"a": tensor(shape=(0, 2**62, 2**62), offsets=(0, 0))}, b""),
        "too large",
    ),
    "too many dimensions": (framed({"a": tensor(shape=(1,) * 9)}), "more than 8"),
    "shape too small": (framed({"a": tensor(shape=(1,))}), "do not hold"),
    "shape too large": (framed({"a": tensor(shape=(3,))}), "do not hold"),
    "dtype too wide": (framed({"a": tensor(dtype="F64")}), "do not hold"),
    "one offset": (framed({"a": {**tensor(), "data_offsets": [0]}}), "two data_offsets"),
    "three offsets": (framed({"a": {**tensor(), "data_offsets": [0, 8, 8]}}), "two data_offsets"),
    "offsets reversed": (framed({"a": tensor(offsets=(8, 0))}), "do not hold"),
    "offsets negative": (framed({"a": tensor(offsets=(-8, 0))}), "whole number"),
    "offsets beyond the file": (framed({"a": tensor(offsets=(2**40, 2**40 + 8))}), "hole"),
    "first tensor late": (framed({"a": tensor(offsets=(1, 9))}, b"\0" * 9), "hole"),
    "hole": (framed({**TWO, "b": tensor(offsets=(9, 17))}, b"\0" * 17), "hole"),
    "overlap": (framed({**TWO, "b": tensor(offsets=(4, 12))}, b"\0" * 12), "overlaps"),
    "same bytes": (framed({**TWO, "b": tensor()}), "overlaps"),
    "a inside b": (framed({"a": tensor((4,), (0, 16)), "b": tensor(offsets=(4, 12))}), "overlaps"),
    "long name": (framed({"n" * 2000: tensor()}), "are the most"),
    "torch zip": (zipped(), "zip"),
    "zip slip": (nested_zip(), "zip"),
    "pickle": (pickle.dumps({"a": 1}, 2), "pickle"),
    "pickle, protocol 5": (pickle.dumps({"a": [0] * 99}, 5), "pickle"),
    "pickle, protocol 0": (pickle.dumps({"a": [0] * 99}, 0), "not a safetensors"),
    "GGUF": (b"GGUF" + b"\x03" * 60, "GGUF"),
    "LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git lfs pull"),
    "web page": (b"<!doctype html><title>404</title>", "web page"),
    "text": (b"just a note to self, no weights", "not a safetensors"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_malformed_file_is_refused_in_one_line(case, tmp_path):
    content, word = BAD[case]
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    assert refused(lambda: read_header(path), word).startswith("x.safetensors: ")


def test_there_are_enough_cases():
    assert len(BAD) >= 60


@pytest.mark.parametrize("name", ["x.ckpt", "x.pt", "x.bin", "x"])
def test_the_kind_is_decided_by_the_bytes(name, tmp_path):
    path = raw_file(tmp_path / name, GOOD, b"\0" * 8)
    assert list(read_header(path).tensors) == ["a"]
    path.write_bytes(zipped())
    with pytest.raises(SafelightError, match="zip archive"):
        read_header(path)


def test_no_pickle_is_ever_run(tmp_path):
    canary = tmp_path / "canary"

    class Gadget:
        def __reduce__(self):
            return os.system, (f"touch {canary}",)

    for protocol in range(6):
        path = tmp_path / "x.safetensors"
        path.write_bytes(pickle.dumps(Gadget(), protocol))
        with pytest.raises(SafelightError):
            read_header(path)
    assert not canary.exists()


def test_what_is_not_a_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "absent"):
        with pytest.raises(SafelightError, match="not a file"):
            read_header(path)


def test_a_hostile_name_stays_on_one_line(tmp_path):
    path = tmp_path / ("a\n\x1b[31m\u202eb" + "c" * 200)
    path.write_bytes(b"")
    with pytest.raises(SafelightError) as error:
        read_header(path)
    assert len(str(error.value)) <= 200
    assert str(error.value).isprintable()


def test_printable_cuts_and_cleans():
    assert printable("a b", 3) == "a b"
    assert printable("abcd", 3) == "ab…"
    assert printable("a\u2028b\tc", 9) == "a?b?c"


def test_a_good_header_is_read(tmp_path):
    tensors = {
        "b": torch.zeros(2, 3, dtype=torch.float16),
        "scalar": torch.tensor(1.0),
        "none": torch.zeros(0, 4),
        'quote " and \\ and é': torch.zeros(1, dtype=torch.bfloat16),
    }
    path = tmp_path / "x.safetensors"
    save_file(tensors, path, {"format": "pt", "thumbnail": "x" * 5000})
    header = read_header(path)
    assert {k: v.shape for k, v in header.tensors.items()} == {
        k: tuple(v.shape) for k, v in tensors.items()
    }
    assert header.tensors["b"].dtype == "F16"
    assert header.metadata == {"format": "pt"}
    assert header.path == path


@pytest.mark.parametrize(
    "body",
    [
        b'{"a":' + b"[" * 2**20,
        b'{"__metadata__":{"k":"' + b"\\n" * 2**20,
        b"{" + b",".join(b'"%d":{}' % i for i in range(2**17)),
        b'{"__metadata__":{' + b",".join(b'"%d":""' % i for i in range(2**17)) + b"}}",
        b'{"a":{"dtype":"F32","shape":[' + b"1," * 2**20,
    ],
)
def test_a_hostile_header_takes_little_memory(body, tmp_path):
    path = raw_file(tmp_path / "x.safetensors", body)
    tracemalloc.start()
    with pytest.raises(SafelightError):
        read_header(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < len(body) + 8 * 2**20


def test_the_number_of_tensors_is_bounded(tmp_path):
    header = {str(i): tensor((0,), (0, 0)) for i in range(MAX_TENSORS + 1)}
    with pytest.raises(SafelightError, match="more than"):
        read_header(raw_file(tmp_path / "x.safetensors", header))


SEED = save({"a.b": torch.ones(3), "c": torch.ones(2, 2, dtype=torch.float16)}, {"k": "v"})


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_a_mutant_is_refused_or_equal_to_what_the_library_reads(data, tmp_path_factory):
    content = bytearray(SEED)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        change = data.draw(st.sampled_from(["set", "delete", "insert", "swap"]))
        if change == "set":
            content[at] = data.draw(st.integers(0, 255))
        elif change == "delete":
            del content[at : at + data.draw(st.integers(1, 16))]
        elif change == "insert":
            content[at:at] = data.draw(
                st.sampled_from([b"0", b"9", b"-", b'"', b"}", b"[1]", b"\\"])
            )
        else:
            content[at : at + 2] = content[at : at + 2][::-1]
        if not content:
            break
    path = tmp_path_factory.getbasetemp() / "mutant.safetensors"
    path.write_bytes(content)
    line, header = "", None
    try:
        header = read_header(path)
    except SafelightError as e:
        line = str(e)
    assert len(line) <= 200
    assert line.isprintable()
    if header:
        with safe_open(path, "pt") as file:
            found = {k: tuple(file.get_tensor(k).shape) for k in file.keys()}  # noqa: SIM118
        assert found == {k: v.shape for k, v in header.tensors.items()}


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "JSON"),
        (b"[]", "not a JSON object"),
        (b"{", "JSON"),
        (b'{"a": 1, "a": 2}', "twice"),
        (b'{"a": NaN}', "not a number"),
        (b'{"a": ' + b"[" * 50_000, "deep"),
        (b'{"a": ' + b"9" * 5000 + b"}", "JSON"),
        (b"\xff", "UTF-8"),
        (b'{"a": "' + b"x" * 2**20 + b'"}', "too large"),
    ],
)
def test_a_bad_config_is_refused(content, word, tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(SafelightError, match=word) as error:
        read_json(path)
    assert len(str(error.value)) <= 200
