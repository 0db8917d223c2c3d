"""A distilled model says how it is drawn with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from inside import Inside

import safelight
from safelight.cli.tools import verify
from safelight.compare import Axis, grid
from safelight.errors import SafelightError
from safelight.request import Request
from safelight.server.apis.sdapi_shapes import TextToImage, understand
from safelight.server.jobs import ModelInfo


def test_a_server_fills_in_what_a_model_was_taught(tmp_path: Path) -> None:
    """And is not asked for more by a model that says nothing, or nothing that can be."""
    model = tmp_path / "model"
    shutil.copytree(Path(safelight.__file__).parent / "models" / "embedded", model)
    wanted = {"sampler": "ddim", "steps": 4, "guidance_scale": 1.0}
    for said, found in ((wanted, wanted), (None, {"sampler": "pndm", "steps": None})):
        (model / "safelight.json").write_text(json.dumps({"draw_with": said}))
        with Inside(tmp_path / "data", draws=False, model=str(model)) as server:
            job = server.ask("POST", "/api/jobs", {"prompt": "a cat"}).json()
            assert job["settings"].items() >= found.items()
            asked = {"prompt": "a cat", "steps": 8, "sampler": "euler"}
            job = server.ask("POST", "/api/jobs", asked).json()
            assert job["settings"].items() >= asked.items()
            # ddim has no karras, and nor has pndm.
            refused = server.ask("POST", "/api/jobs", {"prompt": "a cat", "schedule": "karras"})
            assert refused.status == 422
            assert "has no schedule karras" in refused.json()["detail"]


def test_automatic1111s_clients_too() -> None:
    wanted = {"sampler": "ddim", "steps": 4, "guidance_scale": 1.0}
    said = {"sampler_name": "Euler a", "steps": 9, "cfg_scale": 3}
    for taught, body, found in (
        (wanted, {}, ("ddim", 4, 1.0)),
        (wanted, said, ("euler_a", 9, 3.0)),
        ({}, {}, ("euler", 50, 7.0)),
    ):
        asked = understand(TextToImage(**body), ModelInfo(name="tiny"), taught).request
        assert (asked.sampler, asked.steps, asked.guidance_scale) == found


def test_a_grid_and_a_warning_too(tmp_path: Path) -> None:
    """What is neither an axis nor an option is what the model was taught."""
    model = safelight.load("embedded-fast")
    made = grid(model, Request(prompt="a cat", seed=1, eta=0.5), Axis.parse("seed=1,2"))
    for result in made.results[0]:
        assert result.settings["sampler"] == "ddim"
        assert (result.settings["steps"], result.settings["guidance_scale"]) == (4, 1.0)
        assert result.warnings == []
    made.save(tmp_path / "grid.png")
    with pytest.raises(SafelightError, match="is a grid of several pictures"):
        verify(str(tmp_path / "grid.png"))
