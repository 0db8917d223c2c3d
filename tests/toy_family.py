"""A family of models in one file: another text encoder, another network, flow matching.

`tests/test_families.py` proves the structure with it; nothing in src/ knows it. It has one text
state for each word of a prompt, and its network reads a pooled state and the picture's size.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from safelight.families import Conditioning, Family, Part
from safelight.model import Model
from safelight.nets.config import NetConfig
from safelight.nets.reuse import Reuse
from safelight.request import Request
from safelight.sampling import Grid, Level, Table, find
from safelight.weights.folder import Folder


@dataclass(frozen=True)
class EncoderConfig(NetConfig):
    letters: int = 128
    width: int = 12


class ToyEncoder(nn.Module):
    """A recurrent network over letters: one state a word, and their mean."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.letters = nn.Embedding(config.letters, config.width)
        self.mix = nn.Linear(config.width, config.width)

    def forward(self, words: list[list[int]]) -> Tensor:
        states = []
        for word in words:
            state = torch.zeros(1, self.config.width)
            for letter in word:
                state = torch.tanh(self.mix(state) + self.letters(torch.tensor([letter])))
            states.append(state)
        return torch.stack(states, dim=1)


@dataclass(frozen=True)
class TransformerConfig(NetConfig):
    sample_size: int = 64
    out_channels: int = 3
    width: int = 12


class ToyTransformer(nn.Module):
    """Velocity from pixels, time, words, pooled words and size."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.into = nn.Conv2d(3, config.width, 3, padding=1)
        self.told = nn.Linear(config.width + 3, config.width)
        self.key = nn.Linear(config.width, config.width)
        self.out = nn.Conv2d(config.width, 3, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, tokens: Tensor, pooled: Tensor, size: Tensor) -> Tensor:
        told = self.told(torch.cat([pooled, t[:, None], size], dim=1))
        x = self.into(x) + told[..., None, None]
        weights = torch.einsum("bchw,bnc->bnhw", x, self.key(tokens)).softmax(1)
        return self.out(torch.tanh(x + torch.einsum("bnhw,bnc->bchw", weights, tokens)))


class Toy(Family):
    name = "toy"
    title = "toys"
    pipelines = ("ToyPipeline",)
    parts = {  # noqa: RUF012
        "transformer": Part("toy_family", "ToyTransformer", "TransformerConfig"),
        "encoder": Part("toy_family", "ToyEncoder", "EncoderConfig", stem="model"),
    }
    tokenizers = {"words": ("Words",)}  # noqa: RUF012
    network = "transformer"
    conditioned_on = ("prompt", "negative_prompt", "guidance_scale", "width", "height")
    defaults = {"sampler": "euler", "steps": 4}  # noqa: RUF012

    def native_size(self, configs: Mapping[str, Any]) -> tuple[int, int]:
        return (configs["transformer"].sample_size,) * 2

    def load_tokenizers(
        self, folder: Folder | None, configs: Mapping[str, Any], names: Set[str] | None = None
    ) -> dict[str, Any]:
        assert folder is not None
        letters = (folder.json("words/letters.json") or {})["letters"]
        return {"words": lambda text: [[letters.index(c) for c in word] for word in text.split()]}

    def encode(self, model: Model, request: Request) -> Conditioning:
        texts = [request.prompt]
        if request.guidance_scale > 1:
            texts.insert(0, request.negative_prompt)
        states = [model.parts["encoder"](model.parts["words"](text) or [[]]) for text in texts]
        pooled = torch.cat([state.mean(1) for state in states])
        most = max(state.shape[1] for state in states)
        padded = [
            torch.cat([s, s[:, -1:].expand(-1, most - s.shape[1], -1)], dim=1) for s in states
        ]
        size = torch.tensor([[request.width or 0, request.height or 0]]) / 64
        return Conditioning(
            torch.cat(padded), pooled, size.repeat(len(texts), 1), request.guidance_scale
        )

    def table(self, model: Model, request: Request) -> Table:
        assert request.steps is not None
        times = [1 - i / request.steps for i in range(request.steps + 1)]
        grid = Grid(tuple(Level(1 - t, t) for t in times), tuple(times[:-1]), 1.0)
        skip = request.steps - round(request.steps * (request.strength or 1.0))
        sampler = find(request.sampler)
        return Table(tuple(sampler.function(sampler.formula)(grid, skip)), grid.noise_scale)

    def call(
        self,
        model: Model,
        inputs: list[Tensor],
        timesteps: list[float],
        conditionings: list[Conditioning],
        reuse: Reuse | None = None,
    ) -> Tensor:
        counts = [c.evaluations for c in conditionings]
        x = torch.cat([x.expand(n, -1, -1, -1) for x, n in zip(inputs, counts, strict=True)])
        t = torch.tensor(timesteps).repeat_interleave(torch.tensor(counts))
        told = (
            torch.cat([getattr(c, name) for c in conditionings])
            for name in ("tokens", "pooled", "sizes")
        )
        return model.network(x, t, *told)

    def clean(self, model: Model, state: Tensor, level: Level, output: Tensor) -> Tensor:
        return state - level.sigma * output

    def example(self, model: Model) -> Conditioning:
        width = model.network.config.width
        return Conditioning(torch.ones(1, 2, width), torch.ones(1, width), torch.ones(1, 2))


def toy_folder(path: Path) -> Path:
    """Write a toy model with random weights."""
    index = {
        "_class_name": "ToyPipeline",
        "transformer": ["toys", "ToyTransformer"],
        "encoder": ["toys", "ToyEncoder"],
        "words": ["toys", "Words"],
        "scheduler": ["toys", "Flow"],
    }
    letters = "abcdefghijklmnopqrstuvwxyz"
    files = {
        "model_index.json": index,
        "transformer/config.json": {"width": 12},
        "encoder/config.json": {"width": 12},
        "words/letters.json": {"letters": letters},
        "scheduler/scheduler_config.json": {},
    }
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(json.dumps(content))
    torch.manual_seed(0)
    for net, name in (
        (ToyTransformer(TransformerConfig()), "transformer/diffusion_pytorch_model"),
        (ToyEncoder(EncoderConfig()), "encoder/model"),
    ):
        weights = {key: 3 * value for key, value in net.state_dict().items()}
        save_file(weights, path / f"{name}.safetensors")
    return path
