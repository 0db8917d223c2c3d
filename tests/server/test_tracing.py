"""Traces: one shows a picture's whole way, within the client's trace, without the prompt."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from inside import Inside
from serving import wait_for

from safelight.server import tracing
from safelight.server.tracing import JobSpans

pytest.importorskip("opentelemetry.sdk")

CLIENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
SECRET = "a zebra with stripes"


@pytest.fixture
def sent() -> Iterator[Any]:
    """Return the spans that were sent, from an exporter that keeps them."""
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter = InMemorySpanExporter()
    tracing.start("test", exporter)
    yield exporter.get_finished_spans
    tracing.stop()


def test_one_trace_shows_the_way_of_a_picture(tmp_path: Path, sent: Any) -> None:
    """It goes from the client's own span over the request to each part of the worker's work."""
    how = {"prompt": SECRET, "negative_prompt": SECRET, "count": 2, "steps": 2, "sampler": "euler"}
    with Inside(tmp_path) as server:
        answer = server.ask("POST", "/api/jobs?token=secret", how, traceparent=CLIENT)
        assert answer.status == 202
        wait_for(lambda: any(span.name == "job" for span in sent()))
        server.ask("GET", f"/api/jobs/{answer.json()['id']}")
    spans = sent()
    parts = ["queued", "encode", *["decode", "save", "steps"] * 2]
    assert sorted(span.name for span in spans) == sorted(
        ["POST /api/jobs", "GET /api/jobs/{job_id}", "job", *parts]
    )
    request, job = (
        next(span for span in spans if span.name == name) for name in ("POST /api/jobs", "job")
    )
    trace = int(CLIENT.split("-")[1], 16)
    assert (request.context.trace_id, request.parent.span_id) == (trace, 0xB7AD6B7169203331)
    assert request.attributes["http.response.status_code"] == 202
    assert (job.context.trace_id, job.parent.span_id) == (trace, request.context.span_id)
    assert job.attributes["safelight.steps"] == 2
    assert job.attributes["safelight.model"] == "embedded"
    within = [span for span in spans if span.name in parts]
    assert {span.parent.span_id for span in within} == {job.context.span_id}
    for span in within:
        assert job.start_time <= span.start_time <= span.end_time <= job.end_time
    order = {(span.name, span.attributes.get("safelight.picture")): span for span in within}
    for at in (0, 1):
        ends = [order[name, at] for name in ("steps", "decode", "save")]
        assert [span.start_time for span in ends] == sorted(span.start_time for span in ends)
    told = " ".join(span.to_json() for span in spans)
    assert "zebra" not in told
    assert "token" not in told


def test_a_job_that_fails_and_one_that_is_lost_say_so(sent: Any) -> None:
    from safelight.server.claims import Claim

    jobs = JobSpans("worker")
    for name in ("fails", "stays"):
        jobs.claimed(Claim(name, "token", {"steps": 3}, frozenset(), False, waited=2.5))
        jobs.stepped(name, 0, 0.1)
    jobs.ended("fails", "out_of_memory")
    jobs.ended("fails")
    jobs.close()
    jobs.decoded("stays", 0)
    spans = [span for span in sent() if span.name == "job"]
    found = [span.attributes["safelight.outcome"] for span in spans]
    assert found == ["out_of_memory", "put_back"]
    assert all(span.end_time - span.start_time >= 2.5e9 for span in spans)
    assert len(sent()) == 4  # with two that say how long they were queued


@pytest.mark.parametrize(
    ("variables", "sends"),
    [
        ({}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"}, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:9/v1/traces"}, True),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9", "OTEL_SDK_DISABLED": "true"}, False),
    ],
)
def test_traces_are_off_unless_asked_for(
    variables: dict[str, str], sends: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (*tracing.PLACES, "OTEL_SDK_DISABLED"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    tracing.start("test")
    assert tracing.on() is sends
    tracing.stop()
    assert not tracing.on()
    assert tracing.here() is None


def test_a_collector_that_is_away_is_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    from opentelemetry.sdk.trace.export import SpanExportResult

    answers = [SpanExportResult.FAILURE] * 3 + [SpanExportResult.SUCCESS] * 2
    exporter = tracing.Telling(SimpleNamespace(export=lambda _: answers.pop(0)))
    with caplog.at_level(logging.INFO):
        for _ in range(5):
            exporter.export([])
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [
        "traces are lost: the collector does not take them; it is tried again",
        "traces are sent again",
    ]


def test_a_package_that_is_missing_is_told_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setitem(__import__("sys").modules, "opentelemetry.sdk.trace", None)
    with caplog.at_level(logging.WARNING):
        tracing.start("test")
    assert not tracing.on()
    assert "pip install 'safelight[tracing]'" in caplog.text
