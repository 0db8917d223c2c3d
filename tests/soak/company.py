"""How far pictures drawn with others differ from those drawn alone: the bounds of `verify`.

    python tests/soak/company.py [--pictures 40] [--dtype float32 --dtype bfloat16]

Each picture is drawn alone in exact mode, together with 1, 2 and 7 others, alone by an engine that
has measured its batch, and alone with one thread. Prints the largest difference of a pixel, of 255.
"""

from __future__ import annotations

import argparse
import random
from collections import Counter

import torch

import safelight
from safelight.engine import Engine
from safelight.machine import describe_machine
from safelight.picture import largest_difference
from safelight.request import Request
from safelight.sampling import SAMPLERS

WORDS = ("a red apple", "a cat", "two owls", "", "a blue car on a yellow background", "a pizza")


def requests(count: int) -> list[Request]:
    chance = random.Random(0)
    names = sorted(SAMPLERS)
    return [
        Request(
            prompt=chance.choice(WORDS),
            negative_prompt=chance.choice(["", "blue"]),
            sampler=names[i % len(names)],
            steps=chance.choice([4, 10, 20]),
            guidance_scale=chance.choice([1.0, 4.0, 7.5, 12.0]),
            seed=chance.randrange(2**40),
        )
        for i in range(count)
    ]


def draw(engine: Engine, asked: list[Request]) -> list:
    for i, request in enumerate(asked):
        engine.add(request, i)
    made = {}
    while engine.busy:
        made |= {ticket.tag: ticket.image for ticket in engine.step()[1]}
    return [made[i] for i in range(len(asked))]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pictures", type=int, default=40)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--dtype", action="append")
    options = parser.parse_args()
    asked = requests(options.pictures)
    print(describe_machine(torch.device("cpu")))  # noqa: T201
    for dtype in options.dtype or ["float32", "bfloat16"]:

        def load(dtype: str = dtype) -> safelight.Model:
            return safelight.load(options.model, device="cpu", dtype=dtype)

        def alone(exact: bool = True, load=load) -> list:
            engine = Engine(load(), exact=exact)
            return [draw(engine, [request])[0] for request in asked]

        def company(size: int, load=load) -> list:
            engine = Engine(load(), exact=False, rows=16)
            groups = [asked[i : i + size] for i in range(0, len(asked), size)]
            return [image for group in groups for image in draw(engine, group)]

        true = alone()
        ways = {"again": alone, "after measuring": lambda: alone(exact=False)}
        ways |= {f"in companies of {n}": (lambda n=n: company(n)) for n in (2, 3, 8)}
        for name, way in ways.items():
            told(dtype, name, true, way())
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        told(dtype, f"1 thread, not {threads}", true, alone())
        torch.set_num_threads(threads)


def told(dtype: str, name: str, true: list, other: list) -> None:
    apart = [largest_difference(a, b) for a, b in zip(true, other, strict=True)]
    counts = dict(sorted(Counter(apart).items()))
    print(f"{dtype}, {name}: at most {max(apart)}; {counts}", flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
