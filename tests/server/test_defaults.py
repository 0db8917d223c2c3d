"""A model says what it draws best with, and every surface begins there."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from inside import Inside

import safelight
from safelight import cli
from safelight.cli.tools import verify
from safelight.compare import Axis, grid
from safelight.defaults import is_distilled
from safelight.errors import SafelightError
from safelight.picture import open_picture
from safelight.recipe import read_recipe
from safelight.request import Request
from safelight.server.apis.sdapi_shapes import TextToImage, understand


def test_a_server_fills_in_what_a_model_draws_best_with(tmp_path: Path) -> None:
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
        asked = understand(TextToImage(**body), taught).request
        assert (asked.sampler, asked.steps, asked.guidance_scale) == found


BEST = {"sampler": "dpmpp_2m", "steps": 3, "guidance_scale": 4.0, "guidance_start": 0.5}


def model_that_says(folder: Path, **notes: Any) -> str:
    """A copy of the embedded model with other notes."""
    model = folder / "model"
    shutil.copytree(Path(safelight.__file__).parent / "models" / "embedded", model)
    (model / "safelight.json").write_text(json.dumps(notes))
    return str(model)


def test_python_and_the_command_line_begin_there_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = model_that_says(tmp_path, draw_with=BEST)
    model = safelight.load(name, dtype="float32")
    made = model.generate("a cat", seed=1)
    assert made.settings.items() >= BEST.items()
    # What is asked for holds, and a preference is no reason to warn.
    other = model.generate("a cat", seed=1, steps=2, guidance_scale=1.0)
    assert (other.settings["steps"], other.settings["sampler"]) == (2, "dpmpp_2m")
    guided = model.generate("a cat", seed=1, guidance_start=0)
    assert guided.images[0].tobytes() != made.images[0].tobytes()
    # Where guidance ends is asked for with where it begins: a default would lie after it.
    assert model.generate("a cat", seed=1, guidance_end=0.2).settings["guidance_start"] is None
    assert made.warnings == other.warnings == []
    out = str(tmp_path / "a.png")
    command = ["generate", "a cat", "-s", "1", "-m", name, "--dtype", "float32", "-o", out]
    assert cli.run(command) == 0
    assert capsys.readouterr().err == ""
    assert open_picture(out).tobytes() == made.images[0].tobytes()


def test_openai_s_route_begins_there_too(tmp_path: Path) -> None:
    name = model_that_says(tmp_path, draw_with=BEST)
    with Inside(tmp_path / "data", model=name, dtype="float32", exact=True) as server:
        answer = server.ask("POST", "/v1/images/generations", {"prompt": "a cat", "seed": 1})
        drawn = base64.b64decode(answer.json()["data"][0]["b64_json"])
        assert read_recipe(drawn)["settings"].items() >= BEST.items()


@pytest.mark.parametrize(
    ("notes", "distilled"),
    [
        ({}, False),
        ({"draw_with": BEST}, False),
        ({"draw_with": BEST, "distilled": True}, True),
        ({"draw_with": BEST, "distilled": "yes"}, False),
        # As our distillation wrote before it wrote that.
        ({"draw_with": BEST, "made_from": "embedded"}, True),
        ({"draw_with": BEST, "made_from": "embedded", "distilled": False}, False),
        ({"made_from": "embedded"}, False),
    ],
)
def test_which_models_are_distilled(notes: dict[str, Any], distilled: bool) -> None:
    assert is_distilled(notes) is distilled


def test_a_distilled_model_warns_of_other_values(tmp_path: Path) -> None:
    model = safelight.load(model_that_says(tmp_path, draw_with=BEST, distilled=True))
    assert not [w for w in model.generate("a cat").warnings if "dpmpp_2m" in w]
    assert [w for w in model.generate("a cat", steps=2).warnings if "dpmpp_2m" in w]


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
