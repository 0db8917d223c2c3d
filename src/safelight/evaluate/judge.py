"""The judge: a small classifier that is trained apart, on composed scenes, and says what is on a
picture.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from safelight.train.autoencoder import to_pixels
from safelight.train.captions import RELATIONS
from safelight.train.colours import COLOURS, PAINTS
from safelight.train.devices import autocast
from safelight.train.loop import Draw, Plan, fit
from safelight.train.recipe import Scene, Scenes

PLAN = Plan(steps=3000, batch=64, learning_rate=2e-3, warmup=200, weight_decay=0.05)
POOL = 30_000
"""Scenes that it learns from: to compose one takes as long as to learn from it."""

WHOLE, FIRST, SECOND = 0, 1, 2
NOTHING = -100
"""What cross entropy takes for: no answer is wanted."""


@dataclass(frozen=True)
class Verdict:
    """Of n pictures. concepts: log-probabilities [n, 3, concepts] of what is on the whole picture,
    and, where two things were asked for, of what is at the first's and the second's place;
    backgrounds, colours, counts: the likeliest, as indices, the count from one.
    """

    concepts: Tensor
    backgrounds: Tensor
    colours: Tensor
    counts: Tensor


class Judge(nn.Module):
    """Convolutions down to 8×8 positions; each question is a linear layer on their mean over the
    whole picture or the half that it is about.
    """

    def __init__(self, concepts: int) -> None:
        super().__init__()

        def block(in_ch: int, out_ch: int, stride: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(in_ch, out_ch, 3, stride, 1, bias=False),
                nn.BatchNorm2d(out_ch),
                nn.ReLU(),
            )

        self.body = nn.Sequential(
            block(3, 32, 1),
            block(32, 64, 2),
            block(64, 64, 1),
            block(64, 128, 2),
            block(128, 128, 1),
            block(128, 256, 2),
            block(256, 256, 1),
        )
        self.concept = nn.Linear(256, concepts)
        self.background = nn.Linear(256, len(COLOURS))
        self.colour = nn.Linear(256, len(PAINTS))
        self.count = nn.Linear(256, 4)

    def forward(self, pixels: Tensor, where: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """pixels: [n, 3, 64, 64] in −1..1; where: [n, 3, 8, 8], the weights of positions for the
        three that `Verdict.concepts` speaks of.
        """
        seen = self.body(pixels)
        at = torch.einsum("nchw,nphw->npc", seen, where)
        whole = at[:, WHOLE]
        return self.concept(at), self.background(whole), self.colour(whole), self.count(whole)

    @torch.inference_mode()
    def look(self, pictures: np.ndarray[Any, Any], scenes: list[Scene]) -> Verdict:
        """pictures: uint8 [n, 64, 64, 3]; scenes: what was asked for, of which only the places
        of pairs are read.
        """
        parts = []
        for i in range(0, len(pictures), 100):
            where = torch.stack([places(scene) for scene in scenes[i : i + 100]])
            parts.append(self(to_pixels(pictures[i : i + 100]), where))
        concepts, backgrounds, colours, counts = (torch.cat(p) for p in zip(*parts, strict=True))
        return Verdict(
            concepts.log_softmax(-1),
            backgrounds.argmax(-1),
            colours.argmax(-1),
            counts.argmax(-1) + 1,
        )


def places(scene: Scene) -> Tensor:
    """Weights [3, 8, 8]: all positions, then those at the places of a pair's two things."""
    weights = torch.full((3, 8, 8), 1 / 64)
    if scene.kind == "pair" and scene.where is not None:
        right, down = RELATIONS[scene.where]
        for which, sign in ((FIRST, 1), (SECOND, -1)):
            half = torch.zeros(8, 8)
            near = slice(0, 4) if (right or down) * sign < 0 else slice(4, 8)
            half[(slice(None), near) if right else (near, slice(None))] = 1 / 32
            weights[which] = half
    return weights


def train_judge(scenes: Scenes, folder: Path, plan: Plan = PLAN) -> Judge:
    """Learns from all that scenes can show, what `embedded` is never shown included. Goes on where
    it was stopped.
    """
    torch.manual_seed(plan.seed)
    # A third faster in bfloat16 on a CPU.
    judge = Judge(len(scenes.names))
    judge.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    number = {name: i for i, name in enumerate(scenes.names)}
    pool: list[tuple[Any, Scene]] = []

    def loss_of(run: Any, draw: Draw) -> Tensor:
        if not pool:  # one that has learned all needs none
            chance = np.random.default_rng(plan.seed)
            pool.extend(
                scenes.sample(chance, held_out=bool(chance.random() < 0.1))
                for _ in range(min(POOL, plan.steps * plan.batch))
            )
        drawn = [pool[i] for i in draw.data.integers(len(pool), size=plan.batch)]
        asked = [scene for _, scene in drawn]
        pixels = to_pixels(np.stack([picture for picture, _ in drawn])).to(draw.device)
        where = torch.stack([places(scene) for scene in asked]).to(draw.device)
        truth = torch.tensor([answers(scene, number) for scene in asked]).to(draw.device)
        with autocast(draw.device):
            found = run(_worn(pixels, draw), where)
        concepts = found[0].float().flatten(0, 1)
        loss = F.cross_entropy(concepts, truth[:, :3].flatten())
        for logits, right in zip(found[1:], truth[:, 3:].T, strict=True):
            if bool((right != NOTHING).any()):
                loss = loss + F.cross_entropy(logits.float(), right)
        return loss

    weights = fit(judge, loss_of, plan, folder)
    # The averaged weights have other statistics than those that trained: measured anew.
    judge.load_state_dict(weights, strict=False)
    judge.cpu().train()
    rng = np.random.default_rng(plan.seed + 1)
    for module in judge.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # the plain mean over what comes
    with torch.no_grad():
        for _ in range(20):
            pictures, _ = scenes.batch(64, rng)
            judge.body(to_pixels(pictures))
    return judge.eval().requires_grad_(False)


def answers(scene: Scene, number: dict[str, int]) -> tuple[int, ...]:
    """Concepts on the whole, at the first place and at the second; background, colour, count − 1;
    NOTHING where the question makes no sense.
    """
    first, *others = (number[concept] for concept in scene.concepts)
    concepts = (NOTHING, first, others[0]) if others else (first, NOTHING, NOTHING)
    if scene.kind == "pair" and scene.where == "next to":
        concepts = (NOTHING,) * 3
    background = list(COLOURS).index(scene.background)
    colour = NOTHING if scene.colour is None else PAINTS.index(scene.colour)
    return (*concepts, background, colour, max(scene.count, len(scene.concepts)) - 1)


def _worn(pixels: Tensor, draw: Draw) -> Tensor:
    """Half of them blurred, all with a little noise: as drawn by a small model, not composed."""
    soft = F.avg_pool2d(F.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, 1)
    share = torch.rand(len(pixels), 1, 1, 1, generator=draw.noise).to(draw.device)
    share = (2 * share - 1).clamp(min=0)
    return pixels + share * (soft - pixels) + 0.05 * draw.normal(pixels.shape)
