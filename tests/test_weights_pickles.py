"""Files of torch.save: read like safetensors, without running any of their code."""

import collections
import io
import os
import pickle
import shlex
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from safelight.adapters.file import open_adapter
from safelight.errors import SafelightError
from safelight.weights import archive, load_model
from safelight.weights.headers import header_of
from safelight.weights.pickles import MAX_STEPS
from safelight.weights.tensors import open_tensors
from test_weights_load import single_file
from weights_tiny import FAMILY, refused, refused_cheaply, text_folder

TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2, dtype=torch.int64)}
NAMES = ["x.ckpt", "x.pt", "x.pth", "x.bin", "x.safetensors", "x.pt2", "x"]


def read(path: Path) -> dict[str, torch.Tensor]:
    header = header_of(path)
    with open_tensors(header) as get:
        return {key: get(key) for key in header.tensors}


def saved(path: Path, content) -> Path:
    torch.save(content, path)
    return path


# --- what is read --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("nested", [False, True])
def test_tensors_come_back_whatever_the_file_is_called(tmp_path, name, nested):
    content = {"state_dict": TENSORS, "epoch": 3} if nested else TENSORS
    found = read(saved(tmp_path / name, content))
    assert found.keys() == TENSORS.keys()
    for key, tensor in TENSORS.items():
        assert torch.equal(found[key], tensor)


def test_safetensors_under_another_name_are_read(tmp_path):
    save_file(TENSORS, tmp_path / "x.ckpt")
    assert torch.equal(read(tmp_path / "x.ckpt")["a.weight"], TENSORS["a.weight"])


DTYPES = [
    torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32,
    torch.int16, torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2,
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype(tmp_path, dtype):
    tensor = torch.tensor([[0.0, 1.0, 2.0], [1.0, 0.0, 4.0]]).to(dtype)
    found = read(saved(tmp_path / "x.ckpt", {"a": tensor}))["a"]
    assert found.dtype == dtype
    assert torch.equal(found.float(), tensor.float())


def test_views_parameters_and_empty_tensors(tmp_path):
    whole = torch.arange(24.0).reshape(4, 6)
    content = {
        "whole": whole,
        "rows": whole[1:3],
        "turned": whole.T,
        "one": torch.tensor(3.0),
        "none": torch.zeros(0, 4),
        "trained": torch.nn.Parameter(whole),
    }
    found = read(saved(tmp_path / "x.ckpt", content))
    for key, tensor in content.items():
        assert torch.equal(found[key], tensor), key
        assert found[key].is_contiguous()


def test_a_modules_state_dict_and_what_lies_beside_the_tensors(tmp_path):
    net = torch.nn.Linear(2, 3)
    path = saved(tmp_path / "x.ckpt", net.state_dict())
    assert read(path).keys() == {"weight", "bias"}
    embedding = {
        "string_to_token": {"*": 265},
        "string_to_param": {"*": torch.ones(2, 4)},
        "name": "eyes",
        "step": 500,
        "sd_checkpoint": None,
    }
    header = header_of(saved(tmp_path / "y.pt", embedding))
    assert header.tensors["string_to_param.*"].shape == (2, 4)
    assert header.metadata == {"string_to_token.*": "265", "name": "eyes", "step": "500"}


def test_a_trainers_checkpoint_with_the_name_of_its_callback_is_read(tmp_path):
    """The published files of Stable Diffusion 1 have one; the class is not imported."""
    program = pickled({"callbacks": {NAMED: 1}, "state_dict": {"a": tensor()}})
    program = program.replace(b"c__main__\nModelCheckpoint\n", CALLBACK)
    program = program.replace(b"ctest_weights_pickles\nNamed\n", CALLBACK)
    path = archived(tmp_path / "x.ckpt", program)
    assert read(path)["a"].tolist() == [0.0, 0.0]


CALLBACK = b"cpytorch_lightning.callbacks.model_checkpoint\nModelCheckpoint\n"


class Named:
    """Stands for a class that a checkpoint names and does not call."""


NAMED = Named


@pytest.fixture
def tiny_family(monkeypatch):
    monkeypatch.setattr("safelight.families.sd.VARIANTS", (FAMILY,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_model_in_a_ckpt_draws_as_in_safetensors(tmp_path, dtype, tiny_family):
    single_file(tmp_path / "x.safetensors", FAMILY)
    tensors = {k: t.to(dtype) for k, t in load_file(tmp_path / "x.safetensors").items()}
    save_file(tensors, tmp_path / "x.safetensors")
    saved(tmp_path / "x.ckpt", {"state_dict": tensors, "global_step": 1})
    small = {**SMALL, "steps": 2}
    for asked in ("float32", "bfloat16"):
        drawn = [
            load_model(tmp_path / f"x.{ending}", device="cpu", dtype=asked).generate("a", **small)
            for ending in ("safetensors", "ckpt")
        ]
        assert drawn[0].images[0].tobytes() == drawn[1].images[0].tobytes()


def test_a_folder_of_bin_files_is_read(tmp_path):
    folder = text_folder(tmp_path / "new")
    wanted = load_model(folder, device="cpu", dtype="float32").generate("a", **SMALL)
    for path in sorted(folder.rglob("*.safetensors")):
        stem = "pytorch_model" if path.stem == "model" else path.stem
        saved(path.with_name(f"{stem}.bin"), read(path))
        path.unlink()
    found = load_model(folder, device="cpu", dtype="float32").generate("a", **SMALL)
    assert found.images[0].tobytes() == wanted.images[0].tobytes()


SMALL = {"seed": 1, "steps": 1, "sampler": "euler", "width": 64, "height": 64}


def test_a_ckpt_overwritten_after_it_was_loaded_is_found(tmp_path, tiny_family):
    single_file(tmp_path / "x.safetensors", FAMILY)
    path = saved(tmp_path / "x.ckpt", {"state_dict": load_file(tmp_path / "x.safetensors")})
    model = load_model(path, device="cpu", dtype="float32")
    with path.open("r+b") as f:
        f.seek(path.stat().st_size // 2)
        f.write(b"\1" * 4096)
    refused(lambda: model.generate("a", **SMALL), "overwritten")


# --- what is refused -----------------------------------------------------------------------------


class Stored:
    """A hand-made storage in a pickle."""

    def __init__(self, count=2, key="0", kind=torch.FloatStorage, tag="storage"):
        self.told = (tag, kind, key, "cpu", count)


class Called:
    """A hand-made call in a pickle."""

    def __init__(self, function, *arguments, state=None):
        self.reduced = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.reduced


def tensor(count=2, offset=0, shape=(2,), stride=(1,), **how):
    return Called(
        torch._utils._rebuild_tensor_v2,
        *(Stored(count, **how), offset, shape, stride, False, collections.OrderedDict()),
    )


def pickled(content, protocol=2) -> bytes:
    out = io.BytesIO()

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj):
            return obj.told if isinstance(obj, Stored) else None

    Pickler(out, protocol).dump(content)
    return out.getvalue()


def archived(path, program, records=None, extra=(), compress=zipfile.ZIP_STORED) -> Path:
    """Return an archive as torch.save writes it. extra: more entries, or replaced ones."""
    records = {"0": b"\0" * 8} if records is None else records
    entries = [("x/data.pkl", program), ("x/byteorder", b"little")]
    entries += [(f"x/data/{key}", content) for key, content in records.items()]
    entries += [("x/version", b"3\n"), *extra]
    with zipfile.ZipFile(path, "w", compress) as file:
        for name, content in entries:
            file.writestr(zipfile.ZipInfo(name), content, compress)
    return path


def by_hand(tmp_path, content, **how):
    return archived(tmp_path / "x.ckpt", pickled(content), **how)


def test_a_pickle_by_hand_is_read(tmp_path):
    assert read(by_hand(tmp_path, {"a": tensor()}))["a"].tolist() == [0.0, 0.0]


def touch(path) -> str:
    return f"open({str(path)!r}, 'w').close()"


def gadgets(canary: Path) -> dict[str, object]:
    """Return contents that would create the canary's file when they are unpickled."""
    code, command = touch(canary), f"touch {shlex.quote(str(canary))}"
    inner = pickle.dumps(Called(os.system, command))
    return {
        "os.system": Called(os.system, command),
        "exec": Called(exec, code),
        "eval": Called(eval, f"exec({code!r})"),
        "in the state dict": {"state_dict": {"a": tensor(), "b": Called(exec, code)}},
        "deep inside": {"a": [({"b": [Called(os.system, command)]},)]},
        "beside the state dict": {"state_dict": {"a": tensor()}, "callbacks": Called(exec, code)},
        "as a key": {Called(os.path.join, "a", "b"): 1, "a": Called(exec, code)},
        "open": Called(open, str(canary), "w"),
        "Path.touch": Called(Path.touch, Path(canary)),
        "os.mkdir": Called(os.mkdir, str(canary)),
        "getattr": Called(getattr, os, "system") if False else Called(getattr, Named, "x"),
        "a pickle in a pickle": Called(pickle.loads, inner),
        "torch's own": Called(torch.storage._load_from_bytes, inner),
        "torch.load": Called(torch.load, str(canary)),
        "as attributes": Called(collections.OrderedDict, state=Called(exec, code)),
        "in a tensor": {
            "a": Called(
                torch._utils._rebuild_tensor_v2,
                *(Stored(), 0, (2,), (1,), False, Called(exec, code)),
            )
        },
        "in a storage": {"a": tensor(key=Called(exec, code))},
        "as a wrapper of a tensor": Called(
            torch._utils._rebuild_parameter, Called(exec, code), False, collections.OrderedDict()
        ),
        "a new object": Named(),
        "an ordered dict of it": Called(collections.OrderedDict, [("a", Called(exec, code))]),
    }


@pytest.mark.parametrize("which", list(gadgets(Path("x"))))
def test_no_gadget_runs(tmp_path, which):
    canary = tmp_path / "canary"
    for protocol in (2, 4):
        for name in NAMES:
            path = archived(tmp_path / name, pickled(gadgets(canary)[which], protocol))
            refused(lambda path=path: header_of(path))
        refused(lambda path=path: load_model(path, device="cpu"))
    assert not canary.exists()


def test_the_canaries_sing(tmp_path):
    """The gadgets are real: Python's own reader runs them."""
    alive = 0
    for which in gadgets(tmp_path):
        canary = tmp_path / f"canary {alive}"
        content = gadgets(canary)[which]
        if which == "open" or any(w in which for w in ("tensor", "storage", "state dict")):
            continue  # these need storages, which pickle.loads does not know
        try:
            pickle.loads(pickled(content))
        except Exception:
            continue
        alive += canary.exists()
    assert alive >= 7


def test_code_is_refused_with_the_way_out(tmp_path):
    path = by_hand(tmp_path, {"a": Called(os.system, "true")})
    refused(lambda: header_of(path), "x.ckpt: holds code (posix.system)", "safetensors")


def test_a_bare_pickle_is_refused(tmp_path):
    for protocol in range(6):
        path = tmp_path / "x.ckpt"
        path.write_bytes(pickle.dumps({"a": [0] * 99}, protocol))
        refused(lambda path=path: header_of(path))


def hostile_contents():
    huge = 2**62
    return {
        "a list": ([1, "a"], "no tensors"),
        "a text": ("a", "not a table"),
        "a tensor": (tensor(), "not a table"),
        "no tensors": ({"a": 1}, "no tensors"),
        "nothing": ({}, "no tensors"),
        "a missing storage": ({"a": tensor(key="1")}, "not all in the file"),
        "a storage elsewhere": ({"a": tensor(key="../data.pkl")}, "not all in the file"),
        "a longer storage": ({"a": tensor(3, shape=(3,))}, "not all in the file"),
        "a shorter storage": ({"a": tensor(1, shape=(1,))}, "not all in the file"),
        "a huge storage": ({"a": tensor(huge, shape=(huge,))}, "not all in the file"),
        "a larger tensor": ({"a": tensor(shape=(3,))}, "larger than its bytes"),
        "a huge tensor": ({"a": tensor(shape=(huge, huge))}, "a tensor of shape"),
        "a stride of 0": ({"a": tensor(shape=(2**40,), stride=(0,))}, "larger than its bytes"),
        "a stride beyond": ({"a": tensor(shape=(2,), stride=(9,))}, "larger than its bytes"),
        "a negative stride": ({"a": tensor(stride=(-1,))}, "stride"),
        "a negative shape": ({"a": tensor(shape=(-2,))}, "shape"),
        "a negative offset": ({"a": tensor(offset=-1)}, "larger than"),
        "an offset beyond": ({"a": tensor(offset=1)}, "larger than its bytes"),
        "another offset": ({"a": tensor(offset="0")}, "without a storage"),
        "a shape of texts": ({"a": tensor(shape=("2",))}, "whole numbers"),
        "a shape of truths": ({"a": tensor(shape=(True,))}, "whole numbers"),
        "more dimensions": ({"a": tensor(shape=(1,) * 99, stride=(1,) * 99)}, "shape"),
        "strides for another": ({"a": tensor(shape=(2,), stride=(1, 1))}, "stride"),
        "a complex storage": ({"a": tensor(1, kind=torch.ComplexFloatStorage)}, "holds code"),
        "a quantized storage": ({"a": tensor(8, kind=torch.QInt8Storage)}, "holds code"),
        "no storage": ({"a": tensor(tag="module")}, "does not write"),
        "bytes of memory": (Called(bytearray, 2**40), "holds code (__builtin__.bytearray)"),
        "a set": ({"a": {1, 2}}, ""),
        "a complex number": ({"a": 1j}, "holds code"),
        "tables without end": (nested(40), "no tensors"),
        "tables that share": (bomb(), "without end"),
        "keys that join to one": ({"a.b": tensor(), "a": {"b": tensor()}}, "there twice"),
        "a dtype": ({"a": torch.float32}, "holds code"),
        "counted": ({"a": collections.Counter("aab")}, "holds code"),
    }


def nested(depth):
    return {"a": nested(depth - 1)} if depth else {"a": tensor()}


def bomb():
    """Return a few tables, each several times in the next: 10⁴ paths for each level."""
    table = {str(i): 0 for i in range(300)}
    for _ in range(3):
        table = {str(i): table for i in range(300)}
    return table


@pytest.mark.parametrize("which", list(hostile_contents()))
def test_hostile_tables_are_refused(tmp_path, which):
    content, *words = hostile_contents()[which]
    path = by_hand(tmp_path, content)
    refused_cheaply(lambda: header_of(path), *words)


GOOD = pickled({"a": tensor()})
PROGRAMS = {
    "empty": b"",
    "no end": GOOD[:-1],
    "cut": GOOD[: len(GOOD) // 2],
    "noise": bytes(range(256)),
    "another protocol": b"\x80\x04" + GOOD[2:],
    "nothing on the stack": b"\x80\x02.",
    "a mark too few": b"\x80\x02}u.",
    "an absent memo": b"\x80\x02h\x09.",
    "steps without end": b"\x80\x02" + b"N" * (MAX_STEPS + 9) + b".",
    "text that is no text": b"\x80\x02}X\x02\x00\x00\x00\xff\xffNs.",
    "half a surrogate": b"\x80\x02}X\x03\x00\x00\x00\xed\xa0\x80Ns.",
    "the same key twice": GOOD[:-1].replace(b"}q\x00", b"}q\x00X\x01\x00\x00\x00aNs", 1) + b".",
    "a length beyond": b"\x80\x02X\xff\xff\xff\x7f.",
    "a long number": b"\x80\x02\x8b\xff\xff\xff\x7f.",
    "a global without a name": b"\x80\x02cos\n\n.",
    "a global across lines": b"\x80\x02c\n\n.",
    "a storage of nothing": b"\x80\x02)Q.",
    "extension codes": b"\x80\x02\x82\x01.",
    "an instance": b"\x80\x02(ios\nsystem\n.",
    "an object": b"\x80\x02(cos\nsystem\no.",
    "itself inside": b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s.",
}  # fmt: skip


@pytest.mark.parametrize("which", list(PROGRAMS))
def test_broken_programs_are_refused(tmp_path, which):
    path = archived(tmp_path / "x.ckpt", PROGRAMS[which])
    refused_cheaply(lambda: header_of(path))


ENTRIES = {
    "a name that climbs": ([("x/../../evil", b"")], "leads out"),
    "a name that climbs inside": ([("x/data/../../evil", b"")], "leads out"),
    "an absolute name": ([("/etc/evil", b"")], ""),
    "a backslash": ([("x/data\\..\\evil", b"")], "leads out"),
    "a second folder": ([("y/data.pkl", GOOD)], "one folder"),
    "a second pickle": ([("x/data.pkl", GOOD)], "twice"),
    "a second storage": ([("x/data/0", b"\0" * 8)], "twice"),
    "a program": ([("x/code/__torch__.py", b"")], "TorchScript"),
    "constants": ([("x/constants.pkl", GOOD)], "TorchScript"),
    "an export": ([("x/models/model.json", b"{}")], "nothing that torch.save writes"),
    "big-endian numbers": ("big", "little-endian"),
}


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("which", list(ENTRIES))
def test_odd_archives_are_refused(tmp_path, which):
    extra, word = ENTRIES[which]
    path = tmp_path / "x.ckpt"
    if extra == "big":
        archived(path, GOOD)
        content = path.read_bytes()
        whole = content.replace(b"little", b"biggie")
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("x/data.pkl", GOOD)
            file.writestr("x/byteorder", "big")
        assert whole != content
    else:
        archived(path, GOOD, extra=extra)
    refused_cheaply(lambda: header_of(path), word)


def test_compressed_entries_are_refused_before_they_are_unpacked(tmp_path):
    bomb = pickled({"a": "x" * 10**8})
    path = archived(tmp_path / "x.ckpt", bomb, compress=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 10**6
    del bomb
    refused_cheaply(lambda: header_of(path), "compressed")


def test_a_pickle_that_is_too_long_is_refused(tmp_path):
    path = archived(tmp_path / "x.ckpt", GOOD + b"." * archive.MAX_PICKLE)
    refused_cheaply(lambda: header_of(path), "data.pkl of")


def test_a_list_of_entries_without_end_is_refused_unread(tmp_path):
    path = archived(tmp_path / "x.ckpt", GOOD)
    content = bytearray(path.read_bytes())
    struct.pack_into("<I", content, len(content) - 10, 2**31)
    path.write_bytes(content)
    refused_cheaply(lambda: header_of(path), "list of entries")


def test_many_entries_are_refused(tmp_path):
    extra = [(f"x/data/{i + 1}", b"") for i in range(archive.MAX_ENTRIES)]
    path = archived(tmp_path / "x.ckpt", GOOD, extra=extra)
    refused(lambda: header_of(path), "entries")


def test_a_file_cut_short_anywhere_is_refused(tmp_path):
    content = archived(tmp_path / "x.ckpt", GOOD).read_bytes()
    for length in range(0, len(content), 7):
        path = tmp_path / "cut.ckpt"
        path.write_bytes(content[:length])
        refused(lambda path=path: header_of(path))


def test_overlapping_entries_are_refused(tmp_path):
    """Two names share the same bytes: a small file would read as a large one."""
    path = archived(tmp_path / "x.ckpt", GOOD, {"0": b"\0" * 8, "1": b"\0" * 8})
    content = path.read_bytes()
    with zipfile.ZipFile(path) as file:
        first, second = (file.getinfo(f"x/data/{i}").header_offset for i in (0, 1))
    # In the list, the second entry gets the first one's place, whose own name is the first's.
    at = content.rindex(struct.pack("<I", second))
    moved = content[:at] + struct.pack("<I", first) + content[at + 4 :]
    path.write_bytes(moved)
    refused(lambda: header_of(path))


def test_every_flipped_byte_is_refused_or_harmless(tmp_path):
    """Each gives one line of error or the same table; none runs code or takes long."""
    content = archived(tmp_path / "x.ckpt", GOOD).read_bytes()
    path, read_equal, lines = tmp_path / "flipped.ckpt", 0, []
    for at in range(len(content)):
        flipped = bytearray(content)
        flipped[at] ^= 0x55
        path.write_bytes(flipped)
        try:
            found = read(path)
        except SafelightError as error:
            lines.append(str(error))
        else:
            assert all(tensor.numel() <= 2 for tensor in found.values())
            read_equal += 1
    assert max(map(len, lines)) <= 200
    assert read_equal < len(content) // 2


def test_a_file_that_changes_between_header_and_tensors_is_refused(tmp_path):
    path = saved(tmp_path / "x.ckpt", TENSORS)
    header = header_of(path)
    saved(path, {**TENSORS, "a.bias": torch.ones(3)})
    with pytest.raises(SafelightError, match="changed"), open_tensors(header) as get:
        get("a.bias")


def test_an_adapter_of_torch_save_is_opened_and_one_with_code_is_not(tmp_path):
    tensors = {"lora_unet_x.lora_down.weight": torch.ones(2, 4)}
    assert (
        open_adapter(saved(tmp_path / "eyes.pt", tensors)).header.tensors.keys() == tensors.keys()
    )
    path = archived(tmp_path / "code.pt", pickled({"a": Called(os.system, "true")}))
    refused(lambda: open_adapter(path), "code.pt: holds code")
