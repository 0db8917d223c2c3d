"""What a server is started with reaches the loading of its model."""

import inspect
from pathlib import Path

import pytest

from safelight.cli.groups import Serving
from safelight.errors import SafelightError
from safelight.server.settings import WorkerSettings
from safelight.weights import load_model


def test_every_keyword_of_loading_is_one_that_loading_takes() -> None:
    settings = WorkerSettings("m", "sqlite://", "/", vae="v", preview_vae="p", models_dir="d")
    taken = inspect.signature(load_model).parameters
    assert set(settings.loading) <= set(taken)
    assert (settings.loading["vae"], settings.loading["preview_vae"]) == ("v", "p")
    assert settings.loading["models_dir"] == "d"


def test_a_models_folder_that_is_not_there_is_told_before_a_server_listens(tmp_path: Path) -> None:
    serving = Serving(models_dir=str(tmp_path / "none"))
    with pytest.raises(SafelightError, match="there is no models folder"):
        serving.settings("embedded", "sqlite://", str(tmp_path))
