"""A user's own pictures: what is read, what is refused, what is learned."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import tracemalloc
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
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
from safelight.defaults import is_distilled
from safelight.nets.vae import AutoencoderKL, VAEConfig
from safelight.prompt.tokenizer import clip_tokenizer
from safelight.train import autoencoder, devices
from safelight.train import folder as folders
from safelight.train.autoencoder import encode, to_pixels
from safelight.train.distil import distil
from safelight.train.finetune import finetune
from safelight.train.loop import Draw
from safelight.train.networks import PIXELS
from safelight.train.plan import Plan
from safelight.train.scratch import Album, text_to_image
from safelight.train.scratch import networks as scratch_networks
from safelight.train.sheet import draw_sheet, is_sheet
from safelight.train.tokens import token_ids
from safelight.train.unconditional import network, unconditional
from safelight.weights import load_model
from small_training import learn


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

    def test_metadata_as_in_hugging_faces_folders(self, tmp_path: Path) -> None:
        """Each one names pictures relative to itself, and the nearest one counts."""
        for name in ("a.png", "train/b.png", "train/deep/c.png"):
            square(tmp_path / name, "red")

        def write(folder: str, **said: str) -> None:
            rows = [{"file_name": name.replace("_", "."), "text": t} for name, t in said.items()]
            lines = "\n".join(map(json.dumps, rows)).replace('"a.png"', '"./a.png"')
            (tmp_path / folder / "metadata.jsonl").write_text(lines)

        write(".", a_png="a cat")
        with (tmp_path / "metadata.jsonl").open("a") as file:
            file.write('\n{"file_name": "train/b.png", "text": "farther"}\n')
        write("train", b_png="a dog")
        with (tmp_path / "train" / "metadata.jsonl").open("a") as file:
            file.write('\n{"file_name": "deep/../deep/c.png", "text": "a cow"}\n')
        said = {e.path.name: e.caption for e in folders.captioned(tmp_path)}
        assert said == {"a.png": "a cat", "b.png": "a dog", "c.png": "a cow"}
        (tmp_path / "train" / "metadata.jsonl").write_text("{")
        with pytest.raises(SafelightError, match=r"^train/metadata.jsonl, line 1: expected"):
            folders.captioned(tmp_path)

    def test_metadata_that_names_another_kind_of_file(self, pictures: Path) -> None:
        square(pictures / "b.bmp", "red")
        with (pictures / "metadata.jsonl").open("a") as file:
            file.write('{"file_name": "b.bmp", "text": "a red flag"}\n')
        message = r"names files that are not read: b.bmp; PNG, JPEG and WebP are"
        with pytest.raises(SafelightError, match=message):
            folders.captioned(pictures)

    def test_what_is_left_out_is_named(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = tmp_path / ".hidden above" / "pictures"
        square(folder / "a.png", "red")
        Image.new("RGB", (64, 64)).save(folder / "b.jfif", "JPEG")
        assert folders.pictures(folder) == [folder / "a.png", folder / "b.jfif"]
        assert capsys.readouterr().err == ""
        square(folder / "c.bmp", "red")
        square(folder / "in a folder.png" / "d.gif", "red")
        square(folder / ".thumbnails" / "a.png", "red")
        square(folder / ".e.png", "red")
        for name in ("a.txt", "readme.md", "metadata.jsonl"):
            (folder / name).touch()
        assert folders.pictures(folder) == [folder / "a.png", folder / "b.jfif"]
        assert capsys.readouterr().err == (
            "left out, because they are not PNG, JPEG or WebP: c.bmp, in a folder.png/d.gif\n"
        )

    @pytest.mark.parametrize("caption", ["cat " * 6000, "c\0a\0t\0"])
    def test_a_caption_that_cannot_be_a_prompt(self, pictures: Path, caption: str) -> None:
        (pictures / "deep" / "b.txt").write_text(caption)
        message = (
            r"^the caption of deep/b.jpg cannot be used: prompt must be text of at most 16 KiB"
        )
        with pytest.raises(SafelightError, match=message):
            folders.captioned(pictures)

    def test_pictures_are_hashed_without_a_copy(self) -> None:
        squares = np.random.default_rng(0).integers(0, 256, (64, 128, 128, 3), dtype=np.uint8)
        words = json.dumps([["a cat"], squares.shape]).encode()
        wanted = hashlib.sha256(words + squares.tobytes()).hexdigest()
        tracemalloc.start()
        try:
            assert folders.digest(squares, ["a cat"]) == wanted
            assert tracemalloc.get_traced_memory()[1] < squares.nbytes / 4
        finally:
            tracemalloc.stop()
        assert folders.digest(squares[:, ::2], []) == folders.digest(squares[:, ::2].copy(), [])
        assert len(folders.digest(np.zeros(0, np.uint8), [])) == 64

    def test_pictures_are_read_into_one_array(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # Reading a file takes a buffer that is larger than these pictures.
        monkeypatch.setattr(folders, "open_picture", lambda _: Image.new("RGB", (256, 256), "red"))
        paths = [Path(f"{i}.png") for i in range(16)]
        folders.read(paths[:1], 128)
        tracemalloc.start()
        try:
            squares = folders.read(paths, 128)
            assert tracemalloc.get_traced_memory()[1] < 1.6 * squares.nbytes
        finally:
            tracemalloc.stop()
        assert (squares == (255, 0, 0)).all()

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
    assert model.defaults == safelight.load("embedded").defaults
    assert not is_distilled(model.notes)
    settings: dict[str, Any] = {"steps": 8, "seed": 3, "sampler": "ddim", "guidance_scale": 3.0}
    settings["guidance_start"] = 0  # as in diffusers, not as the model's own
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


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # of diffusers' scheduler
@pytest.mark.parametrize(
    "settings",
    [
        {"_class_name": "DDIMScheduler", "timestep_spacing": "trailing"},
        {
            "_class_name": "DDIMScheduler",
            "timestep_spacing": "trailing",
            "rescale_betas_zero_snr": True,
        },
        {"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True},
    ],
)
def test_fine_tuning_keeps_the_scheduler_for_diffusers(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    """With a learning rate of almost nothing, diffusers draws the same picture as before."""
    import diffusers

    base = tmp_path / "base"
    shutil.copytree(load_model("embedded-fast").path, base)
    config = base / "scheduler" / "scheduler_config.json"
    raw = {**json.loads(config.read_text()), **settings, "of_another_program": 3}
    config.write_text(json.dumps(raw))
    index = json.loads((base / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", settings["_class_name"]]
    (base / "model_index.json").write_text(json.dumps(index))
    monkeypatch.setattr("safelight.train.finetune.draw_sheet", lambda *_: Image.new("RGB", (8, 8)))
    monkeypatch.setattr("safelight.train.finetune.under", lambda *_: Image.new("RGB", (8, 8)))
    plan = Plan(steps=1, batch=1, learning_rate=1e-12)
    made = finetune(pictures, tmp_path / "out", plan, model=str(base), size=64)
    assert json.loads((made / "scheduler" / "scheduler_config.json").read_text()) == raw
    drawn = []
    for folder in (base, made):
        pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
        pipe.set_progress_bar_config(disable=True)
        seeded = torch.Generator().manual_seed(3)
        given: dict[str, Any] = {"height": 64, "width": 64, "generator": seeded}
        image = pipe("a cat", num_inference_steps=4, guidance_scale=1.0, **given).images[0]
        drawn.append((type(pipe.scheduler).__name__, np.asarray(image).astype(int)))
    assert drawn[0][0] == drawn[1][0] == settings["_class_name"]
    assert np.abs(drawn[0][1] - drawn[1][1]).max() <= 1


def test_a_sheet_is_drawn_as_the_model_draws_best(tmp_path: Path) -> None:
    for other in ({}, {"guidance_scale": 2.0}):
        sheet = draw_sheet("embedded-fast", tmp_path / "sheet.png", ["a cat"], **other)
        wanted = safelight.load("embedded-fast").generate("a cat", seed=1, **other)
        assert sheet.tobytes() == wanted.images[0].tobytes()
    assert is_sheet(tmp_path / "sheet.png")
    assert not is_sheet(tmp_path / "none.png")


def test_what_is_refused_changes_nothing_beside_the_checkpoint(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(*_: Any, **__: Any) -> None:
        raise AssertionError("it drew or wrote something")

    out = tmp_path / "out"
    (out / "model").mkdir(parents=True)
    plan = Plan(steps=2, batch=1, learning_rate=1e-4)
    made_by = json.dumps(asdict(replace(plan, recipe="another")))
    torch.save({"plan": made_by, "step": 1}, out / "checkpoint.pt")
    for name in ("finetune.draw_sheet", "distil.draw_sheet", "distil.trajectories"):
        monkeypatch.setattr(f"safelight.train.{name}", nothing)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat")
    calls: list[Callable[[], Path]] = [
        lambda: finetune(pictures, out, plan),
        lambda: distil(prompts, out, plan),
        lambda: unconditional(str(pictures), out, plan, size=16),
        lambda: text_to_image(pictures, out, plan),
    ]
    for call in calls:
        with pytest.raises(SafelightError, match="made by other settings"):
            call()
    assert not list((out / "model").iterdir())
    assert sorted(path.name for path in out.iterdir()) == ["checkpoint.pt", "model"]


def test_what_training_needs_is_checked_before_the_teacher_draws(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(*_: Any, **__: Any) -> None:
        raise AssertionError("it drew something")

    def missing() -> None:
        raise SafelightError("missing")

    for name in ("finetune.draw_sheet", "distil.draw_sheet", "distil.trajectories"):
        monkeypatch.setattr(f"safelight.train.{name}", nothing)
    prompts, plan = tmp_path / "prompts.txt", Plan(steps=2, batch=1, learning_rate=1e-4)
    prompts.write_text("a cat")
    for name, native in (("check_compiler", True), ("accelerator", False)):
        with monkeypatch.context() as patch:
            patch.setattr(f"safelight.train.loop.{name}", missing)
            with pytest.raises(SafelightError, match="missing"):
                finetune(pictures, tmp_path / "a", plan, native=native)
            with pytest.raises(SafelightError, match="missing"):
                distil(prompts, tmp_path / "b", plan, native=native)


def test_a_run_without_a_checkpoint_begins_anew(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its sheet before.png is drawn again, and its plan names the weighting of the loss."""
    drawn: list[str] = []
    plans: list[str] = []

    def sheet(model: str, path: Path, *_: Any) -> None:
        drawn.append(model)
        square(path, "red")

    def stopped(*given: Any, **_: Any) -> None:
        plans.append(given[5].recipe)
        raise KeyboardInterrupt

    monkeypatch.setattr("safelight.train.finetune.draw_sheet", sheet)
    monkeypatch.setattr("safelight.train.finetune.train_text_to_image", stopped)
    plan, out = Plan(steps=2, batch=1, learning_rate=1e-4), tmp_path / "out"
    for model, min_snr in (("embedded", None), ("embedded-fast", None), ("embedded-fast", 5.0)):
        with pytest.raises(KeyboardInterrupt):
            finetune(pictures, out, plan, model=model, min_snr=min_snr, size=64)
    assert drawn == ["embedded", "embedded-fast", "embedded-fast"]
    assert len(set(plans)) == 3
    made_by = json.dumps(asdict(replace(plan, recipe=plans[2])))
    torch.save({"plan": made_by, "step": 1}, out / "checkpoint.pt")
    for sheets in (3, 4):
        with pytest.raises(KeyboardInterrupt):
            finetune(pictures, out, plan, model="embedded-fast", min_snr=5.0, size=64)
        assert len(drawn) == sheets
        whole = (out / "before.png").read_bytes()
        (out / "before.png").write_bytes(whole[: len(whole) // 2])


def test_pictures_are_not_learned_from_what_was_drawn(pictures: Path, tmp_path: Path) -> None:
    plan = Plan(steps=1, batch=1, learning_rate=1e-4)
    for call in (
        lambda: unconditional(str(pictures), pictures / "run", plan, size=16),
        lambda: finetune(pictures, pictures, plan),
        lambda: text_to_image(pictures, pictures / "a" / ".." / "run", plan),
    ):
        with pytest.raises(SafelightError, match=r"^out .* is in .*pictures, where .* beside it$"):
            call()
    assert not (pictures / "run").exists()


def test_out_below_a_file_is_one_line(pictures: Path) -> None:
    plan = Plan(steps=1, batch=1, learning_rate=1e-4)
    for call in (
        lambda out: unconditional("digits", out, plan, size=16),
        lambda out: finetune(pictures, out, plan),
    ):
        with pytest.raises(SafelightError, match="cannot be a folder: Not a directory"):
            call(Path(__file__) / "run")


def test_a_finished_run_writes_its_model_if_it_is_missing(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = replace(PIXELS, block_out_channels=(8, 8, 8), norm_num_groups=8, attention_head_dim=8)
    monkeypatch.setattr("safelight.train.unconditional.PIXELS", small)
    monkeypatch.setattr("safelight.train.unconditional.draw_sheet", lambda *_: None)
    plan = Plan(steps=2, batch=1, learning_rate=1e-4)
    out = tmp_path / "out"
    made = unconditional(str(pictures), out, plan, size=16)
    weights = made / "unet" / "diffusion_pytorch_model.safetensors"
    before = weights.read_bytes()
    weights.unlink()
    unconditional(str(pictures), out, plan, size=16)
    assert weights.read_bytes() == before
    (out / "model.part").touch()  # where the folder is written first
    with pytest.raises(
        SafelightError, match=r"model could not be written .*; checkpoints are kept"
    ):
        unconditional(str(pictures), out, plan, size=16)


def test_native_without_a_compiler_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import config

    monkeypatch.setattr(config.cpp, "cxx", (None, "no-such-compiler"))
    monkeypatch.setattr(devices, "accelerator", lambda: SimpleNamespace(device=torch.device("cpu")))
    with pytest.raises(SafelightError, match=r"--native needs a C\+\+ compiler"):
        devices.compiled(torch.nn.Linear(1, 1), wanted=True)


def test_captions_beyond_the_text_length_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = clip_tokenizer("<|endoftext|>", 8)
    ids = token_ids(tokenizer, ["a red flag", "a red flag " * 9, "one two three four five six"])
    assert ids.shape == (3, 8)
    assert "1 of 3 captions are longer than the 6 tokens" in capsys.readouterr().err


def test_latents_are_made_part_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """All pictures at once in float32 would take four times their bytes."""
    sizes: list[int] = []

    def noted(part: Any) -> torch.Tensor:
        sizes.append(len(part))
        return to_pixels(part)

    monkeypatch.setattr(autoencoder, "to_pixels", noted)
    monkeypatch.setattr(autoencoder, "AT_ONCE", 2 * 64 * 64)
    vae = AutoencoderKL(DRY.networks.vae)
    squares = np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), dtype=np.uint8)
    latents = autoencoder.encode(vae, squares)
    assert sizes == [2, 2, 1]
    assert torch.equal(latents[4:], autoencoder.encode(vae, squares[4:]))


def test_the_spread_of_latents_is_found_part_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """All at once, 1,024 pictures of 512 pixels a side would take gigabytes."""
    sizes: list[int] = []
    drawn: list[int] = []
    fast: list[bool] = []

    class Noted(Album):
        def batch(self, n: int, rng: np.random.Generator) -> Any:
            drawn.append(n)
            return super().batch(n, rng)

    def noted(part: Any) -> torch.Tensor:
        sizes.append(len(part))
        return to_pixels(part)

    def cast(_: Any) -> Any:
        fast.append(True)
        return nullcontext()

    monkeypatch.setattr(autoencoder, "to_pixels", noted)
    monkeypatch.setattr(autoencoder, "autocast", cast)
    monkeypatch.setattr(autoencoder, "AT_ONCE", 2 * 64 * 64)
    vae = AutoencoderKL(DRY.networks.vae)
    squares = np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), dtype=np.uint8)
    album = Noted(squares, ["a"] * 5)
    found = autoencoder.latent_spread(vae, album, Draw.of(0, 0), count=6)
    assert sizes == drawn == [1, 2, 2, 1]
    assert len(fast) == 4
    pick = np.random.default_rng([0, 0]).integers(5, size=6)
    with torch.no_grad():
        wanted = vae.encode(to_pixels(squares[pick]))[0].std()
    assert found == pytest.approx(float(wanted), rel=1e-4)


def test_latents_have_the_scale_of_the_denoiser(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are scaled by `latents_mean` and `latents_std`, as when a picture is drawn."""
    monkeypatch.setattr(autoencoder, "TOLD_EVERY", 0.0)
    statistics = {"latents_mean": (3.0, -2.0, 1.0, 4.0), "latents_std": (2.0, 3.0, 4.0, 5.0)}
    vae = AutoencoderKL(VAEConfig(block_out_channels=(8,) * 4, norm_num_groups=4, **statistics))
    squares = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    with torch.no_grad():
        wanted = vae.config.scale(vae.encode(to_pixels(squares))[0])
    assert torch.allclose(autoencoder.encode(vae, squares).float(), wanted, atol=0.05)
    assert capsys.readouterr().err == "encoded 2/2 pictures\n"


def test_latents_are_kept_for_the_next_run(
    tmp_path: Path,
    pictures: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given: list[torch.Tensor] = []

    def stopped(_: Any, __: Any, latents: torch.Tensor, *___: Any, **____: Any) -> None:
        given.append(latents)
        raise KeyboardInterrupt

    def loaded(name: str, **settings: Any) -> Any:
        model = load_model(name, **settings)
        model.warnings.append("it has a flaw")
        return model

    monkeypatch.setattr("safelight.train.finetune.load_model", loaded)
    monkeypatch.setattr("safelight.train.finetune.draw_sheet", lambda *_: None)
    monkeypatch.setattr("safelight.train.finetune.train_text_to_image", stopped)
    plan = Plan(steps=2, batch=1, learning_rate=1e-4)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            finetune(pictures, tmp_path / "out", plan, size=64)
        monkeypatch.setattr("safelight.train.finetune.encode", None)
    assert torch.equal(given[0], given[1])
    said = capsys.readouterr().err.splitlines()
    # A damaged file is made again.
    monkeypatch.setattr("safelight.train.finetune.encode", encode)
    [kept] = (tmp_path / "out").glob("latents-*.pt")
    whole = kept.read_bytes()
    for damaged in (whole[: len(whole) // 2], b""):
        kept.write_bytes(damaged)
        with pytest.raises(KeyboardInterrupt):
            finetune(pictures, tmp_path / "out", plan, size=64)
        assert torch.equal(given[0], given.pop())
        assert f"{kept} is damaged: it is made again" in capsys.readouterr().err
    assert said[:2] == [
        "warning: it has a flaw",
        "13 million weights are trained, which takes 0.3 GB of memory beside the pictures of a "
        "step; a checkpoint has 0.2 GB",
    ]


def test_pixels_are_dropped_once_they_are_encoded(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[weakref.ref[Any]] = []

    def reading(*given: Any) -> Any:
        squares = folders.read(*given)
        held.append(weakref.ref(squares))
        return squares

    def stopped(*_: Any, **__: Any) -> None:
        gc.collect()
        assert held[-1]() is None
        raise KeyboardInterrupt

    tiny = DRY.networks
    for module in ("finetune", "scratch"):
        monkeypatch.setattr(f"safelight.train.{module}.read", reading)
        monkeypatch.setattr(f"safelight.train.{module}.train_text_to_image", stopped)
    monkeypatch.setattr("safelight.train.finetune.draw_sheet", lambda *_: None)
    monkeypatch.setattr("safelight.train.scratch.networks", lambda _: tiny)
    plan = Plan(steps=1, batch=1, learning_rate=1e-4)
    with pytest.raises(KeyboardInterrupt):
        finetune(pictures, tmp_path / "fine", plan, size=64)
    with pytest.raises(KeyboardInterrupt):
        text_to_image(pictures, tmp_path / "new", plan, autoencoder_steps=1)
    assert len(held) == 2


@pytest.mark.parametrize(
    ("module", "made", "first"),
    [
        ("finetune", "finetune", "load_model"),
        ("distil", "distil", "read_prompts"),
        ("scratch", "text_to_image", "networks"),
        ("unconditional", "unconditional", "digits"),
    ],
)
def test_too_little_memory_before_the_first_step_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, made: str, first: str
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    part = import_module(f"safelight.train.{module}")
    monkeypatch.setattr(part, first, full)
    plan = Plan(steps=1, batch=1, learning_rate=1e-4)
    size = {} if made in ("finetune", "distil") else {"size": 64}
    with pytest.raises(SafelightError, match=r"^cpu has too little memory .* smaller --batch"):
        getattr(part, made)("digits", tmp_path, plan, **size)


class Second(SimpleNamespace):
    """The second of two processes, whose first one does its work while this one waits."""

    device, num_processes, process_index, is_main_process = torch.device("cpu"), 2, 1, False


def test_the_second_process_writes_nothing(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(*_: Any, **__: Any) -> None:
        raise AssertionError("it drew or wrote something")

    out = tmp_path / "out"
    kept = torch.zeros(4, 8, 4, 4).half()

    def wait() -> None:
        [recipe] = recipes
        torch.save(kept, out / f"latents-{recipe[:12]}.pt")

    def trained(*given: Any, **_: Any) -> None:
        assert torch.equal(given[2], kept)

    recipes: list[str] = []
    monkeypatch.setattr(
        "safelight.train.finetune.check_plan",
        lambda folder, plan, **_: (folder.mkdir(), recipes.append(plan.recipe)),
    )
    machine = Second(wait_for_everyone=wait)
    for name in ("draw_sheet", "encode", "save_whole", "export_text_to_image", "progress"):
        monkeypatch.setattr(f"safelight.train.finetune.{name}", nothing)
    monkeypatch.setattr("safelight.train.finetune.accelerator", lambda: machine)
    monkeypatch.setattr("safelight.train.finetune.train_text_to_image", trained)
    finetune(pictures, out, Plan(steps=2, batch=1, learning_rate=1e-4), size=64)
    assert [path.name[:8] for path in out.iterdir()] == ["latents-"]


@pytest.mark.soak
def test_two_processes_train_together(tmp_path: Path, pictures: Path) -> None:
    """The first one writes everything, except for the second one's share of the trajectories."""
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    told = {
        "ACCELERATE_USE_CPU": "true",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
    }
    script = Path(__file__).with_name("training_together.py")
    running = [
        subprocess.Popen(
            [sys.executable, str(script), str(tmp_path)],
            env={**os.environ, **told, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
        )
        for rank in "01"
    ]
    first, second = (set(json.loads(one.communicate(timeout=300)[0])) for one in running)
    assert {"fine/before.png", "fine/sheet.png", "fast/teacher.png", "fast/sheet.png"} <= first
    [share] = second
    assert re.fullmatch(r"fast/ways/\w+-0-00000001\.part", share)
    for made in ("fine/model", "fast/model"):
        assert safelight.load(str(tmp_path / made)).words


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
    # It has ended: called again, it takes no step, and writes what the run before could not write.
    before = (made / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    (made / "model_index.json").unlink()
    text_to_image(pictures, tmp_path / "out", plan, autoencoder_steps=8)
    assert (made / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() == before
    assert safelight.load(str(made)).sha256 == model.sha256
    # With other pictures it is refused, and the finished model stays as it is.
    vocabulary = (made / "tokenizer" / "vocab.json").read_bytes()
    square(pictures / "more.png", "green")
    (pictures / "more.txt").write_text("quite another caption")
    with pytest.raises(SafelightError, match="made by other settings"):
        text_to_image(pictures, tmp_path / "out", plan, autoencoder_steps=8)
    assert (made / "tokenizer" / "vocab.json").read_bytes() == vocabulary


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
        (["fine-tune", ".", "--out", "o", "--min-snr", "nan"], "--min-snr nan: expected a number"),
        (["fine-tune", ".", "--out", "o", "--min-snr", "0"], "--min-snr 0: expected a number"),
        (["unconditional", "digits", "--out", "o", "--seed", "-1"], "--seed -1: expected a whole"),
        (
            ["text-to-image", ".", "--out", "o", "--autoencoder-steps", "0"],
            "--autoencoder-steps 0: expected 1",
        ),
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


@pytest.mark.parametrize(
    ("command", "function"),
    [("fine-tune", "finetune.finetune"), ("text-to-image", "scratch.text_to_image")],
)
def test_how_to_draw_with_the_result_is_told(
    command: str, function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"safelight.train.{function}", lambda *_, **__: Path("o/model"))
    result = CliRunner().invoke(app, ["train", command, ".", "--out", "o"])
    assert result.stdout == "o/model\n"
    assert result.stderr == "draw with: safelight generate PROMPT --model o/model\n"


def curve(folder: Path) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars("loss")]


def test_killed_and_resumed_ends_as_undisturbed(tmp_path: Path) -> None:
    """The pixel model learns the digits and is killed at random moments."""
    script = Path(__file__).with_name("small_training.py")
    killed = 0
    checkpoint = tmp_path / "b" / "checkpoint.pt"
    for after in (2,):  # checkpoints; tests/soak/training.py kills five times
        process = subprocess.Popen([sys.executable, str(script), str(tmp_path / "b")])
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
    learn(tmp_path / "b")
    learn(tmp_path / "a")
    states = [torch.load(tmp_path / n / "checkpoint.pt", weights_only=True) for n in "ab"]
    for one, other in zip(states[0]["average"], states[1]["average"], strict=True):
        assert torch.equal(one, other)
    assert len(curve(tmp_path / "a")) == 21  # of three steps each, which no checkpoint ends on
    assert curve(tmp_path / "a") == curve(tmp_path / "b")
