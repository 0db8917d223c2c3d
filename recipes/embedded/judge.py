"""The judge: a classifier, trained apart on composed scenes, that says what a picture shows."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from recipes.embedded.captions import EITHER_SIDE, RELATIONS, SCENES
from recipes.embedded.colours import COLOURS, PAINTS
from recipes.embedded.pool import Pool
from recipes.embedded.scenes import Scene
from recipes.embedded.stage import Stage
from safelight.errors import SafelightError
from safelight.train.autoencoder import to_pixels
from safelight.train.devices import autocast
from safelight.train.loop import Draw, fit
from safelight.train.plan import Plan

PLAN = Plan(steps=6000, batch=64, learning_rate=2e-3, warmup=200, weight_decay=0.05)
POOL = 40_000
"""Scenes that it learns from."""

KEPT = Path(__file__).with_name("judge.safetensors")
"""The judge of the figures in docs/model-card.md."""

LOOKED_AT = 128
"""Pixels a side that it sees."""

GROUNDS = (*COLOURS, *SCENES)
CELLS = 8
WHOLE, FIRST, SECOND = 0, 1, 2
NOTHING = -100
"""What cross entropy takes for "no answer is wanted"."""


@dataclass(frozen=True)
class Verdict:
    """Answers on n pictures.

    concepts: log-probabilities [n, 3, concepts] of what is on the whole picture, and, where two
    things were asked for, of what is at the first's and the second's place. grounds, colours and
    counts are the likeliest, as indices; the count starts from one.
    """

    concepts: Tensor
    grounds: Tensor
    colours: Tensor
    counts: Tensor


def _block(in_ch: int, out_ch: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_ch, out_ch, 3, stride, 1, bias=False), nn.BatchNorm2d(out_ch), nn.ReLU()
    )


class Residual(nn.Module):
    """Two convolutions whose result is added to their input; at first it is zero."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = _block(channels, channels)
        self.second = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        nn.init.zeros_(self.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.norm(self.second(self.first(x))))


class Judge(nn.Module):
    """Convolutions down to 8×8 positions, and a linear layer for each question.

    The layer reads the mean over the whole picture, or over the half that the question is about.
    For things and colours, `attend` gives the positions' weights in that mean.
    """

    def __init__(self, concepts: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _block(3, 32, 2),
            _block(32, 64, 2),
            _block(64, 64),
            _block(64, 128, 2),
            _block(128, 128),
            _block(128, 256, 2),
            _block(256, 256),
            _block(256, 256),
            Residual(256),
            Residual(256),
        )
        self.attend = nn.Linear(256, 1)
        nn.init.zeros_(self.attend.weight)
        self.concept = nn.Linear(256, concepts)
        self.ground = nn.Linear(256, len(GROUNDS))
        self.colour = nn.Linear(256, len(PAINTS))
        self.count = nn.Linear(256, 4)

    def forward(self, pixels: Tensor, where: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return logits of concepts [n, 3, concepts], and of ground, colour and count [n, answers].

        pixels: [n, 3, 128, 128] in −1..1. where: [n, 3, 8, 8], the weights of positions for the
        three places of `Verdict.concepts`.
        """
        seen = self.body(pixels)
        scores = self.attend(seen.movedim(1, -1)).movedim(-1, 1).float() + where.log()
        looks = scores.flatten(2).softmax(-1).unflatten(2, where.shape[2:])
        at = torch.einsum("nchw,nphw->npc", seen, looks.to(seen.dtype))
        whole = seen.mean((2, 3))
        return self.concept(at), self.ground(whole), self.colour(at[:, WHOLE]), self.count(whole)

    @torch.inference_mode()
    def look(self, pictures: np.ndarray[Any, Any] | Tensor, scenes: list[Scene]) -> Verdict:
        """Return answers on pictures, uint8 [n, side, side, 3].

        scenes: what was asked for; only the places of pairs are read.
        """
        parts = []
        device = next(self.parameters()).device
        for i in range(0, len(pictures), 100):
            where = torch.stack([places(scene) for scene in scenes[i : i + 100]])
            parts.append(self(seen(pictures[i : i + 100]).to(device), where.to(device)))
        concepts, grounds, colours, counts = (
            torch.cat(p).float().cpu() for p in zip(*parts, strict=True)
        )
        return Verdict(
            concepts.log_softmax(-1), grounds.argmax(-1), colours.argmax(-1), counts.argmax(-1) + 1
        )


def seen(pictures: np.ndarray[Any, Any] | Tensor) -> Tensor:
    """Return pictures, uint8 [n, side, side, 3], as the judge sees them: [n, 3, 128, 128]."""
    pixels = to_pixels(pictures)
    if pixels.shape[-1] >= 2 * LOOKED_AT:
        return F.avg_pool2d(pixels, pixels.shape[-1] // LOOKED_AT)
    return F.interpolate(pixels, size=(LOOKED_AT, LOOKED_AT), mode="bilinear")


def places(scene: Scene) -> Tensor:
    """Return weights [3, 8, 8]: all positions, then those at the places of a pair's two things."""
    weights = torch.full((3, CELLS, CELLS), 1 / CELLS**2)
    if scene.kind == "pair" and scene.where is not None:
        right, down = RELATIONS[scene.where]
        for which, sign in ((FIRST, 1), (SECOND, -1)):
            half = torch.zeros(CELLS, CELLS)
            near = slice(0, CELLS // 2) if (right or down) * sign < 0 else slice(CELLS // 2, CELLS)
            half[(slice(None), near) if right else (near, slice(None))] = 2 / CELLS**2
            weights[which] = half
    return weights


def judge_of(stage: Stage, path: Path, out: Path, plan: Plan | None = None) -> Judge:
    """Return the judge of `out`, or the kept one, or else train one.

    The weights are those of out/judge.safetensors. If there is no such file, they are the ones kept
    beside this file, if these know the same things and no plan is given. Else a judge is trained,
    by the plan or PLAN, and written to out/judge.safetensors.

    Raises SafelightError if the judge of `out` knows other things.
    """
    file, known = out / "judge.safetensors", answers_known(list(stage.scenes.names))
    if file.exists():
        if _known(file) != known:
            raise SafelightError(f"{file} was trained on other things: remove it, or take its data")
        return _loaded(file, len(stage.scenes.names))
    if plan is None and _known(KEPT) == known:
        return _loaded(KEPT, len(stage.scenes.names))
    out.mkdir(parents=True, exist_ok=True)
    judge = train_judge(stage, path, out / "judge", plan or PLAN)
    weights = {name: t.half().contiguous() for name, t in judge.state_dict().items()}
    save_file(weights, file, metadata={"answers": known, "trained_on": stage.scenes.sha256})
    return _loaded(file, len(stage.scenes.names))


def answers_known(names: list[str]) -> str:
    """Return a hash of what the judge's answers stand for. names: of all concepts, in order.

    The pictures are left out: their last bits differ from machine to machine.
    """
    return hashlib.sha256(json.dumps([names, GROUNDS, list(PAINTS)]).encode()).hexdigest()


def _known(file: Path) -> str | None:
    with safe_open(file, "pt") as opened:
        return (opened.metadata() or {}).get("answers")


def _loaded(file: Path, concepts: int) -> Judge:
    judge = Judge(concepts)
    try:
        judge.load_state_dict(load_file(file))
    except RuntimeError:
        raise SafelightError(f"{file} is a judge of other layers: remove it") from None
    return judge.float().eval().requires_grad_(False)


def train_judge(stage: Stage, path: Path, folder: Path, plan: Plan) -> Judge:
    """Return a judge trained on all that scenes can show, with the held-out combinations.

    It begins with the weights of the kept one, if that knows the same things. A training that was
    stopped goes on.
    """
    torch.manual_seed(plan.seed)
    judge = Judge(len(stage.scenes.names))
    if _known(KEPT) == answers_known(list(stage.scenes.names)):
        judge.load_state_dict(load_file(KEPT))
    judge.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    number = {name: i for i, name in enumerate(stage.scenes.names)}
    whole = min(POOL, plan.steps * plan.batch) if plan.steps else POOL
    pools = [
        Pool(stage, path, round(share * whole), seed, **given)
        for share, seed, given in (
            (0.5, 11, {}),
            (0.16, 14, {"kind": "pair"}),
            (0.09, 15, {"kind": "several"}),
            (0.09, 16, {"kind": "coloured"}),
            (0.08, 12, {"kind": "one", "held_out": "style"}),
            (0.08, 13, {"kind": "coloured", "held_out": "colour"}),
        )
    ]
    scenes = [scene for pool in pools for scene in pool.scenes]
    pixels = torch.cat([seen(some).half() for p in pools for some in p.pictures.split(512)])
    where = torch.stack([places(scene) for scene in scenes]).to(pixels.device)
    truth = torch.tensor([answers(scene, number) for scene in scenes]).to(pixels.device)
    del pools

    def loss_of(run: Any, draw: Draw) -> Tensor:
        pick = torch.from_numpy(draw.data.integers(len(scenes), size=plan.batch))
        pick = pick.to(pixels.device)
        right = truth[pick]
        with autocast(draw.device):
            found = run(_worn(pixels[pick].float(), draw), where[pick])
        concepts = found[0].float().flatten(0, 1)
        loss = _error(concepts, right[:, :3].flatten())
        for logits, answer in zip(found[1:], right[:, 3:].T, strict=True):
            loss = loss + _error(logits.float(), answer)
        return loss

    fit(judge, loss_of, plan, folder)
    # The averaged weights have other batch statistics than the trained ones; measure them again.
    judge.train()
    for module in judge.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # the plain mean over all batches
    with torch.no_grad():
        for some in pixels[torch.randperm(len(pixels))[:2000]].split(100):
            judge.body(some.float())
    return judge.cpu().eval().requires_grad_(False)


def _error(logits: Tensor, right: Tensor) -> Tensor:
    """Return the cross entropy over the questions that were asked."""
    asked = (right != NOTHING).sum().clamp(min=1)
    return F.cross_entropy(logits, right, reduction="sum", ignore_index=NOTHING) / asked


def answers(scene: Scene, number: dict[str, int]) -> tuple[int, ...]:
    """Return the right answers, NOTHING where a question makes no sense.

    They are the concepts on the whole picture, at the first place and at the second; ground, colour
    and count − 1.
    """
    first, *others = (number[concept] for concept in scene.concepts)
    concepts = (NOTHING, first, others[0]) if others else (first, NOTHING, NOTHING)
    if scene.kind == "pair" and scene.where in EITHER_SIDE - {"and"}:
        concepts = (NOTHING,) * 3
    ground = GROUNDS.index(scene.ground)
    colour = NOTHING
    if scene.colour is not None and not others:
        colour = PAINTS.index(scene.colour)
    return (*concepts, ground, colour, max(scene.count, len(scene.concepts)) - 1)


def _worn(pixels: Tensor, draw: Draw) -> Tensor:
    """Return pixels with a little noise, and half of them blurred: as drawn, not composed."""
    soft = F.avg_pool2d(F.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, 1)
    share = draw.uniform([len(pixels), 1, 1, 1])
    share = (2 * share - 1).clamp(min=0)
    return pixels + share * (soft - pixels) + 0.05 * draw.normal(pixels.shape)
