"""Upscalers: their files, tiles, sizes, recipes and the command line."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch._subclasses.fake_tensor import FakeTensorMode

import safelight
import upscalers_tiny as tiny
from safelight.cli import run
from safelight.errors import SafelightError
from safelight.picture import largest_difference, open_picture, save_png
from safelight.recipe import read_recipe, read_texts
from safelight.upscaling import names, network, tiles, upscaler
from safelight.upscaling.record import checked, noted
from safelight.upscaling.upscaler import Upscaler, load_upscaler, upscaled
from safelight.weights import inspect
from safelight.weights.catalog import catalog
from safelight.weights.kinds import kind_of
from safelight.weights.library import Library
from weights_tiny import refused


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A models folder with two upscalers, as ComfyUI and A1111 keep them."""
    root = tmp_path_factory.mktemp("models")
    for place in ("upscale_models", "ESRGAN"):
        (root / place).mkdir()
    tiny.saved(root / "upscale_models" / "4x-Tiny.pth", tiny.esrgan())
    save_file(tiny.compact().state_dict(), root / "ESRGAN" / "RealESRGAN_x2plus.safetensors")
    return root


@pytest.fixture(scope="module")
def four(folder) -> Upscaler:
    return load_upscaler("4x-Tiny", models_dir=folder, device="cpu")


@pytest.fixture(scope="module")
def two(folder) -> Upscaler:
    return load_upscaler("RealESRGAN_x2plus", models_dir=folder, device="cpu")


def tensor(height: int, width: int) -> torch.Tensor:
    return torch.rand((1, 3, height, width), generator=torch.Generator().manual_seed(3))


# --- networks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", tiny.ALL)
def test_each_layout_is_read_as_spandrel_reads_it(tmp_path, kind):
    made = tiny.ALL[kind]()
    before = torch.random.get_rng_state()
    loaded = load_upscaler(tiny.saved(tmp_path / "x.pth", made), device="cpu")
    assert torch.equal(torch.random.get_rng_state(), before)  # nobody's seed changes
    direct = network.library().ModelLoader().load_from_state_dict(made.state_dict())
    picture = tensor(16, 24)
    assert torch.equal(loaded.call(picture), direct(picture))
    assert (loaded.architecture, loaded.scale) == (kind, direct.scale)


def test_a_file_is_read_however_it_was_saved(tmp_path):
    state = tiny.esrgan().state_dict()
    other = {key: tensor + 1 for key, tensor in state.items()}
    files = {
        "plain": state,
        "averaged": {"params": other, "params_ema": state},
        "wrapped": {"model": {f"module.{key}": value for key, value in state.items()}}["model"],
        "model": {"model": tiny.new_names(state)},
        "half": {key: tensor.half() for key, tensor in state.items()},
    }
    seen = tensor(12, 12)
    expected = tiny.esrgan()(seen).detach().clamp(0, 1)
    for name, content in files.items():
        for old in (False, True):
            path = tmp_path / f"{name}.pth"
            torch.save(content, path, _use_new_zipfile_serialization=not old)
            made = load_upscaler(path, device="cpu").call(seen)
            assert (made - expected).abs().max() < (2e-3 if name == "half" else 1e-6), name


def test_torchvision_is_neither_loaded_nor_left_behind():
    assert not any(name.startswith("torchvision") for name in sys.modules)


# --- tiles ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [8, 128, 129, 200, 500, 1000])
def test_tiles_cover_a_side_and_their_weights_add_up_to_one(length):
    for scale in (1, 2, 4):
        total = torch.zeros(length * scale)
        for span in tiles.spans(length, 128):
            assert span.stop - span.start <= 128
            assert span.start % tiles.ALIGNED == 0
            counts = tiles.weights(span, length, scale)
            total[span.start * scale : span.stop * scale] += counts
            # What is mixed in is far enough from the tile's own edges.
            used = counts.nonzero().flatten() // scale + span.start
            inner = tiles.OVERLAP - tiles.BLEND
            assert span.start == 0 or used.min() >= span.start + inner
            assert span.stop == length or used.max() < span.stop - inner
        assert torch.allclose(total, torch.ones_like(total), atol=1e-6)


def in_tiles(call, picture: torch.Tensor, scale: int, tile: int | None) -> list[torch.Tensor]:
    """Return the rows that a picture comes in."""
    rows: list[torch.Tensor] = []
    work = tiles.Tiled(call, picture, scale, rows.append, tile)
    while work.left:
        work.step()
    return rows


@pytest.mark.parametrize("height", [150, 195])  # in the second the last row is 3 pixels high
def test_tiles_make_what_the_whole_picture_makes(two, height):
    # Of this network a pixel looks 4 pixels far, which the overlap covers.
    picture = tensor(height, 260)
    rows = in_tiles(two.call, picture, two.scale, 128)
    assert len(rows) == -(-height // 64)
    whole = two.call(picture)
    assert (torch.cat(rows, -2) - whole).abs().max() < 1e-6
    assert torch.equal(in_tiles(two.call, picture, two.scale, None)[0], whole)
    # What is kept does not grow with the height.
    assert max(part.shape[-2] for part in rows) <= 128 * two.scale


def test_tiles_of_another_device_are_put_together_on_the_pictures():
    """Stands for a GPU: a fake one, which knows devices and computes nothing."""
    with FakeTensorMode():
        made = in_tiles(
            lambda seen: torch.nn.functional.interpolate(seen.to("cuda:0"), scale_factor=2),
            torch.zeros(1, 3, 150, 260), 2, 128,
        )  # fmt: skip
    assert {part.device.type for part in made} == {"cpu"}


def test_a_picture_says_how_far_it_is(two):
    told = []
    picture = tiny.picture(200, 100)
    large = two.upscale(picture, tile=128, on_tile=lambda made, all_: told.append((made, all_)))
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert largest_difference(large, two.upscale(picture)) <= 1


# --- sizes ---------------------------------------------------------------------------------------


def test_sizes_are_met_by_more_passes_and_by_lanczos(two):
    picture = tiny.picture()
    once = two.upscale(picture)
    assert once.size == (48, 32)
    assert two.upscale(picture, 1.5) == once.resize((36, 24), Image.Resampling.LANCZOS)
    assert two.upscale(picture, 4) == two.upscale(once)
    assert two.upscale(picture, size=(70, 40)).size == (70, 40)
    assert upscaled(picture, None, (70, 40)).size == (70, 40)


def test_what_is_too_large_is_refused_before_any_work(four):
    picture = Image.new("RGB", (7000, 2000))
    for scale, why in [
        (2.5, "would be 17500x5000: "),
        (2, "at most 200 million pixels are made; give a smaller picture, or a network that"),
        (0, "scale must be above 0 and at most 16, not 0"),
        (17, "scale must be above 0"),
        (float("nan"), "scale must be above 0"),
        (0.001, "would be 7x2: "),
    ]:
        with pytest.raises(SafelightError, match=why):
            four.begin(picture, scale)
    with pytest.raises(SafelightError, match="tile must be at least 128, not 64"):
        four.begin(tiny.picture(), tile=64)


def test_too_little_memory_is_told(four, monkeypatch):
    def full(*_):
        raise MemoryError

    monkeypatch.setattr(four, "_network", full)
    with pytest.raises(SafelightError, match="4x-Tiny needs more memory than is free") as told:
        four.upscale(tiny.picture())
    assert told.value.code == "out_of_memory"


# --- hostile files -------------------------------------------------------------------------------


def hostile() -> dict[str, tuple[dict, str]]:
    state = tiny.esrgan().state_dict()

    def shuffled(features: int, scale: int) -> dict[str, torch.Tensor]:
        last = torch.zeros(3 * scale * scale, features, 1, 1)
        first = torch.zeros(features, 3, 3, 3)
        slope = torch.zeros(features)
        return {"body.0.weight": first, "body.0.bias": slope, "body.1.weight": slope,
                "body.2.weight": last, "body.2.bias": last[:, 0, 0, 0]}  # fmt: skip

    nan = {key: tensor.clone() for key, tensor in state.items()}
    nan["model.0.bias"][0] = float("nan")
    missing = {key: tensor for key, tensor in state.items() if key != "model.3.weight"}
    layers = {**state, "model.2999.weight": state["model.0.weight"]}
    return {
        "nothing known": ({"a": torch.zeros(3)}, "none of spandrel's architectures"),
        "no numbers": (nan, "NaN"),
        "a weight is missing": (missing, "not a known upscaler"),
        "a long number": ({**state, "model.12345.weight": torch.zeros(1)}, "five digits"),
        "thousands of layers": (layers, "not a known upscaler"),
        "many features": (
            {**state, "model.0.weight": torch.zeros(9000, 3, 1, 1)},
            "no upscaler: its network would be far larger than its file",
        ),
        "a large scale": (shuffled(4, 40), "not a known upscaler"),
        "no values": (
            {
                **tiny.swinir().state_dict(),
                "layers.0.residual_group.blocks.0.attn_mask": torch.zeros(4, 0, 0),
            },
            "has no values",
        ),
        "gray": (tiny.compact(channels=1).state_dict(), "reads 1 channels and makes 1"),
    }


@pytest.mark.parametrize("case", range(9))
def test_a_hostile_file_is_refused_in_a_line(tmp_path, case):
    content, why = [*hostile().values()][case]
    torch.save(content, tmp_path / "x.pth")
    refused(lambda: load_upscaler(tmp_path / "x.pth", device="cpu"), why)


def test_a_network_may_not_take_more_memory_than_its_file():
    far_larger = pytest.raises(SafelightError, match="would be far larger than its file")
    with network._Bounded(2**23):
        for _ in range(20):
            torch.zeros(2**20).clone()  # what is freed does not count
        kept = [torch.zeros(2**19)]
        long = torch.arange(2**19)
        # Terabytes, which are refused before they are made.
        for make in (
            lambda: torch.zeros(2**40),
            lambda: long[:, None] - long,
            lambda: long.repeat(2**20),
            lambda: torch.stack([long[:, None].expand(-1, 2**20)] * 2),
        ):
            with far_larger:
                make()
        with far_larger:  # its size depends on values
            torch.ones(2000, 2000, dtype=torch.bool).nonzero()
        kept.append(kept[0].view(2, -1))
        del kept[0]  # its memory lives on in the view
        torch.zeros(2**19)
        with far_larger:
            torch.zeros(2**19 + 1)


def test_code_is_refused(tmp_path):
    class Code:
        def __reduce__(self):
            return os.system, ("true",)

    for old in (False, True):
        content = {"model.0.weight": Code()}
        torch.save(content, tmp_path / "x.pth", _use_new_zipfile_serialization=not old)
        refused(lambda: load_upscaler(tmp_path / "x.pth"), "holds code (posix.system)")


def test_faces_and_holes_are_no_pictures_to_enlarge():
    class Found:
        purpose = "FaceSR"

    with pytest.raises(SafelightError, match="x: no upscaler: a network that restores faces"):
        network._checked(Found, "x")


def test_without_the_library_a_line_says_how_to_get_it(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(names, "find_spec", lambda name: None)
    with pytest.raises(SafelightError, match=r"pip install 'safelight\[upscale\]'") as told:
        load_upscaler("4x-Tiny", models_dir=folder)
    assert told.value.code == "not_installed"
    assert inspect("4x-Tiny", models_dir=folder)["warnings"] == [names.MISSING]


def test_a_library_that_cannot_be_imported_is_told_in_a_line(folder, monkeypatch):
    monkeypatch.setattr(names, "find_spec", lambda name: True)
    monkeypatch.setitem(sys.modules, "spandrel", None)  # as without einops: ImportError
    with pytest.raises(SafelightError, match=r"pip install 'safelight\[upscale\]' \(") as told:
        load_upscaler("4x-Tiny", models_dir=folder)
    assert told.value.code == "not_installed"


# --- names ---------------------------------------------------------------------------------------


def test_upscalers_are_found_listed_and_inspected(folder, tmp_path):
    found = {entry.name for entry in Library(folder).entries("upscaler")}
    assert found == {"4x-Tiny", "RealESRGAN_x2plus"}
    listed = {one.name for one in catalog(Library(folder), everything=True)}
    assert listed >= found
    told = inspect("4x-Tiny", models_dir=folder)
    assert (told["kind"], told["family"], told["scale"]) == ("upscaler", "ESRGAN", 4)
    # In a flat folder, and as a path, a file is known by its tensors.
    for kind, name in (("ESRGAN", "esrgan"), ("RealESRGAN Compact", "compact"), ("SPAN", "span")):
        path = tiny.saved(tmp_path / f"{name}.pth", tiny.ALL[kind]())
        assert inspect(path)["family"] == kind
    assert len(Library(tmp_path).entries("upscaler")) == 3
    # A layout that the list does not know is looked at closer, and so is what fits none.
    path = tiny.saved(tmp_path / "x.pth", tiny.moesr())
    assert inspect(path)["family"] == "MoESR"
    torch.save({"a.weight": torch.zeros(3, 3)}, path)
    refused(lambda: inspect(path), "not a checkpoint")


def test_kinds_of_upscalers_are_told_by_their_names():
    for key in (
        "residual_layer.0.residual_layer.0.layer.0.fn.0.weight", "feats.0.weight",
        "feats.0.norm1.weight", "gblocks.0.weight", "fea_conv.weight", "UFONE.0.ITLs.0.sft.weight",
        "unet1.conv1.conv.0.weight", "body.0.body.0.body.0.weight", "body.0.weight",
    ):  # fmt: skip
        named = {key: torch.zeros(2, 2), "tail.weight": torch.zeros(2, 2, 3, 3)}
        assert kind_of(named) == "upscaler", key


def test_names_of_the_web_ui_mean_their_files(folder):
    assert load_upscaler("R-ESRGAN 2x+", models_dir=folder).name == "RealESRGAN_x2plus"
    with pytest.raises(SafelightError, match="no upscaler 'nothing' in the models folder"):
        load_upscaler("nothing", models_dir=folder)
    with pytest.raises(SafelightError, match="no upscaler 'nothing': no such file here"):
        load_upscaler("nothing")


# --- recipes and the command line ----------------------------------------------------------------


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("drawn") / "apple.png"
    safelight.load(device="cpu", dtype="float32").generate(
        "a red apple", steps=1, width=64, height=64, seed=5
    ).save(path)
    return path


def command(*arguments: object) -> int:
    return run([str(argument) for argument in arguments])


def test_a_picture_keeps_its_recipe_and_is_made_again(drawn, folder, tmp_path, capsys, monkeypatch):
    out = tmp_path / "large.png"
    base = ("upscale", drawn, "--upscaler", "4x-Tiny", "--models-dir", folder, "--device", "cpu")
    assert command(*base, "--scale", 2, "--out", out) == 0
    assert capsys.readouterr().out == f"{out}\n"
    recipe, before = read_recipe(out), read_recipe(drawn)
    (done,) = recipe.pop("upscaled")
    assert recipe == before
    assert (done["name"], done["scale"], done["size"]) == ("4x-Tiny", 2, [128, 128])
    text = read_texts(out)["parameters"]
    assert "Postprocess upscale by: 2, Postprocess upscaler: 4x-Tiny" in text
    direct = load_upscaler("4x-Tiny", models_dir=folder, device="cpu").upscale(drawn, 2)
    assert open_picture(out) == direct

    devices = []
    monkeypatch.setattr(
        upscaler, "pick_device", lambda name: devices.append(name) or torch.device("cpu")
    )
    assert command("verify", out, "--models-dir", folder) == 0
    assert capsys.readouterr().out == "0\n"
    assert devices == ["cpu"]  # the recipe's, not the best of this machine
    assert command("verify", out) == 2
    assert "upscaler 4x-Tiny of SHA-256" in capsys.readouterr().err

    assert command(*base, "--out", out) == 2  # never overwritten
    assert "exists" in capsys.readouterr().err
    again = ("upscale", out, "-u", "lanczos", "--scale", 1.5, "--out", out, "--overwrite")
    assert command(*again) == 0
    assert [one["name"] for one in read_recipe(out)["upscaled"]] == ["4x-Tiny", "Lanczos"]
    capsys.readouterr()
    assert command("verify", out, "--upscaler", folder / "upscale_models" / "4x-Tiny.pth") == 0


def test_several_pictures_are_enlarged(drawn, folder, tmp_path, capsys):
    photo = tmp_path / "photo.jpg"
    tiny.picture().save(photo)
    here = ("--upscaler", folder / "ESRGAN" / "RealESRGAN_x2plus.safetensors", "--device", "cpu")
    assert command("upscale", drawn, photo, *here, "--out", tmp_path, "--json") == 0
    told = json.loads(capsys.readouterr().out)["pictures"]
    assert [Path(one["path"]).name for one in told] == ["apple-upscaled.png", "photo-upscaled.png"]
    with Image.open(tmp_path / "photo-upscaled.png") as made:
        assert made.size == (48, 32)
        assert "upscaler: RealESRGAN_x2plus" in made.info["postprocessing"]
    assert command("upscale", photo, *here, "--out", tmp_path) == 0  # a free name
    assert capsys.readouterr().out.endswith("photo-upscaled-2.png\n")
    for out in (tmp_path / "x.png", tmp_path / "new"):
        code = command("upscale", photo, photo, *here, "--out", out)
        assert code == (2 if out.suffix else 0)
    assert "put {name} into it" in capsys.readouterr().err


def test_a_name_with_braces_is_put_in_as_it_is(tmp_path, capsys):
    photo = tmp_path / "photo{seed}.png"
    tiny.picture().save(photo)
    out = ("-u", "lanczos", "--scale", 2, "--out", tmp_path / "{name}-{seed}.png")
    assert command("upscale", photo, *out) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'photo{seed}-0.png'}\n"


def test_what_was_written_is_told_if_another_picture_fails(folder, tmp_path, capsys, monkeypatch):
    first, second = (tmp_path / f"{name}.png" for name in "ab")
    tiny.picture().save(first)
    tiny.picture(40, 24).save(second)

    def failing(self, picture):
        if picture.shape[-1] == 40:
            raise SafelightError("no memory", code="out_of_memory")
        return call(self, picture)

    call = Upscaler.call
    monkeypatch.setattr(Upscaler, "call", failing)
    arguments = (first, second, "-u", "4x-Tiny", "--models-dir", folder, "--device", "cpu")
    assert command("upscale", *arguments, "--out", tmp_path / "new", "--json") == 2
    told = capsys.readouterr()
    assert [Path(one["path"]).name for one in json.loads(told.out)["pictures"]] == [
        "a-upscaled.png"
    ]
    assert "no memory" in told.err
    # What can be known is checked before the first picture is written.
    monkeypatch.setattr(names, "MAX_MADE", 40 * 24 * 16 - 1)
    assert command("upscale", *arguments, "--out", tmp_path / "other") == 2
    assert "a network that enlarges less" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_another_programs_text_of_our_name_is_left_out(tmp_path, capsys):
    png, out = tmp_path / "x.png", tmp_path / "y.png"
    words = "a cat\nSteps: 4, Sampler: Euler"
    for foreign in ("hello", '{"safelight": "1", "settings": {}, "model": {}}', "x" * 300_000):
        texts = {"safelight": foreign, "parameters": words}
        save_png(tiny.picture(), png, texts, overwrite=True)
        arguments = ("-u", "lanczos", "--scale", 2, "--out", out, "--overwrite")
        assert command("upscale", png, *arguments) == 0
        assert "the recipe of x.png is left out: " in capsys.readouterr().err
        found = read_texts(out)
        assert "safelight" not in found
        assert len(foreign) > 1000 or found["parameters"].startswith(words)


def test_bad_input_is_told_before_the_upscaler_is_loaded(drawn, tmp_path, capsys):
    for arguments, why in [
        ((tmp_path / "no.png", "-u", "x"), "cannot be read"),
        ((drawn, "-u", "x", "--scale", "40"), "scale must be above 0"),
        ((drawn, "-u", "lanczos"), "--scale is missing"),
        ((drawn, "-u", "x", "--out", "a.gif"), "out must be"),
        ((drawn, "-u", drawn), "not a safetensors file"),
        ((drawn, "-u", "x"), "no upscaler 'x'"),
    ]:
        assert command("upscale", *arguments) == 2
        assert why in capsys.readouterr().err


def test_help_needs_neither_pytorch_nor_numpy():
    code = (
        "import sys; from safelight.cli import run; run(['upscale', '--help']);"
        "sys.exit(bool({'torch', 'numpy', 'spandrel'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_texts_of_other_programs_are_kept():
    done = {"name": "x", "scale": 2.0, "size": [4, 4]}
    words = "a cat\nSteps: 4, Sampler: Euler"
    told = "Postprocess upscale by: 2, Postprocess upscaler: x"
    assert noted({"parameters": words}, done) == {"parameters": f"{words}, {told}"}
    assert noted({}, done) == {"postprocessing": told}
    # Earlier pairs are replaced, and words alone get no pairs.
    earlier = 'Postprocess upscale by: 4, Postprocess upscaler: "a, b", Version: 1'
    assert noted({"parameters": f"{words}, {earlier}"}, done)["parameters"] == (
        f"{words}, Version: 1, {told}"
    )
    alone = {"parameters": "a cat, sitting"}
    assert noted(alone, done) == {**alone, "postprocessing": told}
    buffer = io.BytesIO()
    tiny.picture().save(buffer, "JPEG")
    assert read_texts(buffer.getvalue()) == {}


@pytest.mark.parametrize(
    "wrong",
    [
        3, [3], [{}], [{"name": "x", "size": [1]}], [{"name": 3, "size": [8, 8]}],
        [{"name": "x", "size": [8, True]}], [{"name": "x", "size": [8, 8], "sha256": 3}],
        [{"name": "x", "size": [8, 8], "tile": "a"}], [{"name": "x", "size": [8, 8]}] * 9,
        [{"name": "x", "size": [8, 8], "scale": 10**400}],
    ],
)  # fmt: skip
def test_a_strangers_recipe_is_refused(wrong):
    with pytest.raises(SafelightError, match="is not one that Safelight writes"):
        checked({"upscaled": wrong})


@pytest.mark.parametrize("wrong", [5, ["a", "b"], [70], [70, True]])
def test_a_strangers_size_is_refused(wrong):
    with pytest.raises(SafelightError, match="size `enlarged` is not one that Safelight writes"):
        checked({"enlarged": wrong, "upscaled": [{"name": "x", "size": [8, 8]}]})


def test_a_ninth_enlargement_is_refused(drawn, tmp_path):
    texts = read_texts(drawn)
    done = {"name": "x", "scale": 1.0, "size": [64, 64]}
    for _ in range(8):
        texts = noted(texts, done)
    save_png(open_picture(drawn), tmp_path / "x.png", texts)
    assert len(checked(read_recipe(tmp_path / "x.png"))) == 8
    with pytest.raises(SafelightError, match="enlarged 8 times already"):
        noted(texts, done)
