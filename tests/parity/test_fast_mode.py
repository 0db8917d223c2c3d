"""The fast mode against diffusers, whose network computes everything.

Hooks put in what our network takes from an earlier step.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_pictures import draw, ours, scheduler, theirs

from tests.crossed import crossed

STEPS = 9
PROMPT, NEGATIVE, SCALE = "a red apple on a table", "a dog", 5.0
NO_GUIDANCE = 1 + 1e-9
"""A guidance scale at which diffusers' pipeline still computes both rows."""


@dataclass
class Put:
    """Hooks for one picture of diffusers' pipeline."""

    every: int = 1
    branch: int = 0
    start: float = 0.0
    end: float = 1.0
    text: float = 1.0
    step: int = -1
    kept: dict[Any, torch.Tensor] = field(default_factory=dict)

    def guided(self, step: int) -> bool:
        return self.start <= step / STEPS < self.end

    def begin(self, *_: Any) -> None:
        self.step += 1

    @property
    def full(self) -> bool:
        turned = self.step > 0 and self.guided(self.step) != self.guided(self.step - 1)
        return self.step == 0 or (STEPS - 1 - self.step) % self.every == 0 or turned

    def deep(self, resnet: Any, given: tuple[Any, ...], channels: int) -> tuple[Any, ...]:
        x = given[0]
        if self.full:
            self.kept["deep"] = x[:, :channels]
        return torch.cat([self.kept["deep"], x[:, channels:]], dim=1), *given[1:]

    def told(self, layer: Any, skip: int, found: torch.Tensor) -> torch.Tensor:
        """Keep a layer's output, or return the kept one. skip: index of the skip beside it."""
        begins = self.step > 0 and self.guided(self.step) and not self.guided(self.step - 1)
        if (self.step / STEPS < self.text or begins) and (self.full or skip <= self.branch):
            # Without guidance ours computes the prompt's row alone.
            self.kept[layer] = found if self.guided(self.step) else found[1:].expand_as(found)
        kept = self.kept[layer]
        return kept if self.guided(self.step) else kept.mean(0, keepdim=True).expand_as(kept)


def beside(name: str, unet: Any) -> int:
    """Return the index of the skip that a layer gives or takes; the middle's is beyond all."""
    part, i, _, j = name.split(".")[:4]
    layers = unet.config.layers_per_block + 1
    if part == "mid_block":
        return layers * len(unet.up_blocks)
    place = layers * int(i) + int(j)
    return place + 1 if part == "down_blocks" else layers * len(unet.up_blocks) - 1 - place


@contextmanager
def hooked(unet: Any, put: Put) -> Iterator[None]:
    layers, before = [], unet.mid_block.resnets[-1].out_channels
    for block in unet.up_blocks:
        for resnet in block.resnets:
            layers.append((resnet, before))
            before = resnet.out_channels
    resnet, channels = layers[-1 - put.branch]
    hooks = [
        unet.register_forward_pre_hook(put.begin),
        resnet.register_forward_pre_hook(lambda m, a: put.deep(m, a, channels)),
    ]
    if put.text < 1:
        for name, layer in unet.named_modules():
            if name.endswith("attn2"):
                skip = beside(name, unet)
                hooks.append(layer.register_forward_hook(lambda m, _, y, n=skip: put.told(m, n, y)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def expected(pipe: Any, put: Put) -> np.ndarray:
    def scale(step: int) -> float:
        return SCALE if put.guided(step) else NO_GUIDANCE

    def turn(pipe: Any, step: int, *_: Any) -> dict[str, Any]:
        pipe._guidance_scale = scale(step + 1)
        return {}

    with hooked(pipe.unet, put):
        return pipe(
            PROMPT,
            negative_prompt=NEGATIVE,
            guidance_scale=scale(0),
            num_inference_steps=STEPS,
            height=64,
            width=64,
            generator=torch.Generator().manual_seed(11),
            callback_on_step_end=turn,
            output_type="latent",
        ).images.numpy()


CASES = [
    {"cache_every": 2},
    {"cache_every": 3, "cache_branch": 1},
    {"cache_every": 2, "cache_branch": 2},
    {"cache_every": 5, "cache_branch": 3},
    {"guidance_end": 0.5},
    {"guidance_start": 0.3, "guidance_end": 0.8},
    {"text_end": 0.4},
    {"cache_every": 3, "guidance_end": 0.6, "text_end": 0.4},
    {"cache_every": 4, "cache_branch": 1, "guidance_start": 0.2, "text_end": 0.1},
]


@pytest.mark.parametrize(
    ("family", "cuts", "sampler"),
    crossed(["sd1", "sd2"], CASES, ["ddim", "dpmpp_2m"]),
    ids=lambda cuts: (
        "-".join(f"{k}{v}" for k, v in cuts.items()) if isinstance(cuts, dict) else None
    ),
)
def test_what_is_taken_is_that_of_an_earlier_step(
    folders: dict[str, Path], family: str, cuts: dict[str, Any], sampler: str
) -> None:
    pipe = theirs(folders[family], "StableDiffusionPipeline")
    pipe.scheduler, held = scheduler(pipe, sampler, None), pipe.scheduler
    asked = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "guidance_scale": SCALE}
    settings = {**asked, "sampler": sampler, "steps": STEPS, "seed": 11}
    put = Put(*(cuts.get(name, default) for name, default in DEFAULTS.items()))
    try:
        reference = expected(pipe, put)
    finally:
        pipe.scheduler = held
    latents, _ = draw(ours(folders[family]), **settings, **cuts)
    plain, _ = draw(ours(folders[family]), **settings)
    error = np.linalg.norm(latents - reference)
    assert error / np.linalg.norm(reference) <= 1e-4
    assert np.linalg.norm(plain - reference) > 10 * error  # it is another picture


DEFAULTS = {
    "cache_every": 1,
    "cache_branch": 0,
    "guidance_start": 0.0,
    "guidance_end": 1.0,
    "text_end": 1.0,
}
