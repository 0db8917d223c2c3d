"""A distilled model says how it is drawn with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from inside import Inside

import safelight


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
