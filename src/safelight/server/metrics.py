"""Figures for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

from safelight.server.hub import Hub
from safelight.server.jobs import Status

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
            "safelight_ready", "Whether the model is loaded.", registry=self._registry
        )

    def count(self, method: str, route: str, status: int) -> None:
        # By the route's pattern: paths have ids. Strangers could fill the memory with names of
        # their own for either.
        self._requests.labels(method if method in METHODS else "other", route, str(status)).inc()

    async def text(self, hub: Hub) -> str:
        counts = await hub.counts()
        for status in Status:
            self._jobs.labels(status).set(counts.get(status, 0))
        self._restarts.set(max(hub.restarts, 0))
        self._ready.set(hub.info.ready)
        return generate_latest(self._registry).decode()
