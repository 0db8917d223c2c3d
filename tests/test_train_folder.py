"""A user's own pictures: what is read, what is refused, what is learned."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import safelight
from recipes.embedded.sizes import DRY
from safelight import SafelightError
from safelight.cli import app
from safelight.train import folder as folders
from safelight.train.finetune import finetune
from safelight.train.plan import Plan
from safelight.train.scratch import networks as scratch_networks
from safelight.train.scratch import text_to_image
from safelight.train.unconditional import network


def square(path: Path, colour: str, size: tuple[int, int] = (80, 64)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Four pictures, two of them captioned by metadata.jsonl."""
    folder = tmp_path / "pictures"
    square(folder / "a.png", "red")
    (folder / "a.txt").write_text("a  red\nflag\n")
    square(folder / "deep" / "b.jpg", "blue")
    (folder / "deep" / "b.txt").write_text("\ufeffa blue flag", encoding="utf-8")
    square(folder / "c.webp", "green", (64, 200))
    square(folder / "d.PNG", "white")
    rows = [
        {"file_name": "c.webp", "text": "a green flag"},
        {"file_name": "d.PNG", "text": "a white flag"},
    ]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (folder / "readme.md").write_text("not a picture")
    return folder


class TestFolder:
    def test_captions_beside_and_in_metadata(self, pictures: Path) -> None:
        said = {e.path.name: e.caption for e in folders.captioned(pictures)}
        assert said == {
            "a.png": "a red flag",
            "b.jpg": "a blue flag",
            "c.webp": "a green flag",
            "d.PNG": "a white flag",
        }

    def test_squares_from_the_middle(self, tmp_path: Path) -> None:
        image = Image.new("RGB", (30, 10), "white")
        image.paste("red", (10, 0, 20, 10))
        image.save(tmp_path / "a.png")
        assert (folders.read([tmp_path / "a.png"], 10) == (255, 0, 0)).all()

    def test_nothing_there(self, tmp_path: Path) -> None:
        with pytest.raises(SafelightError, match=r"no picture in .*: PNG, JPEG and WebP are read"):
            folders.captioned(tmp_path)
        with pytest.raises(SafelightError, match=r"is not a folder"):
            folders.captioned(tmp_path / "missing")

    def test_missing_captions_are_named(self, pictures: Path) -> None:
        (pictures / "a.txt").unlink()
        (pictures / "deep" / "b.txt").write_text("  \n")
        message = r"2 of 4 pictures have no caption \(a.png, b.jpg\): write it into a .txt"
        with pytest.raises(SafelightError, match=message):
            folders.captioned(pictures)

    def test_metadata_that_names_no_picture(self, pictures: Path) -> None:
        with (pictures / "metadata.jsonl").open("a") as file:
            file.write('{"file_name": "e.png", "text": "gone"}\n')
        with pytest.raises(SafelightError, match=r"names pictures that are not there: e.png"):
            folders.captioned(pictures)

    @pytest.mark.parametrize(
        "line", ["{", "[]", "3", '{"file_name": "a.png"}', '{"file_name": 1, "text": "x"}']
    )
    def test_metadata_that_is_none(self, pictures: Path, line: str) -> None:
        (pictures / "metadata.jsonl").write_text("\n" + line + "\n")
        with pytest.raises(SafelightError, match=r"metadata.jsonl, line 2: expected \{"):
            folders.captioned(pictures)

    def test_a_caption_that_is_no_text(self, pictures: Path) -> None:
        (pictures / "a.txt").write_bytes(b"\xff\xfe\xfa")
        with pytest.raises(SafelightError, match=r"a.txt cannot be read as UTF-8 text"):
            folders.captioned(pictures)

    @pytest.mark.parametrize(
        "line",
        [
            "[" * 100_000,
            '{"a":' * 100_000,
            '{"file_name": "c.webp", "text": ' + "[" * 100_000 + "]" * 100_000 + "}",
            '{"file_name": "c.webp", "text": ' + "9" * 100_000 + "}",
            '{"file_name": "c.webp", "text": "\\ud800"}',
            json.dumps({"file_name": "c.webp", "text": "x" * 2**20}),
        ],
    )
    def test_metadata_of_a_stranger(self, pictures: Path, line: str) -> None:
        (pictures / "metadata.jsonl").write_text(line + "\n")
        with pytest.raises(SafelightError, match=r"metadata.jsonl, line 1: expected \{") as error:
            folders.captioned(pictures)
        assert len(str(error.value)) < 200

    def test_metadata_may_hold_every_end_of_a_line_that_json_may(self, pictures: Path) -> None:
        rows = [
            {"file_name": "c.webp", "text": "a\u2028green\u0085flag"},
            {"file_name": "d.PNG", "text": "a white flag"},
        ]
        lines = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
        (pictures / "metadata.jsonl").write_bytes(lines.encode())
        said = {e.path.name: e.caption for e in folders.captioned(pictures)}
        assert said["c.webp"] == "a green flag"

    @pytest.mark.parametrize(
        ("name", "size"), [("a.txt", 2**30), ("metadata.jsonl", 2**36), ("deep/b.txt", 2**16 + 1)]
    )
    def test_files_that_are_too_large_are_not_read(
        self, pictures: Path, name: str, size: int
    ) -> None:
        with (pictures / name).open("wb") as file:
            file.truncate(size)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(SafelightError, match=r"over \d+ bytes, too large for what it is"):
            folders.captioned(pictures)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 2**10

    def test_unreadable_pictures_are_named(self, pictures: Path) -> None:
        (pictures / "a.png").write_bytes(b"no picture")
        paths = folders.pictures(pictures)
        with pytest.raises(SafelightError, match=r"1 of 4 pictures cannot be read: .*a.png"):
            folders.read(paths, 64)

    def test_digits(self) -> None:
        squares = folders.digits(16)
        assert squares.shape == (1797, 16, 16, 3)
        assert squares[0, 0, 0].tolist() == [255, 255, 255]
        assert squares[0].min() < 64
        assert squares[0].max() == 255


def test_networks_for_all_sizes() -> None:
    for size in (16, 64, 72, 256):
        config = network(size)
        assert config.sample_size == size
        assert len(config.block_out_channels) == len(config.up_block_types)


def test_fine_tuning_teaches_a_colour_and_diffusers_draws_the_same(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("safelight.train.finetune.CHECKPOINT_EVERY", 30)
    monkeypatch.setattr("safelight.train.finetune.SHEET_PROMPTS", 2)
    plan = Plan(steps=20, batch=4, learning_rate=1.5e-3, warmup=3, ema=0.8)
    out = tmp_path / "out"
    made = finetune(pictures, out, plan)
    model = safelight.load(str(made), dtype="float32")
    base = safelight.load("embedded", dtype="float32")
    assert model.words is not None
    assert "flag" in model.words
    settings: dict[str, Any] = {"steps": 8, "seed": 3, "sampler": "ddim", "guidance_scale": 3.0}
    blue = np.array([0, 0, 255])

    def error(drawn: Any) -> float:
        return float(np.abs(np.asarray(drawn.images[0]).astype(int) - blue).mean())

    before = error(base.generate("a blue flag", **settings))
    after = error(model.generate("a blue flag", **settings))
    assert after < 0.7 * before
    with Image.open(out / "sheet.png") as sheet:
        assert sheet.size == (2 * 256, 2 * 256)
    assert (made / "NOTICE").is_file()
    assert (out / "tensorboard").is_dir()

    import diffusers

    pipe = diffusers.StableDiffusionPipeline.from_pretrained(made, dtype=torch.float32)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(
        "a blue flag",
        num_inference_steps=8,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(3),
        height=256,
        width=256,
    ).images[0]
    ours = model.generate("a blue flag", **settings).images[0]
    apart = np.abs(np.asarray(ours).astype(int) - np.asarray(theirs).astype(int))
    assert apart.max() <= 1


def test_from_nothing_to_a_model_that_draws(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("safelight.train.scratch.CHECKPOINT_EVERY", 8)
    monkeypatch.setattr("safelight.train.scratch.SHEET_PROMPTS", 1)
    tiny = DRY.networks
    monkeypatch.setattr("safelight.train.scratch.networks", lambda _: tiny)
    plan = Plan(steps=8, batch=4, learning_rate=2e-3, warmup=3, ema=0.8)
    made = text_to_image(pictures, tmp_path / "out", plan, autoencoder_steps=8)
    model = safelight.load(str(made), dtype="float32")
    assert model.words is not None
    assert "flag" in model.words
    assert model.native_size == (64, 64)
    drawn = model.generate("a blue flag", steps=8, seed=3, guidance_scale=3.0)
    assert drawn.warnings == []
    with Image.open(tmp_path / "out" / "step-000008.png") as sheet:
        assert sheet.height == 64
    # It ended: called again it draws no step anew, and of other pictures it is refused.
    before = (made / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    text_to_image(pictures, tmp_path / "out", plan, autoencoder_steps=8)
    assert (made / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() == before
    square(pictures / "more.png", "green")
    (pictures / "more.txt").write_text("a green flag")
    with pytest.raises(SafelightError, match="made by another plan"):
        text_to_image(pictures, tmp_path / "out", plan, autoencoder_steps=8)


@pytest.mark.parametrize("size", [64, 96, 128, 256])
def test_networks_from_nothing_fit_together(size: int) -> None:
    net = scratch_networks(size)
    vae, text, unet = net.vae, net.text, net.unet
    assert unet.sample_size == size // vae.factor
    assert unet.cross_attention_dim == text.hidden_size
    assert unet.in_channels == vae.latent_channels
    # The UNet halves its maps at each level but the last.
    assert unet.sample_size % 2 ** (len(unet.block_out_channels) - 1) == 0


def test_what_cannot_be_trained_further(pictures: Path, tmp_path: Path) -> None:
    plan = Plan(steps=1, batch=1, learning_rate=1e-4)
    with pytest.raises(SafelightError, match=r"safelight train unconditional"):
        finetune(pictures, tmp_path, plan, model="embedded-unconditional")
    with pytest.raises(SafelightError, match=r"size 63: expected a multiple of 8"):
        finetune(pictures, tmp_path, plan, size=63)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fine-tune", "nowhere", "--out", "o"], "nowhere is not a folder"),
        (["unconditional", "nowhere", "--out", "o"], "nowhere is not a folder"),
        (["unconditional", "digits", "--out", "o", "--size", "20"], "size 20: expected a multiple"),
        (["unconditional", "digits", "--out", "o", "--steps", "0"], "--steps 0: expected 1"),
        (["fine-tune", ".", "--out", "o", "--learning-rate", "2"], "expected above 0 and below 1"),
        (["text-to-image", "nowhere", "--out", "o"], "nowhere is not a folder"),
        (
            ["text-to-image", ".", "--out", "o", "--size", "72"],
            "size 72: expected a multiple of 32",
        ),
        (["distil", "nowhere.txt", "--out", "o"], "nowhere.txt cannot be read"),
        (["distil", "p", "--out", "o", "--drawing-steps", "0"], "--drawing-steps 0: expected 1"),
    ],
)
def test_bad_commands(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["train", *arguments])
    assert isinstance(result.exception, SafelightError)
    assert message in str(result.exception)
    assert "\n" not in str(result.exception)


def curve(folder: Path) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars("loss")]


def test_killed_and_resumed_ends_as_undisturbed(tmp_path: Path) -> None:
    """The pixel model on the digits, killed at moments of chance."""
    script = tmp_path / "train.py"
    script.write_text(
        "import sys, torch\n"
        "from dataclasses import replace\n"
        "from pathlib import Path\n"
        "from safelight.train import unconditional as u\n"
        "from safelight.train.plan import Plan\n"
        "torch.set_num_threads(1)\n"
        "u.CHECKPOINT_EVERY = 8\n"
        "u.draw_sheet = lambda *_: None\n"
        "small = dict(block_out_channels=(16, 16, 16), norm_num_groups=8, attention_head_dim=8)\n"
        "u.network = lambda size: replace(u.PIXELS, sample_size=size, **small)\n"
        "plan = Plan(steps=63, batch=2, learning_rate=1e-3, warmup=5)\n"
        "print('go', flush=True)\n"
        "u.unconditional('digits', Path(sys.argv[1]), plan, size=16)\n"
    )

    def start(out: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, str(script), str(tmp_path / out)])

    killed = 0
    checkpoint = tmp_path / "b" / "checkpoint.pt"
    for after in (2,):  # checkpoints; tests/soak/training.py does it five times
        process = start("b")
        until = time.monotonic() + 120
        steps, last = 0, checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        while steps < after and process.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
            now = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
            steps, last = steps + (now != last), now
        killed += process.poll() is None
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert killed == 1
    assert start("b").wait() == 0
    assert start("a").wait() == 0
    states = [torch.load(tmp_path / n / "checkpoint.pt", weights_only=True) for n in "ab"]
    for one, other in zip(states[0]["average"], states[1]["average"], strict=True):
        assert torch.equal(one, other)
    assert len(curve(tmp_path / "a")) == 21  # of three steps each, which no checkpoint ends on
    assert curve(tmp_path / "a") == curve(tmp_path / "b")
