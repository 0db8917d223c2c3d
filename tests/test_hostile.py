"""What a hostile or unlucky user does, from end to end, on checkpoints of a few kilobytes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

import safelight
from safelight import SafelightError, cli
from safelight.cli.output import StepBar
from safelight.picture import open_picture, output_paths
from safelight.recipe import read_recipe
from safelight.request import Request
from safelight.sampling import SAMPLERS
from weights_tiny import NETS, UNET, part_weights, pixel_folder, text_folder, write

FEW = ("--steps", "2", "--sampler", "euler", "--width", "64", "--height", "64")
ONE = {"steps": 1, "sampler": "euler"}


def inpainting_folder(path: Path) -> Path:
    from safetensors.torch import save_file

    text_folder(path, "StableDiffusionInpaintPipeline")
    config = {**UNET, "in_channels": 9}
    write(path / "unet/config.json", config)
    stem = NETS["unet"][3]
    save_file(part_weights("unet", config), path / "unet" / f"{stem}.safetensors")
    return path


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    made = {"text": text_folder(root / "text"), "inpainting": inpainting_folder(root / "painter")}
    made["pixels"] = pixel_folder(root / "pixels")
    return {kind: str(folder) for kind, folder in made.items()}


@pytest.fixture(scope="module")
def model(folders):
    return safelight.load(folders["text"], device="cpu", dtype="float32")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working folder with a picture, a large one, and masks for both."""
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    for name, width, height in (("", 64, 64), ("large-", 225, 200)):
        pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(f"{name}in.png")
        mask = Image.new("L", (width, height))
        mask.paste(255, (width // 4, height // 4, width // 2, height // 2))
        mask.save(f"{name}mask.png")
    return tmp_path


def run(capsys, *arguments):
    code = cli.run(arguments)
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        ("text", ()),
        ("text", ("--image", "in.png")),
        ("text", ("--image", "large-in.png")),
        ("text", ("--image", "in.png", "--mask", "mask.png")),
        ("text", ("--image", "large-in.png", "--mask", "large-mask.png", "--strength", "0.5")),
        ("inpainting", ("--image", "in.png", "--mask", "mask.png")),
        ("inpainting", ("--image", "large-in.png", "--mask", "large-mask.png")),
        ("pixels", ()),
    ],
)
def test_verify_finds_no_difference_until_the_picture_is_edited(kind, given, folders, here, capsys):
    model = ("--model", folders[kind])
    asked = ("--unconditional", *FEW[:4]) if kind == "pixels" else ("a", *FEW)
    made = run(capsys, "generate", *asked, *model, *given, "--seed", "7", "--out", "out.png")
    assert made[:2] == (0, "out.png\n")
    again = [word for word in given if word not in ("--strength", "0.5")]
    assert run(capsys, "verify", "out.png", *model, *again) == (0, "0\n", "")

    with Image.open("out.png") as out:
        texts = PngImagePlugin.PngInfo()
        texts.add_text("safelight", out.text["safelight"])
        r, *rest = out.getpixel((1, 1))
        out.putpixel((1, 1), ((r + 100) % 256, *rest))
        out.save("out.png", pnginfo=texts)
    code, said, _ = run(capsys, "verify", "out.png", *model, *again)
    assert code == 1
    assert int(said) in (100, 156)


@pytest.mark.parametrize("kind", ["text", "inpainting"])
@pytest.mark.parametrize("strength", ["0.5", "1"])
def test_outside_the_mask_the_picture_is_the_original(kind, strength, folders, here, capsys):
    model = ("--model", folders[kind], "--strength", strength)
    files = ("--image", "in.png", "--mask", "mask.png", "--out", "out.png")
    assert run(capsys, "generate", "a", *FEW, *model, *files)[0] == 0
    before, after, mask = (np.asarray(Image.open(f"{n}.png")) for n in ("in", "out", "mask"))
    assert (before[mask == 0] == after[mask == 0]).all()
    assert (before[mask > 0] != after[mask > 0]).any()


def test_count_is_single_runs_byte_for_byte(folders, here, capsys):
    model = ("--model", folders["text"])
    assert run(capsys, "generate", "a", *FEW, *model, "--seed", "5", "--count", "2")[0] == 0
    for seed in ("5", "6"):
        run(capsys, "generate", "a", *FEW, *model, "--seed", seed, "--out", "one.png")
        one = Path("one.png")
        assert one.read_bytes() == Path(f"safelight-{seed}.png").read_bytes()
        one.unlink()


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("corner", [(0, 0), (-1, -1)])
def test_one_nan_of_the_network_is_an_error(sampler, corner, model, monkeypatch):
    """It may be anywhere, also in a part of the picture that is kept."""
    calls = 0
    forward = model.unet.forward

    def broken(*arguments):
        nonlocal calls
        calls += 1
        said = forward(*arguments)
        if calls == 2:
            said[0, 0, corner[0], corner[1]] = float("nan")
        return said

    monkeypatch.setattr(model.unet, "forward", broken)
    image, mask = Image.new("RGB", (64, 64)), Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 32))
    with pytest.raises(SafelightError, match="NaN at step 2"):
        model.generate(
            "a", steps=4, sampler=sampler, guidance_scale=1.0, image=image, mask=mask, strength=1.0
        )


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_refused_and_not_waited_for(here):
    os.mkfifo("pipe")
    with pytest.raises(SafelightError, match="ordinary file"):
        open_picture("pipe")


def test_png_without_a_name_is_no_folder(here):
    with pytest.raises(SafelightError, match=r"must be a folder or a name that ends in \.png"):
        output_paths(".png", [1])


def test_an_empty_model_name_is_not_the_default(here, capsys):
    code, out, err = run(capsys, "generate", "a", "--model", "")
    assert (code, out) == (2, "")
    assert err.startswith("error: no model ''")


def test_a_path_object_names_a_model(tmp_path):
    with pytest.raises(SafelightError, match="no model"):
        safelight.load(tmp_path / "none")


@pytest.mark.parametrize("name", ["image", "mask"])
def test_a_recipe_cannot_bring_a_picture_itself(name):
    settings = {**Request(prompt="a").to_dict(), name: "x"}
    with pytest.raises(SafelightError, match=f"{name} stands in a request as {name}_sha256"):
        Request.from_dict(settings)


def test_a_setting_of_another_program_gets_the_list_of_ours():
    with pytest.raises(SafelightError, match=r"known: prompt, negative_prompt, .*steps"):
        Request(tiling=True)
    with pytest.raises(SafelightError, match=r"'num_inference_steps': did you mean steps\?"):
        Request(num_inference_steps=3)


def test_verify_says_how_to_point_at_a_model_elsewhere(folders, here, capsys):
    run(capsys, "generate", "a", *FEW, "--model", folders["text"], "--out", "out.png")
    code, out, err = run(capsys, "verify", "out.png")
    assert (code, out) == (2, "")
    assert "no model 'text'" in err
    assert "--model" in err


def test_the_longest_prompts_leave_a_short_warning_and_a_recipe_that_reads(model, here):
    longest = "\x01" * 16384
    result = model.generate(longest, negative_prompt=longest, width=64, height=64, **ONE)
    assert max(map(len, result.warnings)) < 600
    result.save("out.png")
    assert read_recipe("out.png")["settings"]["prompt"] == longest


def test_no_stderr_is_no_reason_to_fail(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    with StepBar(1) as on_step:
        on_step(None)


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
@pytest.mark.parametrize("seconds", [1.0, 4.0, None])
def test_ctrl_c_at_any_moment_leaves_whole_pictures_alone(folders, tmp_path, seconds):
    out = tmp_path / "out"
    out.mkdir()
    command = [sys.executable, "-m", "safelight", "generate", "a", "--model", folders["text"]]
    command += ["--steps", "100", "--sampler", "euler", "--count", "64", "--out", str(out)]
    command += ["--width", "64", "--height", "64"]
    with subprocess.Popen(
        # A suite that was started in the background ignores Ctrl-C, and so would its children.
        command,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as child:
        if seconds is None:
            deadline = time.monotonic() + 60
            while not any(out.glob("safelight-*.png")) and time.monotonic() < deadline:
                time.sleep(0.01)
        else:
            time.sleep(seconds)
        child.send_signal(2)
        said, _ = child.communicate(timeout=60)
    # If a library's exec() is interrupted, Python ends by the signal; a shell also reports 130.
    assert child.returncode in (130, -2)
    made = sorted(str(path) for path in out.iterdir())
    # The last picture may be written and its path not yet printed.
    assert set(said.splitlines()) <= set(made)
    assert len(made) - len(said.splitlines()) <= 1
    if seconds is None:
        assert made
    for path in made:
        assert read_recipe(path)["settings"]["count"] == 1


def test_the_global_generator_is_left_alone(model):
    before = torch.get_rng_state()
    model.generate("a", steps=2, sampler="euler_a", width=64, height=64)
    assert torch.equal(before, torch.get_rng_state())


def test_json_is_one_object_with_nothing_around_it(folders, here, capsys):
    code, out, _ = run(capsys, "generate", "a", *FEW, "--model", folders["text"], "--json")
    assert code == 0
    assert json.loads(out)["paths"]
