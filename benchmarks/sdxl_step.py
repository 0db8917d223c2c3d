"""Compare a guided step of SDXL's network, at 1024×1024, in Safelight, OpenVINO and diffusers.

    python benchmarks/sdxl_step.py [--only safelight] [--rounds 2]

The weights are random, the precision is bfloat16. Each program has a process of its own, and they
take turns: OpenVINO's conversion alone needs 17 GB. Each process does three steps; the first packs
the weights and does not count.
"""

import argparse
import importlib
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

PROGRAMS = ("safelight", "openvino", "diffusers")
STEPS = 3


def main() -> None:
    """Start a process for each program and round, and print the medians."""
    parser = argparse.ArgumentParser(description="A guided step of SDXL's network alone.")
    parser.add_argument("--only", action="append", choices=PROGRAMS)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--measure", choices=PROGRAMS, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.rounds < 1:
        parser.error(f"--rounds {asked.rounds}: expected 1 or more")
    if asked.measure:
        say(" ".join(f"{seconds:.2f}" for seconds in measured(asked.measure)))
        return
    found: dict[str, list[float]] = {name: [] for name in asked.only or PROGRAMS}
    for number in range(asked.rounds):
        for name, seconds in found.items():
            command = [sys.executable, __file__, "--measure", name]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            last = done.stdout.splitlines()[-1]
            seconds += map(float, last.split())
            say(f"round {number + 1}: {name} {last} s")
    medians = {name: statistics.median(seconds) for name, seconds in found.items()}
    for name, median in medians.items():
        say(f"{name:10} {median:6.2f} s  {median / next(iter(medians.values())):.2f} x")


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def measured(name: str) -> list[float]:
    """Return the seconds of each step after the first."""
    import torch

    with torch.no_grad():
        step, taken = _step(name), []
        for _ in range(STEPS):
            began = time.perf_counter()
            step()
            taken.append(time.perf_counter() - began)
    return taken[1:]


def _step(name: str) -> Callable[[], Any]:
    """Return a function that computes the noise of two rows, with the prompt and without."""
    import torch

    from safelight.bench import networks
    from safelight.families import sdxl
    from safelight.nets.unet import UNet2DConditionModel, UNetConfig

    family = next(variant for variant in sdxl.VARIANTS if variant.name == "sdxl")
    config = dict(family.configs["unet"])
    ours = networks.meta(UNet2DConditionModel, UNetConfig.from_dict(config))
    # OpenVINO traces 16-bit weights only in float16; it still computes in bfloat16.
    dtype = torch.float16 if name == "openvino" else torch.bfloat16
    state = networks.weights(ours, dtype)
    some = torch.Generator().manual_seed(1)
    x = torch.randn(2, 4, 128, 128, generator=some)
    words = torch.randn(2, 77, 2048, generator=some)
    pooled = torch.randn(2, 1280, generator=some)
    sizes = torch.tensor([[1024.0, 1024, 0, 0, 1024, 1024]] * 2)
    if name == "safelight":
        net = networks.ours(ours, state, dtype)
        x, words, pooled = x.to(dtype), words.to(dtype), pooled.to(dtype)
        t = torch.tensor([500.0])
        return lambda: net(x, t, words, pooled=pooled, sizes=sizes)
    theirs = networks.theirs("UNet2DConditionModel", config, state, dtype)
    if name == "diffusers":
        x, words, pooled = x.to(dtype), words.to(dtype), pooled.to(dtype)
        x = x.to(memory_format=torch.channels_last)
        also = {"text_embeds": pooled, "time_ids": sizes.to(dtype)}
        t = torch.tensor(500.0)
        return lambda: theirs(x, t, words, added_cond_kwargs=also).sample

    class Step(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = theirs

        def forward(self, x: Any, t: Any, words: Any, pooled: Any, sizes: Any) -> Any:
            also = {"text_embeds": pooled, "time_ids": sizes}
            return self.net(x, t, words, added_cond_kwargs=also).sample

    patch_model: Any = importlib.import_module("openvino.frontend.pytorch.patch_model")
    with warnings.catch_warnings():  # tracing warns about fixed shapes; here they are fixed
        warnings.simplefilter("ignore")
        step = Step()
        patch_model.__make_16bit_traceable(step)
    given = (x, torch.tensor([500.0, 500.0]), words, pooled, sizes)
    run = networks.by_openvino(step, given, "openvino bfloat16")
    return lambda: run(*given)


if __name__ == "__main__":
    main()
