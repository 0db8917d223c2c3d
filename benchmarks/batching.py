"""Compare batching by the step with one request after the other, for 32 mixed requests.

    python benchmarks/batching.py [--model embedded] [--rounds 5] [--requests 32] [--longest 50]
    python benchmarks/batching.py --model sd15.safetensors --rounds 3 --requests 4 --longest 6

Each round measures both, so that other load on the machine affects them alike. Throughput is
requests a second; latency is the time from when all requests are there until a picture is finished.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from typing import Any

import numpy as np
from PIL import Image

import safelight
from safelight import Request
from safelight.engine import Engine

SHORT = 4
"""Steps of the requests whose latency is measured."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--longest", type=int, default=50, help="steps of a request at most")
    given = parser.parse_args()
    model = safelight.load(given.model)
    requests = mixed(given.requests, model.native_size, given.longest)
    engine = Engine(model, exact=False)
    rounds = []
    for i in range(given.rounds + 1):
        one = one_by_one(model, requests)
        many = at_once(engine, requests)
        if i:  # the first round packs weights
            rounds.append(
                {
                    "throughput": max(one) / max(many),
                    "latency": late(requests, many) / late(requests, one),
                    "one by one": max(one),
                    "at once": max(many),
                }
            )
            say(json.dumps(rounds[-1]))
    say(f"rows a call: {engine.rows}")
    for name in rounds[0]:
        say(f"{name}: {statistics.median(r[name] for r in rounds):.3f}")


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def mixed(n: int, size: tuple[int, int], longest: int) -> list[Request]:
    """Return n requests: three samplers, two tasks, 4 to `longest` steps; every third is short."""
    chance = random.Random(0)
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    photo = Image.fromarray(noise)
    found = []
    for i in range(n):
        settings: dict[str, Any] = {
            "prompt": chance.choice(["a cat", "a red apple on a blue background", "a dog"]),
            "sampler": ("euler_a", "dpmpp_2m", "ddim")[i % 3],
            "steps": SHORT if i % 3 == 2 else chance.randint(min(10, longest), longest),
            "seed": i,
        }
        if i % 4 == 1:
            settings |= {"image": photo, "strength": 1.0}
        found.append(Request(**settings))
    return found


def one_by_one(model: safelight.Model, requests: list[Request]) -> list[float]:
    """Return the seconds until each picture is finished, one request after the other."""
    began = time.perf_counter()
    taken = []
    for request in requests:
        model.generate(request)
        taken.append(time.perf_counter() - began)
    return taken


def at_once(engine: Engine, requests: list[Request]) -> list[float]:
    """Return the seconds until each picture is finished, all requests together."""
    began = time.perf_counter()
    taken = [0.0] * len(requests)
    for i, request in enumerate(requests):
        engine.add(request, i)
    while engine.busy:
        for ticket in engine.step()[1]:
            taken[ticket.tag] = time.perf_counter() - began
    return taken


def late(requests: list[Request], taken: list[float]) -> float:
    """Return the 95th percentile of the latency of the short requests, in seconds."""
    short = [t for r, t in zip(requests, taken, strict=True) if r.steps == SHORT]
    return float(np.percentile(short, 95))


if __name__ == "__main__":
    main()
