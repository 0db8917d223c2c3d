"""Whole processes: a first picture from process start, alone and beside others."""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from safelight.errors import SafelightError
from safelight.threads import SETTINGS

_DIFFUSERS = """
import sys, torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
pipe = StableDiffusionPipeline.from_pretrained(
    sys.argv[1], torch_dtype=getattr(torch, sys.argv[3]), safety_checker=None
)
pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
pipe.set_progress_bar_config(disable=True)
generator = torch.Generator().manual_seed(1)
image = pipe("a red apple", num_inference_steps=20, generator=generator, height=64, width=64)
image.images[0].save(sys.argv[2])
"""

_SPINNING = {"GOMP_SPINCOUNT": "300000"}
"""How OpenMP waits by default (libgomp's own value). Because it is set here, Safelight does not
change it."""


def starts(names: list[str], repeat: int, log: Callable[[str], None]) -> dict[str, list[float]]:
    """Return seconds of processes that load `embedded` and draw a picture, 20 steps of dpmpp_2m."""
    known = [name for name in names if not name.startswith("openvino")]
    times: dict[str, list[float]] = {name: [] for name in known}
    with tempfile.TemporaryDirectory(prefix="safelight-") as folder:
        out = Path(folder) / "picture.png"
        for i in range(repeat + 1):
            for name in known:
                seconds = _draw(_command(name, out), {})
                if i:  # the first fills the file cache
                    times[name].append(seconds)
            if i:
                log(f"  round {i}: " + ", ".join(f"{n} {t[-1]:.2f} s" for n, t in times.items()))
    return times


def busy(repeat: int, log: Callable[[str], None]) -> dict[str, list[float]]:
    """Return seconds of the same picture alone and beside two processes that draw without end.

    Both are measured with threads that wait as PyTorch's do by default, and as Safelight's do.
    """
    ways = {"spinning": _SPINNING, "asleep": {}}
    times: dict[str, list[float]] = {
        f"{where}, {way}": [] for where in ("alone", "beside two") for way in ways
    }
    with tempfile.TemporaryDirectory(prefix="safelight-") as folder:
        out = Path(folder) / "picture.png"
        command = _command("safelight float32", out)
        _draw(command, {})  # fills the file cache
        for i in range(repeat):
            for way, more in ways.items():
                times[f"alone, {way}"].append(_draw(command, more))
                with _neighbours(2, Path(folder), more):
                    times[f"beside two, {way}"].append(_draw(command, more))
            log(f"  round {i + 1}: " + ", ".join(f"{n} {t[-1]:.2f} s" for n, t in times.items()))
    return times


def busy_summary(times: dict[str, list[float]]) -> dict[str, Any]:
    """Return medians of the seconds, and of the ratios within a round."""

    def ratio(over: str, under: str) -> float:
        return statistics.median(a / b for a, b in zip(times[over], times[under], strict=True))

    return {
        "seconds": {name: statistics.median(t) for name, t in times.items()},
        "times": times,
        "busy over quiet": {
            way: ratio(f"beside two, {way}", f"alone, {way}") for way in ("spinning", "asleep")
        },
        "asleep over spinning": {
            where: ratio(f"{where}, asleep", f"{where}, spinning")
            for where in ("alone", "beside two")
        },
    }


@contextlib.contextmanager
def _neighbours(count: int, folder: Path, more: dict[str, str]) -> Iterator[None]:
    """Run other processes that draw one picture after the other until the block ends."""
    over = threading.Event()

    def draw(i: int) -> None:
        while not over.is_set():
            _draw(_command("safelight float32", folder / f"other-{i}.png"), more, over)

    threads = [threading.Thread(target=draw, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    try:
        time.sleep(2.0)  # until they are past their imports and draw
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()


def _command(name: str, out: Path) -> list[str]:
    from safelight.weights.find import MODELS

    precision = name.split()[1]
    if name.startswith("diffusers"):
        model = str(MODELS / "embedded")
        return [sys.executable, "-W", "ignore", "-c", _DIFFUSERS, model, str(out), precision]
    options = ["--steps=20", "--sampler=dpmpp_2m", "--seed=1", "--overwrite", "--dtype", precision]
    start = [sys.executable, "-m", "safelight", "generate", "a red apple"]
    return [*start, *options, "--out", str(out)]


def _draw(command: list[str], more: dict[str, str], over: threading.Event | None = None) -> float:
    """Return the seconds that a process took. It is killed if `over` is set meanwhile.

    Raises SafelightError if it failed.
    """
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    for name in ("PYTHONDONTWRITEBYTECODE", *SETTINGS):  # an installed package is compiled
        environment.pop(name, None)
    began = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment | more
    )
    while True:
        try:
            said = process.communicate(timeout=0.1 if over is not None else None)[1]
            break
        except subprocess.TimeoutExpired:
            if over is not None and over.is_set():
                process.kill()
    if process.returncode and not (over is not None and over.is_set()):
        raise SafelightError(f"{' '.join(command[1:3])} failed: {said.strip()[-200:]}")
    return time.perf_counter() - began
