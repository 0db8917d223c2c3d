"""Training under kills: nothing is lost or changed. `make soak` runs it at full size.

    python tests/soak/training.py [--kills 5] [--steps 400] [--seed 0]

The pixel model learns the digits. SIGKILL ends it at random moments, and the same command goes on.
In the end the averaged weights and the loss curve equal, to the bit, those of an undisturbed run.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

TRAIN = """
import sys, torch
from pathlib import Path
from safelight.train import unconditional
from safelight.train.plan import Plan
torch.set_num_threads(1)
unconditional.CHECKPOINT_EVERY = 10
unconditional.draw_sheet = lambda *_: None
plan = Plan(steps=int(sys.argv[2]), batch=2, learning_rate=1e-3, warmup=5)
unconditional.unconditional("digits", Path(sys.argv[1]), plan, size=16)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    chance = random.Random(given.seed)
    with tempfile.TemporaryDirectory() as folder:
        whole, disturbed = Path(folder, "whole"), Path(folder, "disturbed")
        assert start(whole, given.steps).wait() == 0
        at = sorted(chance.sample(range(1, given.steps // 10 - 1), given.kills))
        reached = [kill(disturbed, given.steps, number * 10, chance) for number in at]
        assert start(disturbed, given.steps).wait() == 0
        one, other = (
            torch.load(f / "checkpoint.pt", weights_only=True) for f in (whole, disturbed)
        )
        for ours, theirs in zip(one["average"], other["average"], strict=True):
            assert torch.equal(ours, theirs), "the weights differ"
        for ours, theirs in zip(one["params"], other["params"], strict=True):
            assert torch.equal(ours, theirs), "the weights differ before averaging"
        assert len(curve(whole)) >= given.steps // 100
        assert curve(whole) == curve(disturbed), "the loss curves differ"
        points = ", ".join(f"{step}: {loss:.6f}" for step, loss in curve(disturbed))
    sys.stdout.write(f"kills: {given.kills}, checkpoints they left: {reached}\n")
    sys.stdout.write(f"weights and loss curve equal an undisturbed run's ({points})\n")


def start(out: Path, steps: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", TRAIN, str(out), str(steps)])


def kill(out: Path, steps: int, least: int, chance: random.Random) -> int:
    """Kill a run after the checkpoint of step `least`; return the step from which it will go on."""
    process = start(out, steps)
    path = out / "checkpoint.pt"
    until = time.monotonic() + 600
    while reached(path) < least:
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < until, "it does not come forward"
        time.sleep(0.02)
    time.sleep(chance.random() * 0.5)
    assert process.poll() is None, "it ended before it could be killed"
    process.kill()
    process.wait()
    return reached(path)


def reached(path: Path) -> int:
    """Return the step of the checkpoint, which is only ever replaced as a whole."""
    return int(torch.load(path, weights_only=True)["step"]) if path.exists() else 0


def curve(folder: Path) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events: Any = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars("loss")]


if __name__ == "__main__":
    main()
