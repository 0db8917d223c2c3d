"""`verify` says 0, or by how much a picture may differ and why."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import save_file

import safelight
from safelight import cli, machine
from safelight.engine import Engine
from safelight.errors import SafelightError
from safelight.recipe import read_recipe
from safelight.request import Request
from safelight.weights import find, library
from weights_tiny import text_folder

ASKED = {"steps": 3, "sampler": "euler_a", "width": 64, "height": 64, "seed": 7}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(text_folder(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def made(request, folder, tmp_path_factory):
    """Return a picture drawn alone, and one of the same request drawn with others."""
    out = tmp_path_factory.mktemp("out")
    model = safelight.load(folder, device="cpu", dtype=request.param)
    model.generate("a", **ASKED).save(out / "alone.png")
    engine = Engine(model, exact=False, rows=16)
    results = [
        engine.add(Request(prompt="a", **ASKED | {"seed": seed}), seed) for seed in (7, 8, 9)
    ]
    while engine.busy:
        for ticket in engine.step()[1]:
            if ticket.tag == 7:
                results[0].images.append(ticket.image)
    results[0].save(out / "company.png")
    return out


@pytest.fixture
def here(made, tmp_path, monkeypatch):
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def verify(folder, capsys):
    def run(name):
        code = cli.run(["verify", name, "--model", folder])
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def rewrite(name, change=lambda recipe: recipe, shift=0):
    """Write a PNG again with another recipe and one changed pixel."""
    recipe = change(read_recipe(name))
    with Image.open(name) as image:
        image.load()
    r, *rest = image.getpixel((1, 1))
    image.putpixel((1, 1), (r + shift if r + shift < 256 else r - shift, *rest))
    texts = PngImagePlugin.PngInfo()
    texts.add_text("safelight", json.dumps(recipe))
    image.save(name, pnginfo=texts)


def with_drawn(**change):
    return lambda recipe: {**recipe, "drawn": {**recipe["drawn"], **change}}


def test_a_recipe_says_how_and_where_it_was_drawn(here):
    for name, exact in (("alone.png", True), ("company.png", False)):
        drawn = read_recipe(name)["drawn"]
        assert drawn == {"exact": exact, **machine.describe_machine(torch.device("cpu"))}
        assert set(drawn) == {"exact", "instructions", "processor", "threads", "torch", "kernels"}
        assert drawn["torch"] == torch.__version__
        assert drawn["threads"] == torch.get_num_threads()
        assert "onednn" in drawn["kernels"]


def test_a_picture_drawn_alone_is_equal(here, verify):
    assert verify("alone.png") == (0, "0\n", "")


def test_a_picture_drawn_in_company_is_within_the_bound_that_is_stated(here, verify):
    code, said, _ = verify("company.png")
    assert code == 0
    assert int(said) <= machine.COMPANY[read_recipe("company.png")["dtype"]]
    rewrite("company.png", shift=1)
    code, said, why = verify("company.png")
    assert (code, int(said)) in ((0, 0), (0, 1), (0, 2))
    if int(said):
        assert "drawn in company" in why
        assert "of 255" in why
    rewrite("company.png", shift=100)
    assert verify("company.png")[0] == 1


def test_nothing_explains_that_a_picture_drawn_alone_differs(here, verify):
    rewrite("alone.png", shift=1)
    assert verify("alone.png") == (1, "1\n", "nothing in the recipe explains a difference\n")


def test_a_difference_of_machine_is_named(here, verify):
    rewrite("alone.png", with_drawn(processor="arm64 Chip", torch="2.10.0"), shift=50)
    code, said, why = verify("alone.png")
    assert (code, said) == (1, "50\n")
    assert "the processor was arm64 Chip, and " in why
    assert f"the version of PyTorch was 2.10.0, and {torch.__version__} here" in why
    assert why.count("\n") == 1


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"safelight": "0.0.1"}, "the version of Safelight was 0.0.1, and"),
        ({"instructions": "AVX512 amx_bf16"}, "the instruction set was AVX512 amx_bf16, and"),
        ({"processor": "arm64 Chip"}, "the processor was arm64 Chip, and"),
        ({"threads": 4096}, "the number of threads was 4096, and"),
        ({"torch": "2.10.0"}, "the version of PyTorch was 2.10.0, and"),
        ({"kernels": "torch"}, "the kernels were torch, and"),
        ({"dtype": "float16"}, "the precision was float16, and"),
        ({"device": "cuda"}, "the device was cuda, and"),
    ],
)
def test_whatever_differs_has_a_name_and_no_bound(change, told, exact):
    same = {"safelight": "0.1.0", "device": "cpu", "dtype": "bfloat16"}
    same |= machine.describe_machine(torch.device("cpu"))
    bound, why = machine.expected_difference({**same, "exact": exact, **change}, same, "bfloat16")
    assert bound is None
    assert told in why
    bound, why = machine.expected_difference({**same, "exact": exact}, same, "bfloat16")
    assert bound == (0 if exact else machine.COMPANY["bfloat16"])


def test_a_picture_that_is_equal_needs_no_explanation(here, verify):
    rewrite("alone.png", with_drawn(torch="2.10.0", processor="another"))
    assert verify("alone.png") == (0, "0\n", "")


def test_a_recipe_that_does_not_say_is_told_so(here, verify):
    rewrite("alone.png", lambda r: {k: v for k, v in r.items() if k != "drawn"}, shift=9)
    code, _, why = verify("alone.png")
    assert code == 1
    assert "does not say what machine" in why


def test_it_draws_with_as_many_threads_as_were_recorded(monkeypatch):
    monkeypatch.setattr(machine.os, "cpu_count", lambda: 2)
    before = torch.get_num_threads()
    for recorded, used in ((1, 1), (2, 2), (3, before), (0, before), (-1, before), (10**9, before)):
        with machine.threads_of({"threads": recorded}):
            assert torch.get_num_threads() == used
        assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    "drawn",
    [
        None,
        [],
        "x",
        {},
        {"threads": True},
        {"threads": 10**400},
        {"threads": "2"},
        {"threads": -1},
        {"exact": 1},
        {"exact": None, "torch": ["2"]},
        {"torch": "9" * 10**5},
        {"processor": "\x1b[31m\n"},
        {"unknown": {"deep": [[[]]]}},
    ],
)
def test_a_strangers_recipe_may_say_anything(drawn):
    recorded = machine.recorded_machine({"drawn": drawn})
    with machine.threads_of(recorded):
        pass
    here = machine.describe_machine(torch.device("cpu"))
    _, why = machine.expected_difference(recorded, here, "float32")
    assert len(why) < 1000


@pytest.mark.parametrize(
    "path",
    ["/etc/passwd", "../other", "..", "~/model", "./here", "a/b c/d", "models/secret", "secret"],
)
@pytest.mark.parametrize("key", ["model", "vae", "refiner"])
def test_a_strangers_recipe_names_no_file(capsys, here, key, path):
    """What lies at a path is not opened, though the path looks like a name or a hub id."""
    (here / "models").mkdir()
    for secret in (here / "models" / "secret", here / "secret"):
        secret.write_text("a secret of this machine")
    known = {"model": {"name": "embedded", "sha256": "0" * 64}}
    rewrite("alone.png", lambda old: old | known | {key: {"name": path, "sha256": "0" * 64}})
    assert cli.run(["verify", "alone.png"]) == 2
    assert f"{key} {path!r} is in no models folder, and is not" in capsys.readouterr().err


def test_a_strangers_vae_named_like_a_built_in_model_is_no_file(capsys, here):
    (here / "embedded").write_text("a secret of this machine")
    named = {"name": "embedded", "sha256": "0" * 64}
    rewrite("alone.png", lambda old: old | {"model": named, "vae": named})
    assert cli.run(["verify", "alone.png"]) == 2
    assert "vae 'embedded' is in no models folder" in capsys.readouterr().err


def test_a_folder_here_comes_before_one_of_the_models_folder(folder, here, capsys):
    """That is how it was drawn, too."""
    shutil.copytree(folder, "tiny")
    other = here / "lib" / "Stable-diffusion" / "tiny.safetensors"
    other.parent.mkdir(parents=True)
    save_file({"a": torch.zeros(1)}, other)
    safelight.load("tiny", device="cpu", dtype="float32").generate("a", **ASKED).save("b.png")
    assert cli.run(["verify", "b.png", "--models-dir", "lib"]) == 0
    assert capsys.readouterr().out == "0\n"


def test_a_given_prediction_type_is_in_the_recipe(folder, tmp_path, monkeypatch, verify):
    monkeypatch.chdir(tmp_path)
    for given in (None, "v_prediction"):
        model = safelight.load(folder, device="cpu", dtype="float32", prediction_type=given)
        model.generate("a", **ASKED).save(f"{given}.png")
        assert read_recipe(f"{given}.png").get("prediction_type") == given
        assert verify(f"{given}.png") == (0, "0\n", "")
    rewrite("v_prediction.png", lambda recipe: recipe | {"prediction_type": ["v"]})
    code, _, told = verify("v_prediction.png")
    assert (code, "expected one of epsilon" in told) == (2, True)


def test_a_model_of_the_hub_is_not_searched_in_other_files(folder, here, capsys, monkeypatch):
    """Else every file of the models folder is hashed, which takes minutes."""
    cached = {"org/tiny": Path(folder)}

    def from_hub(name, *_, download, **__):
        if download or str(name) not in cached:
            raise SafelightError(f"{name} is not in the hub cache")
        return cached[str(name)]

    def hashed(*_):
        raise AssertionError("it read all files of the models folder")

    monkeypatch.setattr(find, "from_hub", from_hub)
    monkeypatch.setattr(library.Library, "by_hash", hashed)
    (here / "lib").mkdir()
    sha256 = read_recipe("alone.png")["model"]["sha256"]
    named = {"model": {"name": "org/tiny", "sha256": sha256}}
    rewrite("alone.png", lambda recipe: recipe | named)
    cli.run(["verify", "alone.png", "--models-dir", "lib"])
    assert capsys.readouterr().out == "0\n"
    cached.clear()
    with pytest.raises(AssertionError, match="it read all files"):
        cli.run(["verify", "alone.png", "--models-dir", "lib"])


def test_loras_are_found_by_hash(folder, tmp_path, capsys, monkeypatch):
    """They are found by --lora, or in the models folder by any name; a recipe has no path."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    path = tmp_path / "ink.safetensors"
    down, up = torch.randn(2, 64), torch.randn(64, 2)
    save_file({f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}, path)
    model = safelight.load(folder, device="cpu", dtype="float32")
    model.generate("a", loras=[f"{path}:0.5"], **ASKED).save("a.png")
    (tmp_path / "own" / "Lora").mkdir(parents=True)
    moved = path.rename(tmp_path / "own" / "Lora" / "another.safetensors")

    def verify(*more):
        code = cli.run(["verify", "a.png", "--model", folder, *more])
        said = capsys.readouterr()
        return code, said.out.strip(), said.err

    assert verify("--models-dir", "own")[:2] == (0, "0")
    assert verify("--lora", str(moved))[:2] == (0, "0")
    code, _, told = verify()
    assert code == 2
    assert "lora ink of SHA-256" in told
    save_file({f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": 2 * up}, moved)
    assert verify("--models-dir", "own")[0] == 2
