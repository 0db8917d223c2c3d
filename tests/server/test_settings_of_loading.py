"""What a server is started with reaches the loading of its model."""

import inspect

from safelight.server.settings import WorkerSettings
from safelight.weights import load_model


def test_every_keyword_of_loading_is_one_that_loading_takes() -> None:
    settings = WorkerSettings("m", "sqlite://", "/", vae="v", preview_vae="p", models_dir="d")
    taken = inspect.signature(load_model).parameters
    assert set(settings.loading) <= set(taken)
    assert (settings.loading["vae"], settings.loading["preview_vae"]) == ("v", "p")
    assert settings.loading["models_dir"] == "d"
