"""A student that draws in a few steps what its teacher draws in many."""

from __future__ import annotations

import gc
import shutil
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import safelight
from safelight.defaults import model_defaults
from safelight.errors import SafelightError
from safelight.families.sd import StableDiffusion
from safelight.sampling import Level, SchedulerConfig
from safelight.sampling.levels import alphas_cumprod, sigmas_of
from safelight.train import distil, finetune
from safelight.train.distil import Trajectories, read_prompts, training_pair, trajectories
from safelight.train.plan import Plan

PLAN = Plan(steps=25, batch=8, learning_rate=5e-4, warmup=4, weight_decay=0.0, ema=0.8)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_who_says_the_target_comes_where_the_teacher_came(kind: str) -> None:
    """A student that predicts the target lands where the teacher did, by diffusers' DDIM."""
    from diffusers import DDIMScheduler

    config = {
        "beta_start": 0.00085,
        "beta_end": 0.02,
        "beta_schedule": "scaled_linear",
        "prediction_type": kind,
        "timestep_spacing": "trailing",
        "clip_sample": False,
    }
    ours = SchedulerConfig.from_dict(config)
    theirs = DDIMScheduler(**config)
    theirs.set_timesteps(4)
    times = theirs.timesteps
    sigmas = torch.from_numpy(sigmas_of(alphas_cumprod(ours)))[times].float()
    states = torch.randn(3, 5, 4, 8, 8)
    levels = [Level.exploding(sigma) for sigma in sigmas.tolist()]
    taken = Trajectories(states, levels, times.float())
    pick = torch.tensor([2, 0, 1, 2])
    step = torch.arange(4)
    seen, target = training_pair(taken, pick, step, ours)
    assert torch.equal(seen, states[pick, step])
    for i in range(4):
        found = theirs.step(target[i], times[i], seen[i], return_dict=False)[0]
        assert torch.allclose(found, states[pick[i], i + 1], atol=1e-4)


def test_the_teachers_trajectories_are_its_pictures(tmp_path: Path) -> None:
    """Each ends where ddim with as many steps ends, and is not drawn again."""
    teacher = safelight.load("embedded", dtype="float32")
    plan = replace(PLAN, recipe="0123456789abcdef", seed=5)
    taken = trajectories(teacher, ["a cat"], 2, 4.0, tmp_path, plan)
    assert taken.states.shape == (1, 3, 8, 16, 16)
    drawn: list[torch.Tensor] = []
    teacher.generate(
        "a cat",
        steps=2 * distil.SUBSTEPS,
        sampler="ddim",
        spacing="trailing",
        guidance_scale=4.0,
        seed=5,
        on_step=lambda step: drawn.append(step.clean),
    )
    assert (taken.states[0, -1].float() - drawn[-1][0]).abs().max() < 0.05
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert all("-5-" in path.name for path in kept)  # another seed is not read from it
    assert torch.equal(
        trajectories(teacher, ["a cat"], 2, 4.0, tmp_path, plan).states, taken.states
    )
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == kept
    [path] = kept
    path.write_bytes(path.read_bytes()[:1000])  # a damaged one is drawn again
    again = trajectories(teacher, ["a cat"], 2, 4.0, tmp_path, plan)
    assert torch.equal(again.states, taken.states)


def test_each_process_draws_its_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[list[str]] = []

    def draw(_: Any, __: Any, captions: list[str], *___: Any) -> torch.Tensor:
        drawn.append(captions)
        return torch.zeros(1, 2, 8, 4, 4)

    def wait() -> None:
        [mine] = tmp_path.iterdir()
        assert mine.name.endswith("-00000001.pt")
        shutil.copy(mine, mine.with_name(mine.name.replace("1.pt", "0.pt")))

    second = SimpleNamespace(num_processes=2, process_index=1, wait_for_everyone=wait)
    monkeypatch.setattr(distil, "accelerator", lambda: second)
    monkeypatch.setattr(distil, "_draw", draw)
    monkeypatch.setattr(distil, "BATCH", 1)
    teacher = safelight.load("embedded", dtype="float32")
    taken = trajectories(teacher, ["a cat", "a dog"], 1, 4.0, tmp_path, PLAN)
    assert drawn == [["a dog"]]
    assert len(taken.states) == 2


def test_the_teacher_makes_room_for_the_student(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teachers: list[weakref.ref[Any]] = []

    def drawn(teacher: Any, *_: Any) -> distil.Trajectories:
        teachers.append(weakref.ref(teacher))
        return distil.Trajectories(torch.zeros(1, 5, 8, 16, 16), [], torch.zeros(4))

    def learn(*_: Any, **__: Any) -> None:
        gc.collect()
        assert teachers[0]() is None
        raise KeyboardInterrupt

    monkeypatch.setattr(distil, "trajectories", drawn)
    monkeypatch.setattr(distil, "draw_sheet", lambda *_, **__: None)
    monkeypatch.setattr(distil, "fit", learn)
    (tmp_path / "prompts.txt").write_text("a cat")
    with pytest.raises(KeyboardInterrupt):
        distil.distil(tmp_path / "prompts.txt", tmp_path / "out", PLAN)


def test_a_student_comes_nearer_and_diffusers_draws_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distil, "SHEET_PROMPTS", 1)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\n\n  a red apple \n")
    made = distil.distil(prompts, tmp_path / "out", PLAN)
    student = safelight.load(str(made), dtype="float32")
    teacher = safelight.load("embedded", dtype="float32")
    assert student.words == teacher.words
    fast: dict[str, Any] = {"sampler": "ddim", "steps": 4, "guidance_scale": 1.0}
    states = torch.load(next((tmp_path / "out" / "ways").iterdir()), weights_only=True)

    def error(model: Any) -> float:
        """Return the distance to the picture that the teacher made of this noise."""
        for i in range(2):
            generator = torch.Generator().manual_seed(PLAN.seed + i)
            noise = torch.randn((8, 16, 16), generator=generator)
            assert torch.allclose(states[i, 0].float(), noise, atol=1e-2)
        job = model.generate(
            "a cat", **fast, spacing="trailing", seed=PLAN.seed, on_step=last.append
        )
        assert len(job.images) == 1
        return float((last[-1].clean[0] - states[0, -1].float()).square().mean())

    last: list[Any] = []
    assert error(student) < 0.7 * error(teacher)
    assert (made / "NOTICE").is_file()
    assert (tmp_path / "out" / "sheet.png").is_file()

    import diffusers
    import numpy as np

    pipe = diffusers.StableDiffusionPipeline.from_pretrained(made, dtype=torch.float32)
    assert isinstance(pipe.scheduler, diffusers.DDIMScheduler)
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(
        "a cat",
        num_inference_steps=4,
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(3),
        height=256,
        width=256,
    ).images[0]
    ours = student.generate("a cat", **fast, seed=3)
    assert ours.warnings == []
    # Settings that are not given are those that it was taught.
    assert student.generate("a cat", seed=3).images[0].tobytes() == ours.images[0].tobytes()
    (warning,) = student.generate("a cat", steps=8).warnings
    assert "was taught to draw with sampler ddim, steps 4, guidance_scale 1.0;" in warning
    apart = np.abs(np.asarray(ours.images[0]).astype(int) - np.asarray(theirs).astype(int))
    assert apart.max() <= 1


def test_prompts(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text("\n  a cat\n\na dog  \n")
    assert read_prompts(path) == ["a cat", "a dog"]
    path.write_bytes(b"\xef\xbb\xbfa cat\r\n")  # as Windows' editors write it
    assert read_prompts(path) == ["a cat"]
    path.write_text(" \n")
    with pytest.raises(SafelightError, match="has no prompts: expected one a line"):
        read_prompts(path)
    path.write_bytes("a cat\fa\x85dog\u2028\n".encode())
    assert read_prompts(path) == ["a cat\fa\x85dog"]
    for wrong in ("cat " * 6000, "c\0a\0t"):
        path.write_text(f"a cat\n\n{wrong}\n")
        with pytest.raises(SafelightError, match=r"p.txt, line 3, cannot be used: prompt must be"):
            read_prompts(path)
    path.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(SafelightError, match="is no UTF-8 text"):
        read_prompts(path)


@pytest.mark.parametrize(
    "said",
    [
        None,
        [],
        {"steps": 4},
        {"sampler": "x", "steps": 4, "guidance_scale": 1.0},
        {"sampler": "ddim", "steps": 4, "guidance_scale": 2.0, "guidance_start": 3},
    ],
)
def test_what_a_model_says_wrongly_is_no_default(said: Any) -> None:
    assert model_defaults({"draw_with": said}) == {}


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: Any, file: Any) -> None:
        file.write(b"half")
        raise RuntimeError("write failed: No space left on device")

    teacher = safelight.load("embedded", dtype="float32")
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(SafelightError, match=r"could not be written .* make room"):
        trajectories(teacher, ["a cat"], 1, 1.0, tmp_path, PLAN)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_a_teacher(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text("a cat")
    with pytest.raises(SafelightError, match="draws from noise alone"):
        distil.distil(path, tmp_path / "out", PLAN, model="embedded-unconditional")


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("trainable", False, "which cannot be trained further yet"),
        ("reads_mask", lambda *_: True, "reads a mask beside the picture"),
        ("takes_guidance", lambda *_: True, "takes the guidance scale as an input"),
    ],
)
def test_what_cannot_be_trained_further(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: Any, told: str
) -> None:
    monkeypatch.setattr(StableDiffusion, name, value)
    (tmp_path / "prompts.txt").write_text("a cat")
    with pytest.raises(SafelightError, match=told):
        distil.distil(tmp_path / "prompts.txt", tmp_path / "out", PLAN)
    with pytest.raises(SafelightError, match=told):
        finetune.finetune(tmp_path, tmp_path / "out", PLAN)
    assert not (tmp_path / "out").exists()
