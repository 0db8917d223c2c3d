"""The same seed is the same picture: alone, beside others in any order, after a restart."""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any

import pytest
from inside import Inside, figure, size
from PIL import Image

import safelight
from safelight.picture import largest_difference

pytestmark = pytest.mark.xdist_group("same")
COMPANIES = (1, 2, 3, 8) if size(0, 1) else (2, 3)
SAMPLERS = ("euler", "euler_a", "dpmpp_2m", "heun", "ddim", "pndm", "lms")


def settings() -> list[dict[str, Any]]:
    chance = random.Random(0)
    return [
        {
            "prompt": chance.choice(["a cat", "a red apple", "a dog", ""]),
            "negative_prompt": chance.choice(["", "blue"]),
            "sampler": SAMPLERS[i % len(SAMPLERS)],
            "steps": chance.randint(2, 8),
            "guidance_scale": chance.choice([1.0, 4.0, 7.5]),
            "schedule": chance.choice([None, "karras"]) if i % 3 == 0 else None,
            "seed": chance.randrange(2**40),
        }
        for i in range(size(3, 20))
    ]


@pytest.mark.parametrize("exact", [True, pytest.param(False, marks=pytest.mark.soak)])
def test_the_same_picture_in_any_company(tmp_path: Path, exact: bool) -> None:
    """Pictures are equal to the byte with --exact; without it, in float32, within 1 of 255."""
    model = safelight.load(device="cpu", dtype="float32")
    wishes = settings()
    alone = [model.generate(**wish).images[0] for wish in wishes]
    chance, worst, drawn = random.Random(1), 0, 0
    for _ in range(2):  # the second time after a restart
        with Inside(tmp_path, dtype="float32", exact=exact, rows=None if exact else 16) as server:
            for company in COMPANIES:
                order = chance.sample(range(len(wishes)), len(wishes))
                for start in range(0, len(order), company):
                    together = order[start : start + company]
                    together += chance.choices(range(len(wishes)), k=company - len(together))
                    jobs = [(i, server.submit(**wishes[i])) for i in together]
                    for i, job in jobs:
                        assert server.finished(job)["status"] == "succeeded"
                        with Image.open(io.BytesIO(server.picture(job))) as image:
                            worst = max(worst, largest_difference(image, alone[i]))
                        drawn += 1
    assert worst <= (0 if exact else 1)
    figure(
        f"12: {drawn} pictures of {len(wishes)} settings, alone and in companies of 2, 3 and 8, "
        f"twice{', with --exact' if exact else ''}: at most {worst} of 255 from Python's"
    )
