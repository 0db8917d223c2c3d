"""Train a model that draws from noise alone, on a folder of pictures or on the digits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from safelight.errors import SafelightError
from safelight.nets.unet2d import UNet2DConfig
from safelight.sampling.schedule import SchedulerConfig
from safelight.train.denoiser import train_unconditional
from safelight.train.devices import accelerator, memory_told
from safelight.train.export import export_unconditional, replacing, writing
from safelight.train.folder import check_apart, digest, digits, pictures, read
from safelight.train.loop import check_plan
from safelight.train.networks import PIXELS, PIXELS_SCHEDULER
from safelight.train.plan import Plan
from safelight.train.sheet import draw_sheet

DIGITS = "digits"
CHECKPOINT_EVERY = 500


@memory_told()
def unconditional(source: str, out: Path, plan: Plan, *, size: int, native: bool = False) -> Path:
    """Train on the pictures of a folder, or on "digits"; return the folder out/model.

    size: side of the squares that pictures are cut to. Goes on where it was stopped. Raises
    SafelightError if there is nothing to learn from.
    """
    if size % 8 or not 16 <= size <= 256:
        raise SafelightError(f"size {size}: expected a multiple of 8 from 16 to 256")
    if source == DIGITS:
        squares = digits(size)
    else:
        check_apart(Path(source), out)
        squares = read(pictures(Path(source)), size)
    plan = replace(plan, recipe=digest(squares, []))
    check_plan(out, plan, native=native)
    made = out / "model"

    def show(net: Any, step: int) -> Image.Image:
        with writing(made):
            with replacing(made) as new:
                export_unconditional(new, net, PIXELS_SCHEDULER, {})
            return draw_sheet(made, out / f"step-{step:06}.png")

    net = train_unconditional(
        network(size),
        SchedulerConfig.from_dict(PIXELS_SCHEDULER),
        lambda draw, n: squares[draw.data.integers(len(squares), size=n)],
        plan,
        out,
        every=CHECKPOINT_EVERY,
        native=native,
        on_checkpoint=show,
    )
    if accelerator().is_main_process:  # an earlier run may have ended before it was written
        show(net, plan.steps)
    return made


def network(size: int) -> UNet2DConfig:
    """Return the config: three levels, the last with attention; a fourth above 64 pixels."""
    shapes = PIXELS
    if size <= 64:
        return replace(shapes, sample_size=size)
    return replace(
        shapes,
        sample_size=size,
        block_out_channels=(32, *shapes.block_out_channels),
        down_block_types=("DownBlock2D", *shapes.down_block_types),
        up_block_types=(*shapes.up_block_types, "UpBlock2D"),
    )
