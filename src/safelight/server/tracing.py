"""OpenTelemetry traces: a span for each request, and for what a worker does with a job.

Tracing is off unless OTEL_EXPORTER_OTLP_ENDPOINT, or its variant for traces, says where to send
spans and the packages of the extra `tracing` are installed. A job's row stores its place in a
trace, in the form of W3C's Trace Context, so that one trace shows a job's way over machines. Spans
contain no words of a prompt, no address and no error text, only names and numbers of ours.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from safelight.server.wording import METHODS, route_of

if TYPE_CHECKING:
    from safelight.server.claims import Claim

log = logging.getLogger("safelight.server")

PLACES = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")

FLUSH = 2.0
"""Seconds that the last spans have to be sent when a process ends."""

SHOWN = ("count", "steps", "sampler", "width", "height")
"""The settings of a job that its span shows."""

_tracer: Any = None
_provider: Any = None


def start(service: str, exporter: Any = None) -> None:
    """Send spans from now on, if the variables ask for it. exporter: of a test, instead of them."""
    global _tracer, _provider
    off = os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true"
    if exporter is None and (off or not any(os.environ.get(name) for name in PLACES)):
        return
    try:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor

        if exporter is None:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

            telling: Any = Telling(OTLPSpanExporter())
            processor: Any = BatchSpanProcessor(telling)
        else:
            processor = SimpleSpanProcessor(exporter)
    except ImportError:
        log.warning("no traces are sent: they need more: pip install 'safelight[tracing]'")
        return
    named = {} if os.environ.get("OTEL_SERVICE_NAME") else {"service.name": service}
    _provider = TracerProvider(resource=Resource.create(named))
    _provider.add_span_processor(processor)
    _tracer = _provider.get_tracer("safelight")


def stop() -> None:
    """Send the spans that are left, and stop."""
    global _tracer, _provider
    provider, _tracer, _provider = _provider, None, None
    if provider is not None:  # a collector that is away must not delay the end
        last = threading.Thread(target=provider.shutdown, daemon=True)
        last.start()
        last.join(FLUSH)


def on() -> bool:
    """Return whether spans are sent."""
    return _tracer is not None


def here() -> str | None:
    """Return the current place in the trace, as a traceparent; None without a trace."""
    if _tracer is None:
        return None
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    found: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(found)
    return found.get("traceparent")


def _context(traceparent: str | None) -> Any:
    from opentelemetry.context import Context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    given = {} if traceparent is None else {"traceparent": traceparent}
    return TraceContextTextMapPropagator().extract(given, Context())


class Telling:
    """An exporter around another one, which would log each failed try.

    This one logs once that spans cannot be sent, and once that they can again.
    """

    def __init__(self, exporter: Any) -> None:
        self._exporter, self._away = exporter, False
        logging.getLogger("opentelemetry.exporter").setLevel(logging.CRITICAL)

    def export(self, spans: Any) -> Any:
        """Send spans; they are lost if this fails."""
        result = self._exporter.export(spans)
        away = result.name != "SUCCESS"
        if away and not self._away:
            log.warning("traces are lost: the collector does not take them; it is tried again")
        elif self._away and not away:
            log.info("traces are sent again")
        self._away = away
        return result

    def shutdown(self) -> None:
        """Stop sending."""
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """Return whether all is sent."""
        return self._exporter.force_flush(timeout_millis)


class Traced:
    """An ASGI application around another one: a span for each request, in the client's trace."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or _tracer is None:
            await self.app(scope, receive, send)
            return
        from opentelemetry.trace import SpanKind, StatusCode

        given = [value for name, value in scope["headers"] if name == b"traceparent"]
        parent = given[0].decode("latin-1") if len(given) == 1 else None
        method = scope["method"] if scope["method"] in METHODS else "_OTHER"
        with _tracer.start_as_current_span(
            method,
            context=_context(parent),
            kind=SpanKind.SERVER,
            attributes={"http.request.method": method},
            record_exception=False,  # its text may quote a prompt
            set_status_on_exception=False,
        ) as span:

            async def reply(message: Any) -> None:
                if message["type"] == "http.response.start":
                    span.set_attribute("http.response.status_code", message["status"])
                    if message["status"] >= 500:
                        span.set_status(StatusCode.ERROR)
                await send(message)

            try:
                await self.app(scope, receive, reply)
            finally:
                # By the route's pattern: paths contain ids, and links contain tokens.
                if route := route_of(scope):
                    span.set_attribute("http.route", route)
                    span.update_name(f"{method} {route}")


class JobSpans:
    """The spans of a worker's jobs; without tracing it does nothing.

    A job's span lasts from when the job was made to its end. Within it are: queued; encode, for the
    prompt and the input pictures; and for each picture steps, decode and save. worker: its name.
    """

    def __init__(self, worker: str) -> None:
        self._worker = worker
        self._jobs: dict[str, Any] = {}
        self._steps: dict[tuple[str, int], tuple[int, int]] = {}

    def claimed(self, claim: Claim) -> None:
        """Begin the span of a job that was taken in."""
        if _tracer is None:
            return
        now = time.time_ns()
        made = now - round(1e9 * max(0.0, claim.waited))
        settings = {name: claim.settings.get(name) for name in SHOWN}
        told = settings | {"job": claim.id, "model": claim.model, "worker": self._worker}
        attributes = {f"safelight.{k}": v for k, v in told.items() if v is not None}
        self._jobs[claim.id] = _tracer.start_span(
            "job", context=_context(claim.trace), start_time=made, attributes=attributes
        )
        self._span(claim.id, "queued", made, now)

    @contextmanager
    def measured(self, name: str, job_id: str, picture: int | None = None) -> Iterator[None]:
        """Record a span of what is done inside the `with` block."""
        began = time.time_ns()
        try:
            yield
        finally:
            self._span(job_id, name, began, time.time_ns(), picture)

    def stepped(self, job_id: str, picture: int, seconds: float) -> None:
        """Note that a picture has just taken a step, which took `seconds`."""
        if job_id in self._jobs:
            now = time.time_ns()
            began, _ = self._steps.get((job_id, picture), (now - round(1e9 * seconds), 0))
            self._steps[job_id, picture] = began, now

    def decoded(self, job_id: str, picture: int) -> None:
        """Record the spans of a picture's steps and of its decoding, which has just ended."""
        if (found := self._steps.pop((job_id, picture), None)) is not None:
            self._span(job_id, "steps", *found, picture)
            self._span(job_id, "decode", found[1], time.time_ns(), picture)

    def ended(self, job_id: str, why: str | None = None) -> None:
        """End a job's span. why: the code of its error, or what became of it; None for success."""
        if (span := self._jobs.pop(job_id, None)) is None:
            return
        self._steps = {key: value for key, value in self._steps.items() if key[0] != job_id}
        if why is not None:
            from opentelemetry.trace import StatusCode

            span.set_attribute("safelight.outcome", why)
            span.set_status(StatusCode.ERROR)
        span.end()

    def close(self) -> None:
        """End the spans of all jobs: the worker ends, and they wait for others."""
        for job_id in list(self._jobs):
            self.ended(job_id, "put_back")

    def _span(self, job_id: str, name: str, began: int, ended: int, at: int | None = None) -> None:
        if (job := self._jobs.get(job_id)) is None or _tracer is None:
            return
        from opentelemetry.trace import set_span_in_context

        attributes = {} if at is None else {"safelight.picture": at}
        context = set_span_in_context(job, _context(None))
        span = _tracer.start_span(name, context=context, start_time=began, attributes=attributes)
        span.end(ended)
