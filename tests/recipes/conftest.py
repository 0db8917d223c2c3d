"""The data, the scenes and the stage of three things."""

import json
from pathlib import Path

import numpy as np
import pytest
from things import CONCEPTS, HELD_OUT, SHOWN, drawing

from recipes.embedded import cutouts
from recipes.embedded.captions import STYLES
from recipes.embedded.scenes import Scenes
from recipes.embedded.stage import Stage


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the data stage."""
    folder = tmp_path_factory.mktemp("data")
    rows, pictures = [], []
    for concept in CONCEPTS:
        for style in STYLES:
            rows.append({"concept": concept["names"][0], "style": style})
            pictures.append(drawing(concept["names"][0]))
    cutouts.save(folder, np.stack(pictures), rows, CONCEPTS)
    words = {"shown": SHOWN, "held_out": HELD_OUT}
    (folder / "words.json").write_text(json.dumps(words))
    return folder


@pytest.fixture(scope="session")
def path(data: Path) -> Path:
    return data / "cutouts.npz"


@pytest.fixture(scope="session")
def scenes(path: Path) -> Scenes:
    return Scenes(path)


@pytest.fixture(scope="session")
def stage(scenes: Scenes) -> Stage:
    return Stage(scenes, "cpu", 64, variants=2)
