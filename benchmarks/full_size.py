"""Measure a full-size model of random weights, from one file to a picture of its own size.

    python benchmarks/full_size.py [--family sdxl] [--dtype bfloat16] [--low-memory] [--json]

It writes a checkpoint of Stable Diffusion 1.5 or SDXL (layout of the original code, float16, 2.1 or
6.9 GB) to a temporary folder, or uses that of --checkpoint. For each precision it starts a fresh
process, which loads the checkpoint and draws one picture in 2 steps with guidance, and reads that
process's memory from the kernel meanwhile. The folder is removed afterwards.
"""

import argparse
import json
import math
import os
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

STEPS = 2
SAMPLER = "dpmpp_2m"  # one evaluation of the network a step
GB = 1e9
ROWS = {
    "load_s": ("load", "s"),
    "text_s": ("text encoder", "s"),
    "step_s": ("a guided step", "s"),
    "decode_s": ("decode", "s"),
    "weights_gb": ("weights in this precision", "GB"),
    "peak_gb": ("peak resident memory, all of it", "GB"),
    "peak_load_gb": ("— while loading, pages of the mapped file included", "GB"),
    "peak_denoise_gb": ("— in the steps", "GB"),
    "peak_decode_gb": ("— in decoding", "GB"),
    "peak_load_own_gb": ("peak of its own memory while loading", "GB"),
}


# --- the checkpoint ------------------------------------------------------------------------------


def family_of(name: str) -> Any:
    """Return the published variant of this name."""
    from safelight.families import sd, sdxl

    return next(v for v in (*sd.VARIANTS, *sdxl.VARIANTS) if v.name == name)


def shapes_by_key(name: str) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a checkpoint's tensors, by their names in a single file."""
    import torch

    from safelight.weights.names import original_names

    family = family_of(name)
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    for part, config in family.configs.items():
        config_class, network_class = family.parts[part].load_classes()
        with torch.device("meta"):
            network = network_class(config_class.from_dict(config))
        shapes[part] = {key: tuple(t.shape) for key, t in network.state_dict().items()}
    found: dict[str, tuple[int, ...]] = {}
    for key, one in original_names(family.sections(), shapes).items():
        rows, *rest = shapes[one.part][one.names[0]]
        shape = (len(one.names) * rows, *rest, *(1,) * one.conv)
        found[key] = shape[::-1] if one.transposed else shape
    return found


def write_checkpoint(path: Path, family: str) -> int:
    """Write random weights tensor by tensor, and return the number of parameters."""
    shapes = shapes_by_key(family)
    header: dict[str, Any] = {}
    end = 0
    for key, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[key] = {"dtype": "F16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    # One block of numbers, rolled for each tensor, as drawing 3.5 billion takes a minute.
    pool = np.random.default_rng(0).standard_normal(1 << 22, np.float32)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for i, (key, shape) in enumerate(shapes.items()):
            _write_weight(file, key, shape, np.roll(pool, 7919 * i))
    return end // 2


def _write_weight(file: BinaryIO, key: str, shape: tuple[int, ...], pool: np.ndarray) -> None:
    """Write a tensor that keeps the size of activations, so that no precision overflows."""
    if len(shape) == 1:  # a bias, or the scale of a norm
        values = np.full(shape, 1.0 if key.endswith("weight") else 0.0)
    else:
        values = np.resize(pool, math.prod(shape)) / math.sqrt(math.prod(shape[1:]))
    file.write(values.astype("<f2").tobytes())


# --- one run, in a process of its own ------------------------------------------------------------


def draw(checkpoint: str, dtype: str, low_memory: bool) -> None:
    """Load and draw; print each phase as it begins, and at the end the measurements as JSON."""
    import safelight

    began = time.perf_counter()
    model = safelight.load(checkpoint, device="cpu", dtype=dtype, low_memory=low_memory)
    load = time.perf_counter() - began
    nets = [model.parts[part] for part in model.family.parts]
    weights = sum(p.numel() * p.element_size() for net in nets for p in net.parameters())
    mark("denoise")
    steps: list[float] = []
    last = time.perf_counter()

    def on_step(_: object) -> None:
        nonlocal last
        now = time.perf_counter()
        steps.append(now - last)
        last = now
        if len(steps) == STEPS:
            mark("decode")

    result = model.generate(
        "a red apple",
        negative_prompt="blurry",
        steps=STEPS,
        sampler=SAMPLER,
        seed=1,
        on_step=on_step,
    )
    picture = np.asarray(result.images[0])
    mark(
        json.dumps(
            {
                "load_s": load,
                "text_s": result.timings["text"],
                # The first step's time includes the text encoder.
                "step_s": result.timings["denoise"] / STEPS,
                "steps_s": [steps[0] - result.timings["text"], *steps[1:]],
                "decode_s": result.timings["decode"],
                "weights_gb": weights / GB,
                "size": list(result.images[0].size),
                "native": list(model.native_size),
                "spread": float(picture.std()),
                "peak_gb": peak_resident() / GB,
            }
        )
    )


def mark(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def peak_resident() -> int:
    """Return the most bytes that this process had resident, with pages of mapped files."""
    status = Path("/proc/self/status")
    if status.exists():
        # ru_maxrss would begin with the memory of the parent when it started this process.
        return memory(status)["VmHWM"]
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def memory(status: Path) -> dict[str, int]:
    """Return the kernel's figures of a process's memory, in bytes."""
    lines = (line.partition(":") for line in status.read_text().splitlines())
    return {key: int(value.split()[0]) * 1024 for key, _, value in lines if value.endswith(" kB")}


# --- the parent ----------------------------------------------------------------------------------


class Watch(threading.Thread):
    """Reads a process's memory 50 times a second, and keeps the peaks of each phase.

    Own memory is that of no file. Pages of the mapped checkpoint count as resident too while it is
    open, but the kernel drops them when memory is short.
    """

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.status = Path(f"/proc/{pid}/status")
        self.phase = "load"
        self.peaks: dict[str, float] = {}

    def run(self) -> None:
        while True:
            try:
                now = memory(self.status)
            except OSError:
                return
            if "VmRSS" not in now:  # it has ended
                return
            self._keep(f"peak_{self.phase}_gb", now["VmRSS"])
            self._keep(f"peak_{self.phase}_own_gb", now["RssAnon"])
            time.sleep(0.02)

    def _keep(self, name: str, value: int) -> None:
        self.peaks[name] = max(self.peaks.get(name, 0.0), value / GB)


def measure(checkpoint: Path, dtype: str, low_memory: bool, cache: Path) -> dict[str, Any]:
    # A fresh cache, as it keeps a model's SHA-256, and a first load is measured.
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache / dtype)}
    command = [sys.executable, __file__, "--draw", str(checkpoint), "--dtype", dtype]
    command += ["--low-memory"] * low_memory
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as child:
        watch = Watch(child.pid)
        watch.start()
        assert child.stdout is not None
        line = ""
        for line in child.stdout:
            if not line.startswith("{"):
                watch.phase = line.strip()
    if child.returncode:
        sys.exit(f"{dtype}: exit code {child.returncode}")
    found = json.loads(line)
    if found["size"] != found["native"] or not found["spread"] > 0:
        sys.exit(f"{dtype}: no picture, {found}")
    return {"dtype": dtype, **found, **watch.peaks}


def table(runs: list[dict[str, Any]]) -> Iterator[str]:
    yield "| | " + " | ".join(run["dtype"] for run in runs) + " |"
    yield "|---|" + "---:|" * len(runs)
    for key, (label, unit) in ROWS.items():
        values = (f"{run[key]:.2f} {unit}" if key in run else "–" for run in runs)
        yield f"| {label} | " + " | ".join(values) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--family", default="sd1", choices=("sd1", "sdxl"), help="[sd1]")
    parser.add_argument(
        "--checkpoint", type=Path, help="a file that was written before, or to keep"
    )
    parser.add_argument("--dtype", action="append", help="float32, bfloat16 or float16 [the first]")
    parser.add_argument("--low-memory", action="store_true", help="weights in a file")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--draw", help=argparse.SUPPRESS)
    options = parser.parse_args()
    dtypes = options.dtype or ["float32"]
    if options.draw:
        draw(options.draw, dtypes[0], options.low_memory)
        return
    with tempfile.TemporaryDirectory(prefix="safelight-") as folder:
        checkpoint = options.checkpoint or Path(folder) / f"{options.family}-random.safetensors"
        parameters = checkpoint.stat().st_size // 2 if checkpoint.exists() else 0
        parameters = parameters or write_checkpoint(checkpoint, options.family)
        low, cache = options.low_memory, Path(folder)
        runs = [measure(checkpoint, dtype, low, cache) for dtype in dtypes]
        found = {
            "checkpoint": {"parameters": parameters, "bytes": checkpoint.stat().st_size},
            "threads": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
            "runs": runs,
        }
    if options.json:
        mark(json.dumps(found, indent=2))
        return
    size = found["checkpoint"]["bytes"] / GB
    mark(f"{parameters / 1e6:.0f} million parameters, a file of {size:.2f} GB")
    for line in table(runs):
        mark(line)


if __name__ == "__main__":
    main()
