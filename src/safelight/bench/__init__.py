"""Measure how fast this machine is with Safelight and with other installed programs, in one run.

All contenders have Stable Diffusion 1.5's networks with the same random weights of unit gain. They
take turns, so that other load on the machine affects them alike, and a product of two large
matrices between them shows the processor's speed at that moment. Report ratios: each is the median
of the ratios within a round.
"""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

from safelight import processors
from safelight.bench import networks, one_step, processes, shortcuts
from safelight.bench.networks import Run
from safelight.errors import SafelightError
from safelight.fast import native_bfloat16
from safelight.weights import load_model
from safelight.weights.find import find
from safelight.weights.plan import read_plan

STEP_FLOP = 1.607e12
"""Operations of one guided step at 512×512 as it is usually computed, attention included."""


def contenders() -> list[str]:
    """Return the contenders that can run here, ours first."""
    found = ["safelight float32", "diffusers float32", "openvino float32"]
    if native_bfloat16():
        found[1:1] = ["safelight bfloat16", "diffusers bfloat16", "openvino bfloat16"]
    if importlib.util.find_spec("nncf"):
        found.append("openvino int8")
    return [name for name in found if importlib.util.find_spec(name.split()[0])]


PARTS = ("step", "decode", "picture", "one-step", "start", "busy", "threads", "fast")


def parts_here() -> list[str]:
    """Return the parts that can run here: "fast" needs scikit-image to compare pictures."""
    return [part for part in PARTS if part != "fast" or importlib.util.find_spec("skimage")]


COUNTS = (1, 2, 4, 8, 16)
"""Numbers of threads that the part "threads" measures."""


def run(
    names: Iterable[str],
    *,
    parts: Iterable[str] = PARTS,
    repeat: int = 5,
    model: str = "embedded",
    log: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Return the times of the contenders named, in `repeat` rounds.

    For each of `parts` there are "seconds" (the median of each contender), "times" (all of them),
    and "ratio" (each contender's time over that of each Safelight, the median over the rounds); for
    step, decode, picture and one-step also "matmul_gflops" and "error" (relative to diffusers, or
    Safelight, in float32). A picture takes 20 steps of dpmpp_2m and a decode; its text is encoded
    before. OpenVINO, which brings no sampler, has diffusers'. The parts "busy" and "fast" measure
    Safelight alone: see `processes.busy_summary` and `shortcuts`. The part "threads" is in "by
    threads": a step of Safelight, in bfloat16 if that is named, with each of COUNTS; its ratios are
    to a step with as many threads as there are cores.

    Raises SafelightError for what `check` refuses.
    """
    names, parts = list(names), list(parts)
    check(names, parts, model)
    found: dict[str, Any] = {
        "cpu": torch.cpu.get_capabilities().get("architecture", ""),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "step_flop": STEP_FLOP,
    }
    with torch.inference_mode():
        if "step" in parts:
            log("a guided step of SD 1.5 at 512x512")
            found["step"] = _compare(networks.steps(names, log), repeat, log)
        if "decode" in parts:
            log("a decode to 512x512")
            found["decode"] = _compare(networks.decodes(names, log), repeat, log)
        if "picture" in parts:
            log("a picture of 512x512 in 20 steps")
            found["picture"] = _compare(networks.pictures(names, log), repeat, log)
        if "one-step" in parts:
            log("a picture of 512x512 in one step, by SDXS's shapes and a tiny autoencoder")
            found["one-step"] = _compare(one_step.pictures(names, log), repeat, log)
        if "threads" in parts:
            log("a guided step by threads")
            found["by threads"] = _by_threads(names, repeat, log)
        if "fast" in parts:
            log("a picture of 512x512 by each way of the fast mode")
            runs = shortcuts.seconds(names, log)
            found["fast"] = _summary(_times(runs, repeat, log), ("full",))
            log(f"twenty pictures of {model} by each of them")
            found["fast"]["distance"] = shortcuts.distances(load_model(model), log)
    if "start" in parts:
        log("a first picture of embedded, from process start")
        found["start"] = _summary(processes.starts(names, repeat, log))
    if "busy" in parts:
        log("the same, alone and beside two others")
        found["busy"] = processes.busy_summary(processes.busy(repeat, log))
    return found


def check(names: Iterable[str], parts: Iterable[str], model: str) -> None:
    """Raise SafelightError for contenders, parts or a model that cannot be measured here."""
    unknown = [name for name in names if name not in contenders()]
    if unknown:
        raise SafelightError(
            f"{unknown[0]!r:.40} cannot run here; there are {', '.join(contenders())}"
        )
    strange = [part for part in parts if part not in PARTS]
    if strange:
        raise SafelightError(f"no part {strange[0]!r:.40}; there are {', '.join(PARTS)}")
    if "fast" in parts:
        if "fast" not in parts_here():
            raise SafelightError("the part fast needs more: pip install 'safelight[bench]'")
        if not read_plan(find(model)).family.tokenizers:
            raise SafelightError(f"{model} draws from noise alone: give a --model that draws words")


def _by_threads(names: list[str], repeat: int, log: Callable[[str], None]) -> dict[str, Any]:
    known = [name for name in names if name.startswith("safelight")] or ["safelight float32"]
    ours = "safelight bfloat16" if "safelight bfloat16" in known else known[0]
    run = networks.steps([ours], log)[ours]
    cores, before = processors.cores(), torch.get_num_threads()

    def with_threads(count: int) -> Run:
        def step() -> None:
            torch.set_num_threads(count)
            run()

        return step

    counts = sorted({*COUNTS, cores})
    try:
        run()  # packs the weights
        runs = {f"{count} threads": with_threads(count) for count in counts}
        return _summary(_times(runs, repeat, log), (f"{cores} threads",))
    finally:
        torch.set_num_threads(before)


def _compare(runs: dict[str, Run], repeat: int, log: Callable[[str], None]) -> dict[str, Any]:
    outputs = {name: torch.as_tensor(run()).float() for name, run in runs.items()}  # warms up, too
    products: list[float] = []
    times = _times(runs, repeat, log, products)
    exact = next((n for n in ("diffusers float32", "safelight float32") if n in outputs), None)
    found = _summary(times) | {"matmul_gflops": statistics.median(products)}
    if exact is not None:
        true = outputs[exact]
        found["error"] = {
            name: float((output - true).norm() / true.norm())
            for name, output in outputs.items()
            if name != exact
        }
    return found


def _times(
    runs: dict[str, Run],
    repeat: int,
    log: Callable[[str], None],
    products: list[float] | None = None,
) -> dict[str, list[float]]:
    """Return the seconds of each, in turns. products: gets the GFLOP/s of each round."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(repeat):
        for name, run in runs.items():
            times[name].append(_seconds(run))
        if products is not None:
            products.append(_matmul_gflops())
        log(f"  round {i + 1}: " + ", ".join(f"{n} {t[-1]:.2f} s" for n, t in times.items()))
    return times


def _summary(times: dict[str, list[float]], to: Iterable[str] | None = None) -> dict[str, Any]:
    """Return medians, times and ratios. to: those to compare with, each Safelight if None."""
    ours = [name for name in times if name.startswith("safelight")] if to is None else to
    return {
        "seconds": {name: statistics.median(t) for name, t in times.items()},
        "times": times,
        "ratio": {
            mine: {
                name: statistics.median(b / a for a, b in zip(times[mine], t, strict=True))
                for name, t in times.items()
                if name != mine
            }
            for mine in ours
        },
    }


def _seconds(run: Run) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def _matmul_gflops(n: int = 4096) -> float:
    dtype = torch.bfloat16 if native_bfloat16() else torch.float32
    a, b = torch.ones(n, n, dtype=dtype), torch.ones(n, n, dtype=dtype)
    torch.mm(a, b)
    return 2 * n**3 / _seconds(lambda: torch.mm(a, b)) / 1e9
