"""Teach a copy of a model to draw in a few steps, and without guidance.

The teacher draws pictures to captions in many small steps with guidance. The student learns to go
as far in each of its few steps as the teacher went in several, guidance included (progressive
distillation, arXiv:2202.00512, and that of guidance, arXiv:2210.03142). No pictures are needed:
what is learned from are the teacher's own ways from noise to a picture.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from safelight.denoiser import Condition, estimate
from safelight.errors import SafelightError
from safelight.sampling.levels import alphas_cumprod, sigmas_of, spaced
from safelight.model import Model
from safelight.nets.unet import UNet2DConditionModel
from safelight.picture import reason
from safelight.sampling.schedule import SchedulerConfig
from safelight.train.denoiser import wanted
from safelight.train.devices import autocast
from safelight.train.export import export_text_to_image
from safelight.train.finetune import credit, own_memory
from safelight.train.folder import digest
from safelight.train.loop import Draw, Plan, fit, progress, save_whole
from safelight.train.sheet import draw_sheet, under
from safelight.weights import load_model

SUBSTEPS = 4
"""The teacher's steps for each of the student's."""

ROWS = 64
"""Pictures that the teacher draws at once; its ways are kept after so many."""

SHEET_PROMPTS = 6


@dataclass(frozen=True)
class Ways:
    """The teacher's ways from noise to pictures.

    states: x̃ at each of the student's levels and at the end, float16 [n, steps + 1, channels, h,
      w], each level's divided by √(1 + sigma²), so that float16 holds them.
    sigmas, timesteps: of the student's steps, [steps].
    """

    states: Tensor
    sigmas: Tensor
    timesteps: Tensor


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
    """Teach a copy of `model` to draw the prompts of a file, one a line, in `drawing_steps` steps
    of ddim without guidance; write the folder out/model.

    guidance_scale: the teacher's. Goes on where it was stopped. Beside the folder, out/sheet.png
    has pictures of the first prompts by the teacher in its many steps, and by the student.
    """
    captions = read_prompts(prompts)
    teacher = load_model(model)
    if teacher.kind != "text" or teacher.tokenizer is None:
        raise SafelightError(f"{teacher.name} draws from noise alone: there is no guidance to save")
    if teacher.unet.config.in_channels != teacher.unet.config.out_channels:
        raise SafelightError(f"{teacher.name} reads a mask beside the picture: take another")
    told = f"{drawing_steps} steps, guidance {guidance_scale}"
    plan = replace(plan, recipe=digest(np.zeros(0, np.uint8), [teacher.sha256, told, *captions]))
    out.mkdir(parents=True, exist_ok=True)
    ways = teachers_ways(teacher, captions, drawing_steps, guidance_scale, out / "ways", plan)
    shown = captions[:SHEET_PROMPTS]
    if not (out / "teacher.png").exists():
        draw_sheet(model, out / "teacher.png", shown, guidance_scale=guidance_scale)

    base = load_model(model, device="cpu", dtype="float32", plain=True)
    assert isinstance(base.unet, UNet2DConditionModel)
    vae, text = base.vae, base.text_encoder
    assert vae is not None
    assert text is not None
    assert base.tokenizer is not None
    student = own_memory(base.unet).train()
    ids = torch.tensor([base.tokenizer.encode(c).ids for c in captions], dtype=torch.int32)
    made = out / "model"
    made.mkdir(exist_ok=True)
    base.tokenizer.save(made / "tokenizer")
    credit(base, made)
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
    }
    if base.words is not None:
        notes["words"] = sorted(base.words)

    def loss_of(run: Any, draw: Draw) -> Tensor:
        pick = torch.from_numpy(draw.data.integers(len(captions), size=plan.batch))
        step = torch.from_numpy(draw.data.integers(drawing_steps, size=plan.batch))
        state, target = lesson(ways, pick, step, base.scheduler)
        text.to(draw.device)
        with autocast(draw.device):
            with torch.no_grad():
                context = text(ids[pick].long().to(draw.device))
            predicted = run(
                state.to(draw.device), ways.timesteps[step].float().to(draw.device), context
            )
        return (predicted.float() - target.to(draw.device)).square().mean()

    def show(trained: Any, step: int) -> Image.Image:
        export_text_to_image(made, vae, text, trained, scheduler, notes)
        return draw_sheet(made, out / f"step-{step:06}.png", shown, **draw_with)

    student.load_state_dict(
        fit(student, loss_of, plan, out, every=250, native=native, on_checkpoint=show)
    )
    after = show(student.cpu(), plan.steps)
    under(out / "teacher.png", after).save(out / "sheet.png")
    return made


def read_prompts(path: Path) -> list[str]:
    """The lines of a text file that are not empty."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise SafelightError(f"{path} cannot be read: {reason(error)}") from None
    except UnicodeDecodeError:
        raise SafelightError(f"{path} is no UTF-8 text: expected one prompt a line") from None
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise SafelightError(f"{path} has no prompts: expected one a line")
    return found


def teachers_ways(
    teacher: Model, captions: list[str], steps: int, guidance: float, folder: Path, plan: Plan
) -> Ways:
    """Let the teacher draw each caption once; what is drawn is kept in `folder`, by the part, and
    is not drawn again when this is called again.
    """
    config = teacher.scheduler.override(timestep_spacing="trailing")
    trained = sigmas_of(alphas_cumprod(config))
    times = spaced(config, steps * SUBSTEPS)
    sigmas = [*trained[times.astype(int)], 0.0]
    folder.mkdir(exist_ok=True)
    parts = []
    for first in range(0, len(captions), ROWS):
        path = folder / f"{plan.recipe[:12]}-{first:08}.pt"
        if not path.exists():
            states = _draw(
                teacher, captions[first : first + ROWS], sigmas, times, guidance, plan.seed + first
            )
            save_whole(path, states, "what the teacher drew", "the parts before it are kept")
            progress(f"the teacher drew {min(first + ROWS, len(captions))}/{len(captions)}")
        parts.append(torch.load(path, weights_only=True))
    return Ways(
        torch.cat(parts),
        torch.tensor(sigmas[:-1:SUBSTEPS], dtype=torch.float32),
        torch.tensor(times[::SUBSTEPS], dtype=torch.float32),
    )


@torch.inference_mode()
def _draw(
    teacher: Model,
    captions: list[str],
    sigmas: list[float],
    times: Any,
    guidance: float,
    seed: int,
) -> Tensor:
    """What `Ways.states` holds, of these captions."""
    assert teacher.tokenizer is not None
    assert teacher.text_encoder is not None
    ids = torch.tensor([teacher.tokenizer.encode(text).ids for text in ["", *captions]])
    empty, *states = teacher.text_encoder(ids.to(teacher.device)).split(1)
    conditions = [Condition(torch.cat([empty, one]), guidance) for one in states]
    width, height = teacher.native_size
    factor = 1 if teacher.vae is None else teacher.vae.config.factor
    shape = len(captions), teacher.unet.config.out_channels, height // factor, width // factor
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    state = (noise * (1 + sigmas[0] ** 2) ** 0.5).to(teacher.device)
    kept = []
    for i, timestep in enumerate(times):
        sigma, after = sigmas[i], sigmas[i + 1]
        if i % SUBSTEPS == 0:
            kept.append(state / (1 + sigma**2) ** 0.5)
        n = len(captions)
        clean = torch.cat(
            estimate(teacher, list(state.split(1)), [sigma] * n, [float(timestep)] * n, conditions)
        )
        state = clean + after / sigma * (state - clean)
    return torch.stack([*kept, state], dim=1).half().cpu()


def lesson(
    ways: Ways, pick: Tensor, step: Tensor, schedule: SchedulerConfig
) -> tuple[Tensor, Tensor]:
    """Of these ways the states at these steps, as the network reads them, and what it must say
    for one step of ddim to lead to where the teacher came. pick, step: [n].
    """
    sigma = ways.sigmas[step][:, None, None, None]
    ends = torch.cat([ways.sigmas[1:], torch.zeros(1)])[step][:, None, None, None]
    scale = (1 + sigma**2).sqrt()
    seen = ways.states[pick, step].float()
    state = seen * scale
    after = ways.states[pick, step + 1].float() * (1 + ends**2).sqrt()
    # The step's own formula, state' = clean + sigma'/sigma · (state − clean), for clean.
    kept = ends / sigma
    clean = (after - kept * state) / (1 - kept)
    noise = (state - clean) / sigma
    return seen, wanted(schedule.prediction_type, clean, noise, 1 / scale.square())
