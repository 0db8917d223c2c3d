"""Connect to a Ray cluster, or start one on this machine."""

from __future__ import annotations

import importlib
import logging
import os
from typing import Any

from safelight.errors import SafelightError, first_line

HERE = "local"
"""The address that starts a cluster on this machine."""


def connect(address: str, *modules: str) -> Any:
    """Return the module ray, connected. modules: others of Ray to import, such as "ray.data".

    Raises SafelightError if Ray is missing or the cluster is not reached.
    """
    # Ray sends no usage statistics, leaves accelerators as they are for workers without GPUs, and
    # prints no log in this process.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        ray = importlib.import_module("ray")
        for name in modules:
            importlib.import_module(name)
    except ImportError:
        raise SafelightError(
            "--ray needs Ray: pip install 'safelight[ray]'", code="not_installed"
        ) from None
    here: dict[str, Any] = {"include_dashboard": False} if address == HERE else {"address": address}
    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **here)
    except (ConnectionError, RuntimeError, ValueError) as error:
        told = first_line(error, 200)
        raise SafelightError(f"the Ray cluster {address!r} is not reached: {told}") from None
    return ray
