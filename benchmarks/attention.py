"""Measure whether attention maps show where things are: twenty prompts of two things each.

    python benchmarks/attention.py [--model embedded] [--json]

Each prompt asks for one thing on one half of the picture and for another on the other half. A map's
figure is the share of its mass on the half where its thing was asked for. By chance that is 50 %,
and half of the maps have more than that. The figures are printed for each layer of cross-attention,
for the mean of all, and for those that `safelight explain` shows, over all steps and over each
quarter of them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from itertools import chain

from torch import Tensor

import safelight
from safelight.explain.attention import recorded, telling_layers, word_maps
from safelight.nets.layers import BasicTransformerBlock
from safelight.nets.unet import UNet2DConditionModel
from safelight.prompt.places import words_of

# Other things than those that served to choose the layers that are shown.
THINGS = (
    ("a fox", "a doughnut"),
    ("a panda", "a bus"),
    ("a tiger", "a pineapple"),
    ("a frog", "a strawberry"),
    ("a pig", "a guitar"),
)
RELATIONS = ("above", "below", "to the left of", "to the right of")
STEPS = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    given = parser.parse_args()
    found: dict[str, list[float]] = {}
    model = safelight.load(given.model)
    prompts = [(first, relation, second) for first, second in THINGS for relation in RELATIONS]
    for seed, prompt in enumerate(prompts):
        for name, shares in measure(model, *prompt, seed).items():
            found.setdefault(name, []).extend(shares)
    figures = {
        name: {
            "share": round(statistics.mean(shares), 3),
            "more than half": round(sum(share > 0.5 for share in shares) / len(shares), 3),
        }
        for name, shares in found.items()
    }
    if given.json:
        sys.stdout.write(json.dumps(figures) + "\n")
        return
    width = max(map(len, figures))
    sys.stdout.write(f"{'':{width}}  share  more than half, of {2 * len(prompts)} maps\n")
    for name, told in figures.items():
        line = f"{name:{width}}  {told['share']:5.1%}  {told['more than half']:5.1%}\n"
        sys.stdout.write(line)


def measure(
    model: safelight.Model, first: str, relation: str, second: str, seed: int
) -> dict[str, list[float]]:
    """Return the shares of the first thing and of the second, for each layer or group of layers."""
    prompt = f"{first} {relation} {second}"
    unet = model.unet
    assert isinstance(unet, UNet2DConditionModel)
    assert model.tokenizer is not None
    layers = {
        name: module.attn2
        for name, module in unet.named_modules()
        if isinstance(module, BasicTransformerBlock)
    }
    with recorded(layers.values()) as weights:
        model.generate(prompt, sampler="dpmpp_2m", steps=STEPS, guidance_scale=4.0, seed=seed)
    by_layer = {name: weights[i :: len(layers)] for i, name in enumerate(layers)}
    telling = telling_layers(unet)
    shown = [by_layer[name] for name, layer in layers.items() if layer in telling]
    parts = by_layer | {"all layers": weights, "shown": list(chain.from_iterable(shown))}
    quarter = STEPS // 4
    for i in range(4):
        now = (one[i * quarter : (i + 1) * quarter] for one in shown)
        parts[f"shown, steps {i * quarter + 1} to {(i + 1) * quarter}"] = list(
            chain.from_iterable(now)
        )

    words = words_of(model.tokenizer, prompt)
    nouns = [first.split()[-1], second.split()[-1]]
    named = [next(word for word in words if word.text == noun) for noun in nouns]
    factor = 1 if model.vae is None else model.vae.config.factor
    height, width = (side // factor for side in model.native_size[::-1])
    shares = {}
    for name, part in parts.items():
        maps = word_maps(part, named, (height, width))
        assert maps is not None
        shares[name] = [share(maps[0], relation, True), share(maps[1], relation, False)]
    return shares


def share(found: Tensor, relation: str, first: bool) -> float:
    """Return the share of a map [h, w] on the half for the first thing, or for the second."""
    along = found.sum(1) if relation in ("above", "below") else found.sum(0)
    early = (relation in ("above", "to the left of")) == first
    half = len(along) // 2
    return float((along[:half] if early else along[-half:]).sum() / along.sum())


if __name__ == "__main__":
    main()
