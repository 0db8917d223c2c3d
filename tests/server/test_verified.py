"""`safelight verify` repeats pictures of a server: they are equal if they were drawn alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from inside import Inside

from safelight import cli, machine
from safelight.recipe import read_recipe

SMALL = {"width": 64, "height": 64}
WISHES: list[dict[str, Any]] = [
    {"prompt": "a red apple", "seed": 1, "steps": 4, "sampler": "euler", **SMALL},
    {"prompt": "a cat", "seed": 2, "steps": 3, "sampler": "dpmpp_2m", "guidance_scale": 1, **SMALL},
    {"prompt": "an owl", "seed": 3, "steps": 4, "width": 128, "height": 64},
]


@pytest.mark.parametrize(
    ("exact", "dtype"),
    [
        (True, "bfloat16"),
        (False, "float32"),
        pytest.param(True, "float32", marks=pytest.mark.soak),
        pytest.param(False, "bfloat16", marks=pytest.mark.soak),
    ],
)
def test_pictures_of_a_server(
    tmp_path: Path, exact: bool, dtype: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with Inside(tmp_path, dtype=dtype, exact=exact, rows=None if exact else 16) as server:
        jobs = [server.submit(**wish) for wish in WISHES]
        for i, job in enumerate(jobs):
            assert server.finished(job)["status"] == "succeeded"
            (tmp_path / f"{i}.png").write_bytes(server.picture(job))
    for i in range(len(WISHES)):
        path = str(tmp_path / f"{i}.png")
        assert read_recipe(path)["drawn"]["exact"] is exact
        assert cli.run(["verify", path]) == 0
        said, why = capsys.readouterr()
        assert int(said) <= (0 if exact else machine.COMPANY[dtype])
        assert ("drawn in company" in why) == (int(said) > 0)
