"""Teach a copy of a model to draw in a few steps, and without guidance.

The teacher draws pictures to captions in many small steps with guidance. The student learns to go
as far in each of its few steps as the teacher went in several, guidance included (progressive
distillation, arXiv:2202.00512, and that of guidance, arXiv:2210.03142). No pictures are needed:
the student learns from the teacher's own trajectories from noise to a picture.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from safelight.engine import Engine
from safelight.engine.job import prepare
from safelight.engine.shortcuts import Kept, Shortcuts
from safelight.errors import SafelightError
from safelight.model import Model
from safelight.nets.unet import UNet2DConditionModel
from safelight.picture import reason
from safelight.request import Request
from safelight.sampling import SCHEDULES, Level, SchedulerConfig, Table, table
from safelight.train.denoiser import wanted
from safelight.train.devices import accelerator, autocast, memory_told
from safelight.train.export import export_text_to_image, replacing, writing
from safelight.train.finetune import bring_along, check_trainable, own_memory, tell
from safelight.train.folder import check_prompt, digest
from safelight.train.loop import Draw, check_plan, fit, progress
from safelight.train.out import is_kept, save_whole
from safelight.train.plan import Plan
from safelight.train.sheet import draw_sheet, is_sheet, under
from safelight.train.tokens import token_ids
from safelight.weights import load_model

SUBSTEPS = 4
"""The teacher's steps for each of the student's."""

BATCH = 64
"""Pictures that the teacher draws at once; their trajectories are saved in one file."""

SHEET_PROMPTS = 6
CHECKPOINT_EVERY = 250


@dataclass(frozen=True)
class Trajectories:
    """The teacher's states on its way from noise to pictures.

    states: at each of the student's levels and at the end, as the network sees them, float16
    [n, steps + 1, channels, h, w]. levels, timesteps: of the student's steps, [steps].
    """

    states: Tensor
    levels: list[Level]
    timesteps: Tensor

    def to(self, device: torch.device | str) -> Trajectories:
        """Return the same on a device."""
        return replace(self, states=self.states.to(device), timesteps=self.timesteps.to(device))

    @cached_property
    def numbers(self) -> Tensor:
        """Sigma and norm of each step's level, and of the level on which it lands, [4, steps]."""
        after = [*self.levels[1:], Level.exploding(0.0)]
        both = ((level, name) for level in (self.levels, after) for name in ("sigma", "norm"))
        rows = [[getattr(one, name) for one in level] for level, name in both]
        return torch.tensor(rows, dtype=torch.float32, device=self.states.device)


@memory_told()
def distil(
    prompts: Path,
    out: Path,
    plan: Plan,
    *,
    model: str = "embedded",
    drawing_steps: int = 4,
    guidance_scale: float = 4.0,
    native: bool = False,
) -> Path:
    """Teach a copy of `model` to draw in a few steps without guidance; return out/model.

    prompts: a file with one prompt a line. drawing_steps: the student's steps, of ddim.
    guidance_scale: the teacher's, in the steps that its defaults guide. A call with the same `out`
    continues where it was stopped. out/sheet.png has pictures of the first prompts by the teacher,
    in its many steps, and by the student.
    """
    captions = read_prompts(prompts)
    machine = accelerator()  # it chooses the GPU of each process, on which the teacher is loaded
    teacher = load_model(model)
    if not teacher.uses_prompt:
        raise SafelightError(f"{teacher.name} draws from noise alone: there is no guidance to save")
    check_trainable(teacher)
    told = f"{drawing_steps} steps, guidance {guidance_scale}"
    plan = replace(plan, recipe=digest(np.zeros(0, np.uint8), [teacher.sha256, told, *captions]))
    check_plan(out, plan, native=native)
    base = load_model(model, device="cpu", dtype="float32", plain=True)
    assert isinstance(base.unet, UNet2DConditionModel)
    tell(base, base.unet)
    taken = trajectories(teacher, captions, drawing_steps, guidance_scale, out / "ways", plan)
    del teacher  # its memory is needed now
    shown = captions[:SHEET_PROMPTS]
    made = out / "model"
    # Without a checkpoint, a sheet may be of another teacher.
    begun = is_sheet(out / "teacher.png") and (out / "checkpoint.pt").exists()
    if machine.is_main_process and not begun:
        with writing(made):
            draw_sheet(model, out / "teacher.png", shown, guidance_scale=guidance_scale)

    vae, text, tokenizer = base.vae, base.text_encoder, base.tokenizer
    assert vae is not None
    assert text is not None
    assert tokenizer is not None
    student = own_memory(base.unet).train()
    taken, words = taken.to(machine.device), copy.deepcopy(text).to(machine.device)
    ids = token_ids(tokenizer, captions).to(machine.device)
    draw_with = {"sampler": "ddim", "steps": drawing_steps, "guidance_scale": 1.0}
    scheduler = {
        **base.scheduler.to_dict(),
        "_class_name": "DDIMScheduler",
        "timestep_spacing": "trailing",
    }
    notes = {
        **base.notes,
        "made_from": f"{base.name}, sha256 {base.sha256}",
        "draw_with": draw_with,
        "distilled": True,
    }
    if base.words is not None:
        notes["words"] = sorted(base.words)

    def loss_of(run: Any, draw: Draw) -> Tensor:
        pick, step = draw.pick(len(captions), plan.batch), draw.pick(drawing_steps, plan.batch)
        state, target = training_pair(taken, pick, step, base.scheduler)
        with autocast(draw.device):
            with torch.no_grad():
                context = words(ids[pick])
            predicted = run(state, taken.timesteps[step], context)
        return (predicted.float() - target).square().mean()

    def show(trained: Any, step: int) -> Image.Image:
        with writing(made):
            with replacing(made) as new:
                tokenizer.save(new / "tokenizer")
                bring_along(base, new)
                export_text_to_image(new, vae, text, trained, scheduler, notes)
            return draw_sheet(made, out / f"step-{step:06}.png", shown, **draw_with)

    fit(
        student,
        loss_of,
        plan,
        out,
        every=CHECKPOINT_EVERY,
        native=native,
        on_device=True,
        on_checkpoint=show,
    )
    if machine.is_main_process:
        after = show(student.cpu(), plan.steps)
        with writing(made):
            under(out / "teacher.png", after).save(out / "sheet.png")
    return made


def read_prompts(path: Path) -> list[str]:
    """Return the lines of a text file that are not empty.

    Raises SafelightError with the line's number if one cannot be a prompt.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise SafelightError(f"{path} cannot be read: {reason(error)}") from None
    except UnicodeDecodeError:
        raise SafelightError(f"{path} is no UTF-8 text: expected one prompt a line") from None
    found = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise SafelightError(f"{path} has no prompts: expected one a line")
    for number, line in found:
        check_prompt(line, f"{path}, line {number},")
    return [line for _, line in found]


def trajectories(
    teacher: Model, captions: list[str], steps: int, guidance: float, folder: Path, plan: Plan
) -> Trajectories:
    """Return the teacher's trajectories, one for each caption, each with a seed of its own.

    The states are kept in `folder`, BATCH captions a file; another call reads them from there. Of
    several processes each draws its share of the files, and then reads all.
    """
    # Euler's step is DDIM's, and lands on the level of the next row for any number of steps.
    config = teacher.scheduler.override(
        timestep_spacing="trailing",
        final_sigmas_type="zero",
        **{f"use_{name}_sigmas": False for name in SCHEDULES},
    )
    walk = table("euler", config, steps * SUBSTEPS)
    walk = replace(walk, noise_scale=walk.rows[0].level.norm)
    folder.mkdir(exist_ok=True)
    machine, paths = accelerator(), list[Path]()
    for first in range(0, len(captions), BATCH):
        path = folder / f"{plan.recipe[:12]}-{plan.seed}-{first:08}.pt"
        mine = len(paths) % machine.num_processes == machine.process_index
        paths.append(path)
        part = captions[first : first + BATCH]
        if mine and not is_kept(path, len(part), progress):
            states = _draw(teacher, walk, part, guidance, plan.seed + first)
            save_whole(path, states, "what the teacher drew", "the parts before it are kept")
            progress(f"the teacher drew {first + len(part)}/{len(captions)}")
    machine.wait_for_everyone()
    starts = walk.rows[::SUBSTEPS]
    return Trajectories(
        torch.cat([torch.load(path, weights_only=True) for path in paths]),
        [row.level for row in starts],
        torch.tensor([row.timestep for row in starts], dtype=torch.float32),
    )


@torch.inference_mode()
def _draw(teacher: Model, walk: Table, captions: list[str], guidance: float, seed: int) -> Tensor:
    """Return `Trajectories.states` of these captions. seed: of the first."""
    engine = Engine(teacher, exact=False, rows=2 * BATCH)
    for i, caption in enumerate(captions):
        request = Request(prompt=caption, guidance_scale=guidance, steps=len(walk.rows))
        request = request.with_defaults(teacher.defaults)
        conditioning = teacher.family.encode(teacher, request)
        job = prepare(teacher, walk, conditioning, seed + i, teacher.native_size)
        job.kept = Kept(Shortcuts.of(request))
        engine.add_job(job, i)
    states = {ticket.tag: [ticket.job.view] for ticket in engine.tickets}
    while engine.tickets:  # the pictures themselves are not decoded
        stepped, failed = engine.step()
        for ticket in failed:
            raise SafelightError(f"{captions[ticket.tag]}: {ticket.error}", code="not_finite")
        for ticket in stepped:
            if ticket.job.cursor % SUBSTEPS == 0:
                states[ticket.tag].append(ticket.job.view)
            if ticket.job.done:
                engine.drop(ticket.tag)
    return torch.stack([torch.cat(states[i]) for i in range(len(captions))]).half().cpu()


def training_pair(
    taken: Trajectories, pick: Tensor, step: Tensor, schedule: SchedulerConfig
) -> tuple[Tensor, Tensor]:
    """Return the network's input and the output that it must learn.

    With that output one step of DDIM leads to the teacher's state at the next level. pick, step:
    [n], which trajectories and which of the student's steps.
    """
    sigma, norm, after, after_norm = taken.numbers[:, step, None, None, None]
    seen = taken.states[pick, step].float()
    state = seen * norm
    target = taken.states[pick, step + 1].float() * after_norm
    # DDIM's step, target = clean + after/sigma · (state − clean), solved for clean.
    kept = after / sigma
    clean = (target - kept * state) / (1 - kept)
    noise = (state - clean) / sigma
    return seen, wanted(schedule.prediction_type, clean, noise, 1 / norm.square())
