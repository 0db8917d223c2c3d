"""Answers that all APIs share: errors in one form, heads of answers, and forms within bounds."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hostile import encoded
from inside import Inside
from test_strangers import multipart

from safelight.server import guard
from safelight.server.caged import MAX_JSON
from safelight.server.served import MAX_NAME

NO_JOB = f"/api/jobs/{'0' * 32}"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Inside]:
    with Inside(tmp_path_factory.mktemp("answers"), draws=False) as running:
        yield running


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/nowhere", "/api/nowhere", "/v1/nowhere", "/sdapi/v1/nowhere"])
def test_an_unknown_address(server: Inside, path: str) -> None:
    answer = server.ask("GET", path)
    told = answer.json()
    assert (answer.status, told["code"], told["field"]) == (404, "not_found", None)
    assert told["detail"] == told["error"]["message"]
    assert "no such address" in told["detail"]


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/api/jobs", "GET, HEAD, POST"),
        (NO_JOB, "GET, HEAD, DELETE"),
        (f"{NO_JOB}/events", "GET"),
        ("/v1/images/edits", "POST"),
    ],
)
def test_a_wrong_method_names_the_right_ones(server: Inside, path: str, allowed: str) -> None:
    answer = server.ask("PUT", path)
    assert (answer.status, answer.headers["allow"]) == (405, allowed)
    assert answer.json()["error"]["message"] == f"the method must be {allowed}"


@pytest.mark.parametrize(
    ("method", "path", "what"),
    [
        ("GET", "/api/jobs/XYZ", "job"),
        ("GET", "/api/jobs/XYZ/events", "job"),
        ("DELETE", "/api/jobs/XYZ", "job"),
        ("POST", "/api/jobs/XYZ/retry", "job"),
        ("GET", "/api/pictures/XYZ", "picture"),
        ("GET", "/api/pictures/XYZ/thumbnail", "picture"),
    ],
)
def test_an_id_that_is_none_is_one_that_is_not_there(
    server: Inside, method: str, path: str, what: str
) -> None:
    answer = server.ask(method, path)
    said = {"detail": f"there is no such {what}", "code": "not_found", "field": None}
    assert (answer.status, answer.json()) == (404, said)


def test_a_wrong_query_or_header_is_named(server: Inside) -> None:
    answer = server.ask("GET", "/api/jobs?limit=x")
    assert (answer.status, answer.json()["field"]) == (422, "limit")
    answer = server.ask("POST", "/api/jobs", {"prompt": "a"}, idempotency_key="x" * 256)
    assert (answer.status, answer.json()["field"]) == (422, "idempotency-key")


@pytest.mark.parametrize("path", ["/api/jobs", "/v1/images/generations", "/sdapi/v1/txt2img"])
def test_a_number_of_many_digits_is_said(server: Inside, path: str) -> None:
    answer = server.ask("POST", path, b'{"seed": ' + b"9" * 5000 + b"}")
    assert answer.status in (400, 422)
    assert b"a number of too many digits" in answer.body


def test_a_long_name_of_a_model_is_compared_with_none(
    server: Inside, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compared(*_: object) -> Any:
        raise AssertionError

    monkeypatch.setattr("safelight.server.served._closest", compared)
    body = {"prompt": "a", "model": "x" * (MAX_NAME + 1)}
    for path, status in (("/api/jobs", 422), ("/v1/images/generations", 404)):
        answer = server.ask("POST", path, body)
        assert answer.status == status
        assert f"at most {MAX_NAME} characters" in answer.body.decode()


# --- HEAD -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", ["/healthz", "/v1/models", "/api/jobs", "/api/pictures/X", "/docs"]
)
def test_a_head_is_that_of_the_whole_answer(server: Inside, path: str) -> None:
    whole, head = server.ask("GET", path), server.ask("HEAD", path)
    assert (head.status, head.body) == (whole.status, b"")
    assert head.headers["content-length"] == whole.headers["content-length"]
    assert head.headers["content-type"] == whole.headers["content-type"]


def test_a_stream_has_no_head(server: Inside) -> None:
    assert server.ask("HEAD", f"{NO_JOB}/events").status == 405


# --- forms ----------------------------------------------------------------------------------------


def test_the_texts_of_a_form_are_bounded(server: Inside, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "LINGER", 0.01)
    half = b"x" * (MAX_JSON // 2 + 1)
    for fields in ({"model": 2 * half}, {"image": 2 * half}, {"model": half, "user": half}):
        body, kind = multipart(prompt=b"a", **fields)
        body = body.replace(b'; filename="x.png"', b"")
        answer = server.ask("POST", "/v1/images/edits", body, content_type=kind)
        assert answer.status == 413
        assert "image and mask must be uploaded" in answer.json()["error"]["message"]


@pytest.mark.parametrize("charset", ["undefined", "punycode", "idna", "x"])
def test_a_form_is_utf_8(server: Inside, charset: str) -> None:
    body, kind = multipart(prompt=b"a", image=encoded())
    answer = server.ask("POST", "/v1/images/edits", body, content_type=f"{kind}; charset={charset}")
    assert answer.status == 400
    assert "charset must be utf-8" in answer.json()["error"]["message"]


def test_a_form_s_type_is_read_in_any_case(server: Inside) -> None:
    body, kind = multipart(prompt=b"a", image=encoded(), n=b"x")
    kind = kind.replace("multipart/form-data", "Multipart/Form-Data") + "; Charset=UTF-8"
    answer = server.ask("POST", "/v1/images/edits", body, content_type=kind)
    assert (answer.status, answer.json()["error"]["param"]) == (400, "n")


def test_settings_are_checked_before_a_picture_is_decoded(server: Inside) -> None:
    body, kind = multipart(prompt=b"a", steps=b"0", image=b"no picture")
    answer = server.ask("POST", "/v1/images/edits", body, content_type=kind)
    assert (answer.status, answer.json()["error"]["param"]) == (400, "steps")


# --- the end --------------------------------------------------------------------------------------


def test_a_stopping_server_ends_a_stream_with_an_error(tmp_path: Path) -> None:
    """The job is cancelled: nobody can ask for its pictures later."""
    with Inside(tmp_path, draws=False) as server:

        async def stopped() -> bytes:
            body = {"prompt": "a", "stream": True}
            asking = asyncio.ensure_future(server.asked("POST", "/v1/images/generations", body))
            while not server.hub._events._listeners:
                await asyncio.sleep(0.01)
            server.hub.drain()
            return (await asking).body

        kind, _, data = server.within(stopped()).decode().partition("\n")
        assert kind == "event: error"
        told = json.loads(data.removeprefix("data: "))
        assert told["type"] == "error"
        assert "the server is stopping" in told["error"]["message"]
        assert [job["status"] for job in server.ask("GET", "/api/jobs").json()] == ["cancelled"]
