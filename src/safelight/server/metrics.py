"""Figures for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

from safelight.server.hub import Hub
from safelight.server.jobs import Status, StorageError

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class Metrics:
    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "safelight_http_requests",
            "HTTP requests answered.",
            ("method", "route", "status"),
            registry=self._registry,
        )
        self._jobs = Gauge(
            "safelight_jobs", "Jobs in the database.", ("status",), registry=self._registry
        )
        self._restarts = Gauge(
            "safelight_worker_restarts", "Times the worker was replaced.", registry=self._registry
        )
        self._ready = Gauge(
            "safelight_ready", "Whether jobs are taken and drawn.", registry=self._registry
        )

    def count(self, method: str, route: str, status: int) -> None:
        # By the route's pattern: paths have ids. Strangers could fill the memory with names of
        # their own for either.
        self._requests.labels(method if method in METHODS else "other", route, str(status)).inc()

    async def text(self, hub: Hub) -> str:
        well = True
        try:
            counts = await hub.counts()
            for status in Status:
                self._jobs.labels(status).set(counts.get(status, 0))
        except StorageError:  # the figures of before stay, and this one says why
            well = False
        self._restarts.set(max(hub.restarts, 0))
        self._ready.set(well and hub.ready)
        return generate_latest(self._registry).decode()
