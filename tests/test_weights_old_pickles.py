"""Files that torch.save wrote before PyTorch 1.6: checked and read like its archives."""

import io
import os
import pickle
from pathlib import Path

import pytest
import torch

from safelight.weights import old_pickles
from safelight.weights.headers import header_of
from safelight.weights.tensors import open_tensors
from weights_tiny import refused

TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2, dtype=torch.int64)}


def old(path: Path, content) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=False)
    return path


def read(path: Path) -> dict[str, torch.Tensor]:
    header = header_of(path)
    with open_tensors(header) as get:
        return {key: get(key) for key in header.tensors}


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
def test_tensors_come_back(tmp_path, name):
    shared = torch.arange(12, dtype=torch.float16).reshape(3, 4)
    content = {"state_dict": {**TENSORS, "part": shared[1:], "turned": shared.t()}, "epoch": 3}
    path = old(tmp_path / name, content)
    found = read(path)
    assert found.keys() == content["state_dict"].keys()
    for key, tensor in content["state_dict"].items():
        assert torch.equal(found[key], tensor)
        assert found[key].dtype == tensor.dtype
    # The header says where a tensor's bytes are.
    info = header_of(path).tensors["a.weight"]
    assert path.read_bytes()[info.start : info.end] == TENSORS["a.weight"].numpy().tobytes()


def test_one_cut_at_any_byte_is_refused(tmp_path):
    whole = old(tmp_path / "x.pth", TENSORS).read_bytes()
    for cut in (*range(0, len(whole), 7), len(whole) - 1):
        (tmp_path / "cut.pth").write_bytes(whole[:cut])
        refused(lambda: header_of(tmp_path / "cut.pth"))
    (tmp_path / "cut.pth").write_bytes(whole + b"\0")
    refused(lambda: header_of(tmp_path / "cut.pth"), "1 bytes after the last tensor")


def parts(path: Path) -> list[bytes]:
    """Return the five pickles of a file, and its storages."""
    content = io.BytesIO(path.read_bytes())
    found = []
    for _ in range(5):
        at = content.tell()
        pickletools_end(content)
        found.append(content.getvalue()[at : content.tell()])
    return [*found, content.read()]


def pickletools_end(content: io.BytesIO) -> None:
    import pickletools

    for _ in pickletools.genops(content):
        pass


def test_what_does_not_fit_together_is_refused(tmp_path):
    path = old(tmp_path / "x.pth", {"a": torch.ones(2)})
    magic, version, machine, table, keys, storages = parts(path)

    def told(*pieces: bytes, words: str) -> None:
        path.write_bytes(b"".join(pieces))
        refused(lambda: header_of(path), words)

    big = pickle.dumps({"little_endian": False}, 2)
    told(magic, version, big, table, keys, storages, words="little-endian")
    none, numbers = pickle.dumps([], 2), pickle.dumps([[1]], 2)
    told(magic, version, machine, table, none, storages, words="list of storages")
    told(magic, version, machine, table, numbers, storages, words="list of storages")
    longer = (3).to_bytes(8, "little") + storages[8:] + b"\0" * 4
    told(magic, version, machine, table, keys, longer, words="not all in the file")
    huge = (2**63).to_bytes(8, "little") + storages[8:]
    told(magic, version, machine, table, keys, huge, words="not all in the file")

    class Code:
        def __reduce__(self):
            return os.system, ("true",)

    code = pickle.dumps({"a": Code()}, 2)
    told(magic, version, machine, code, keys, storages, words="holds code (posix.system)")
    told(magic, version, code, table, keys, storages, words="holds code (posix.system)")
    # An object that is none of torch.save's own is refused before its other parts are read.
    told(magic, pickle.dumps(1002, 2), machine, table, keys, storages, words="did not write")


def test_a_large_one_is_refused_before_it_is_read(tmp_path, monkeypatch):
    path = old(tmp_path / "x.pth", TENSORS)
    monkeypatch.setattr(old_pickles, "MAX_OLD", 100)
    refused(lambda: header_of(path), "of PyTorch before 1.6", "convert it to safetensors")
