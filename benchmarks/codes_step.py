"""Time a step of FLUX.1's shapes with weights in GGUF, beside diffusers.

    python benchmarks/codes_step.py [--kind Q8_0] [--side 512] [--rounds 3]

The transformer has its published width, few of its layers and random weights. Sides: Safelight with
packed weights in bfloat16, Safelight with codes that are decoded at each use, diffusers in
bfloat16, diffusers with codes. Each is measured in processor time, in turns.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import diffusers
import gguf
import numpy as np
import torch
from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter
from torch import Tensor, nn

from safelight.families.flow_files import FLUX_SCHNELL
from safelight.fast import accelerate, keep_codes, takes_codes
from safelight.fast.quantised import of_ggml
from safelight.nets.flux import FluxConfig, FluxTransformer2DModel

LAYERS = {"num_layers": 2, "num_single_layers": 4}
Sides = dict[str, Callable[[], Tensor]]


def codes_of(weight: Tensor, kind: str) -> Tensor:
    """Return a weight's codes, or random ones of a type that the `gguf` package cannot write."""
    type_ = gguf.GGMLQuantizationType[kind]
    try:
        return torch.from_numpy(gguf.quants.quantize(weight.float().numpy(), type_))
    except NotImplementedError:
        numbers, size = gguf.GGML_QUANT_SIZES[type_]
        rows, columns = weight.shape
        codes = np.random.default_rng(0).integers(0, 256, (rows, columns // numbers, size), "uint8")
        scales = codes.view("<f2")  # random bytes hold NaN and huge scales
        scales[...] = np.where(np.isfinite(scales) & (abs(scales) < 1), scales, np.float16(0.01))
        return torch.from_numpy(scales.view("uint8").reshape(rows, -1))


def sides(kind: str, side: int) -> Sides:
    """Return a step of each side."""
    config = {**FLUX_SCHNELL.configs["transformer"], **LAYERS}
    theirs = diffusers.FluxTransformer2DModel(**config).to(torch.bfloat16).eval()
    torch.manual_seed(0)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.02)
    state = theirs.state_dict()
    ours = [_ours(config, state) for _ in range(2)]
    quantised = takes_codes(ours[1])
    codes = {name: codes_of(state[name], kind) for name in quantised if _fits(state[name], kind)}
    kept = {n: of_ggml(c, kind, tuple(state[n].shape)) for n, c in codes.items()}
    keep_codes(ours[1], kept)
    for net in ours:
        accelerate(net, torch.bfloat16)
    coded = diffusers.FluxTransformer2DModel(**config).to(torch.bfloat16).eval()
    coded.load_state_dict(state)
    _with_codes(coded, codes, kind)

    latents = torch.randn(1, 16, side // 8, side // 8, dtype=torch.bfloat16)
    context = torch.randn(1, 256, 4096, dtype=torch.bfloat16)
    pooled, when = torch.randn(1, 768, dtype=torch.bfloat16), torch.tensor([500.0])
    patches = side // 16
    places = torch.zeros(patches, patches, 3)
    places[..., 1] += torch.arange(patches)[:, None]
    places[..., 2] += torch.arange(patches)[None]
    given = {
        "hidden_states": torch.randn(1, patches**2, 64, dtype=torch.bfloat16),
        "encoder_hidden_states": context,
        "pooled_projections": pooled,
        "timestep": torch.tensor([0.5], dtype=torch.bfloat16),
        "img_ids": places.reshape(-1, 3),
        "txt_ids": torch.zeros(256, 3),
    }
    return {
        "safelight, packed": lambda: ours[0](latents, when, context, pooled),
        f"safelight, {kind}": lambda: ours[1](latents, when, context, pooled),
        "diffusers, bfloat16": lambda: theirs(**given).sample,
        f"diffusers, {kind}": lambda: coded(**given).sample,
    }


def tell(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _ours(config: dict[str, Any], state: dict[str, Tensor]) -> nn.Module:
    net = FluxTransformer2DModel(FluxConfig.from_dict(config))
    net.load_state_dict(state, assign=True)
    return net.eval().requires_grad_(False)


def _fits(weight: Tensor, kind: str) -> bool:
    return weight.shape[1] % gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][0] == 0


def _with_codes(net: nn.Module, codes: dict[str, Tensor], kind: str) -> None:
    """Give a network of diffusers linear layers that decode their weights at each use."""
    for name, weight in codes.items():
        path, _, leaf = name.removesuffix(".weight").rpartition(".")
        parent = net.get_submodule(path)
        old: Any = getattr(parent, leaf)
        new = GGUFLinear(old.in_features, old.out_features, True, torch.bfloat16)
        new.weight = GGUFParameter(weight, quant_type=gguf.GGMLQuantizationType[kind])
        new.bias = old.bias
        setattr(parent, leaf, new)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kind", default="Q8_0")
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    steps = sides(asked.kind, asked.side)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(asked.rounds + 1):
        for name, step in steps.items():
            began, began_wall = time.process_time(), time.perf_counter()
            step()
            if number:  # the first packs weights
                times[name].append(time.process_time() - began)
            tell(f"round {number}: {name} {time.perf_counter() - began_wall:.2f} s")
    base = statistics.median(times["safelight, packed"])
    for name, found in times.items():
        middle = statistics.median(found)
        tell(f"{name:24} {middle:6.2f} s of processor time, {middle / base:.2f} times")


if __name__ == "__main__":
    main()
