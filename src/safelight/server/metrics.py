"""The server's metrics for Prometheus."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

from safelight.errors import StorageError
from safelight.server.hub import Hub
from safelight.server.jobs import Status
from safelight.server.retention import Retention
from safelight.server.wording import METHODS

MAX_MODELS = 100
"""Models with figures of their own: those with the most jobs; REST sums up the others."""

REST, NONE = "(others)", "(none)"


class Metrics:
    """The metrics of a server. retention: its figures are included."""

    def __init__(self, retention: Retention | None = None) -> None:
        self._retention = retention
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "safelight_http_requests",
            "HTTP requests answered.",
            ("method", "route", "status"),
            registry=self._registry,
        )
        gauge = partial(Gauge, registry=self._registry)
        self._jobs = gauge("safelight_jobs", "Jobs in the database.", ("status",))
        self._model_jobs = gauge(
            "safelight_model_jobs",
            "Jobs in the database, by the model that they name.",
            ("model", "status"),
        )
        self._loaded = gauge(
            "safelight_model_loaded", "Whether a model is in the worker's memory.", ("model",)
        )
        self._loads = gauge(
            "safelight_model_loads", "Times a model was loaded since the start.", ("model",)
        )
        self._key_jobs = gauge(
            "safelight_key_unfinished_jobs", "Jobs of a key that wait or are drawn.", ("key",)
        )
        self._restarts = gauge("safelight_worker_restarts", "Times the worker was replaced.")
        self._ready = gauge("safelight_ready", "Whether jobs are taken and drawn.")
        self._pictures = gauge(
            "safelight_key_pictures", "Pictures that a key has asked for.", ("key",)
        )
        self._pixel_steps = gauge(
            "safelight_key_pixel_steps",
            "Pixel-steps that a key has asked for: width x height x steps x pictures.",
            ("key",),
        )
        self._webhooks = gauge(
            "safelight_webhooks", "Tries to send a webhook since the start.", ("outcome",)
        )
        self._expiring = gauge(
            "safelight_expiring_jobs", "Jobs that are marked for deletion by --keep."
        )
        self._deleted = gauge(
            "safelight_expired", "What --keep has deleted since the start.", ("what",)
        )
        self._stored = gauge(
            "safelight_stored_bytes", "Files of all jobs, as last counted for a limit of --keep."
        )

    def count(self, method: str, route: str, status: int) -> None:
        # By the route's pattern, since paths contain ids. Both labels take known values only:
        # strangers could fill the memory with names of their own.
        self._requests.labels(method if method in METHODS else "other", route, str(status)).inc()

    async def text(self, hub: Hub) -> str:
        well = True
        try:
            self._set_jobs(await hub.counts())
            waiting = await asyncio.to_thread(hub.store.unfinished)
            self._key_jobs.clear()
            for key, count in waiting.items():
                self._key_jobs.labels(key).set(count)
            asked = await asyncio.to_thread(hub.store.asked)
            for gauge, kind in ((self._pictures, "pictures"), (self._pixel_steps, "pixel_steps")):
                gauge.clear()  # removed keys are left out
                for key, much in asked.items():
                    gauge.labels(key).set(much[kind])
        except StorageError:  # the old figures stay, and `ready` is 0
            well = False
        catalogue = hub.catalogue
        for gauge, values in ((self._loaded, catalogue.in_memory), (self._loads, catalogue.loads)):
            gauge.clear()
            for model, value in _most(values).items():
                gauge.labels(model).set(value)
        for outcome in ("taken", "refused"):
            self._webhooks.labels(outcome).set(hub.webhooks.sent[outcome])
        self._restarts.set(max(hub.restarts, 0))
        self._ready.set(well and hub.ready)
        if self._retention is not None:
            freed = self._retention.freed
            self._expiring.set(self._retention.marked)
            for what, count in vars(freed).items():
                self._deleted.labels("bytes" if what == "size" else what).set(count)
            self._stored.set(self._retention.size or 0)
        return generate_latest(self._registry).decode()

    def _set_jobs(self, counts: dict[str, dict[str, int]]) -> None:
        """Set the numbers of jobs, by status and by model."""
        for status in Status:
            self._jobs.labels(status).set(sum(one.get(status, 0) for one in counts.values()))
        self._model_jobs.clear()
        told = _most({model: sum(one.values()) for model, one in counts.items()})
        for model, one in counts.items():
            name = (model or NONE) if model in told else REST
            for status, count in one.items():
                self._model_jobs.labels(name, status).inc(count)


def _most(values: Mapping[str, int]) -> dict[str, int]:
    """Return the MAX_MODELS largest values."""
    return dict(sorted(values.items(), key=lambda item: -item[1])[:MAX_MODELS])
