"""Named things belong to their owner: all routes, tried by two owners and an admin."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from fastapi import FastAPI
from inside import Answer, Inside
from PIL import Image
from test_uploads import Gradio, upload

from safelight.errors import SafelightError
from safelight.recipe import png_texts
from safelight.server.bodies import RefusedError
from safelight.server.callers import SCOPE, Caller
from safelight.server.guard import Rules
from safelight.server.uploads import Uploads
from safelight.studio.mount import EVENT, MESSAGES, Studio, _kept
from safelight.studio.paths import KEPT_AT, folder_of
from safelight.studio.sessions import MAX_EVENTS, MAX_SESSIONS, Sessions

KEYS = {"ann": "token of ann", "bob": "token of bob"}


@dataclass
class Two:
    """A server with two keys, and a job of ann's with a picture."""

    server: Inside
    job: str = ""
    picture: str = ""

    def ask(self, name: str, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        path = path.replace("{job_id}", self.job).replace("{picture_id}", self.picture)
        headers["authorization"] = f"Bearer {KEYS.get(name, 'token of the admin')}"
        return self.server.ask(method, path, body, **headers)

    def drawn(self) -> None:
        """Another job of ann's, finished."""
        self.job = self.ask("ann", "POST", "/api/jobs", {"prompt": "a secret"}).json()["id"]
        ids = finish(self.server)
        self.picture = ids[self.job]


def finish(server: Inside) -> dict[str, str]:
    """Draw all jobs that wait; return a picture of each job."""
    from safelight.server.jobs import Picture

    store, files, found = server.hub.store, server.hub.files, {}
    while (claim := store.claim("w", alone=True)) is not None:
        recipe = {
            "safelight": "1",
            "model": {"name": "m", "sha256": "0" * 64},
            "settings": {**claim.settings, "steps": 1},
            "size": [8, 8],
        }
        picture = Picture(id=claim.picture_id(0), index=0, seed=0, width=8, height=8, recipe=recipe)
        files.keep(Image.new("RGB", (8, 8)), picture.id, png_texts(recipe))
        store.add_picture(claim.id, claim.token, picture)
        store.finish(claim.id, claim.token, warnings=[])
        found[claim.id] = picture.id
    return found


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Two]:
    folder = tmp_path_factory.mktemp("owners")
    with Inside(folder, draws=False, token="token of the admin", keys=KEYS) as server:
        made = Two(server)
        made.drawn()
        yield made


def _waiting(two: Two) -> str:
    return two.ask("ann", "POST", "/api/jobs", {"prompt": "a secret"}).json()["id"]


NAMED: dict[tuple[str, str], Callable[[Two], Any]] = {
    ("GET", "/api/jobs/{job_id}"): lambda two: None,
    ("GET", "/api/jobs/{job_id}/events"): lambda two: None,
    ("POST", "/api/jobs/{job_id}/retry"): lambda two: None,
    ("DELETE", "/api/jobs/{job_id}"): lambda two: two.drawn(),
    ("GET", "/api/pictures/{picture_id}"): lambda two: None,
    ("GET", "/api/pictures/{picture_id}/thumbnail"): lambda two: None,
}
"""The routes with an id or a name, and what restores the thing after a call."""

UNOWNED = {("GET", "/v1/models/{name}")}
"""The served models belong to everybody."""


def test_no_route_that_names_a_thing_is_left_out(two: Two) -> None:
    app: Any = two.server.app
    while not isinstance(app, FastAPI):
        app = app.app
    found = {
        (method.upper(), path)
        for path, methods in app.openapi()["paths"].items()
        for method in methods
        if "{" in path
    }
    assert found == {*NAMED, *UNOWNED}


@pytest.mark.parametrize(("method", "path"), NAMED)
def test_another_owner_s_thing_is_as_none(two: Two, method: str, path: str) -> None:
    query = ("", "?width=64&height=64") if path.endswith("{picture_id}") else ("",)
    for more in query:
        foreign = two.ask("bob", method, path + more)
        missing = two.ask("bob", method, path.replace("{job_id}", "0" * 32) + more)
        missing = (
            missing
            if "{job_id}" in path
            else two.ask("bob", method, path.replace("{picture_id}", "0" * 32) + more)
        )
        assert (
            (foreign.status, foreign.body) == (missing.status, missing.body) == (404, foreign.body)
        )
        assert b"secret" not in foreign.body
        for name in ("ann", "admin"):
            assert two.ask(name, method, path + more).status in (200, 202), name
            NAMED[method, path](two)


def test_lists_have_one_s_own_alone(two: Two) -> None:
    two.ask("bob", "POST", "/api/jobs", {"prompt": "of bob"})
    told = {name: two.ask(name, "GET", "/api/jobs?limit=200").json() for name in ("ann", "bob")}
    assert {job["settings"]["prompt"] for job in told["ann"]} == {"a secret"}
    assert {job["settings"]["prompt"] for job in told["bob"]} == {"of bob"}
    assert two.ask("bob", "GET", "/api/jobs?search=secret").json() == []
    assert len(two.ask("admin", "GET", "/api/jobs?limit=200").json()) >= 2
    two.server.hub.store.claim("w", alone=True)  # nothing is left for other tests
    finish(two.server)


def test_one_idempotency_key_of_two_owners_is_two(two: Two) -> None:
    given = {"idempotency_key": "the same"}
    jobs = {
        name: two.ask(name, "POST", "/api/jobs", {"prompt": name}, **given).json()
        for name in ("ann", "bob")
    }
    assert jobs["ann"]["id"] != jobs["bob"]["id"]
    assert jobs["bob"]["settings"]["prompt"] == "bob"
    again = two.ask("ann", "POST", "/api/jobs", {"prompt": "ann"}, **given).json()
    assert again["id"] == jobs["ann"]["id"]
    finish(two.server)


@pytest.mark.parametrize("how", ["interrupt", "skip"])
def test_automatic1111_s_progress_and_interrupt_are_one_s_own(two: Two, how: str) -> None:
    async def both() -> tuple[Any, ...]:
        from safelight.server.jobs import ModelInfo

        two.server.hub.catalogue.info = ModelInfo(name="embedded", width=64, height=64)
        two.server.hub.catalogue.arrived.set()
        body = {"prompt": "a secret", "steps": 2}
        bearer = {"authorization": f"Bearer {KEYS['ann']}"}
        call = asyncio.ensure_future(two.server.asked("POST", "/sdapi/v1/txt2img", body, **bearer))
        while not (jobs := (await two.server.hub.list(limit=1, status="queued"))[0]):
            await asyncio.sleep(0.01)
        other = {"authorization": f"Bearer {KEYS['bob']}"}
        seen = await two.server.asked("GET", "/sdapi/v1/progress", **other)
        await two.server.asked("POST", f"/sdapi/v1/{how}", {}, **other)
        kept = (await two.server.hub.list(limit=1))[0][0].status
        own = await two.server.asked("GET", "/sdapi/v1/progress", **bearer)
        await two.server.asked("POST", f"/sdapi/v1/{how}", {}, **bearer)
        ended = (await two.server.hub.list(limit=1))[0][0].status
        await call
        return (
            seen.json()["state"]["job_count"],
            kept,
            own.json()["state"]["job"],
            ended,
            jobs[0].id,
        )

    count, kept, named, ended, job = two.server.within(both())
    assert (count, kept, named, ended) == (0, "queued", job, "cancelled")


def test_long_names_of_keys_stay_apart() -> None:
    one, other = (Caller("a", "k" * 70 + end) for end in "ab")
    assert one.owner != other.owner
    assert max(len(one.owner), len(other.owner)) <= 64
    assert Caller("key:ann").owner != Caller("a", "ann").owner


@pytest.mark.parametrize("token", ["", " "])
def test_an_empty_token_would_open_all(token: str) -> None:
    with pytest.raises(SafelightError):
        Rules(token)


# --- the studio ----------------------------------------------------------------------------------


def test_files_of_the_page_are_their_owner_s(tmp_path: Path) -> None:
    ann, bob = Caller("a", "ann"), Caller("a", "bob")
    for kind, end in (("inside", "html"), ("grids", "png")):
        name = f"{kind}/{folder_of(ann)}/{'0' * 32}.{end}"
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(b"x")
        told = [_kept(tmp_path, KEPT_AT + name, who).status_code for who in (ann, bob, Caller())]
        assert told == [200, 404, 200]
        foreign = name.replace(folder_of(ann), folder_of(bob))
        assert _kept(tmp_path, KEPT_AT + foreign, bob).status_code == 404


def test_a_session_of_the_page_is_its_client_s() -> None:
    queue = SimpleNamespace(
        pending_messages_per_session={},
        pending_event_ids_session={},
        active_jobs=[],
        event_queue_per_concurrency_id={},
    )
    sessions = Sessions(queue)
    sessions.check("of-ann", "ann")
    sessions.check("of-ann", "ann")
    with pytest.raises(RefusedError) as refused:
        sessions.check("of-ann", "bob")
    assert refused.value.status_code == 403
    for bad in ("", None, 7, "x" * 65, "a/b", ["a"], "ü"):
        with pytest.raises(RefusedError):
            sessions.check(bad, "bob")
    for number in range(MAX_SESSIONS + 5):  # it loses its own sessions alone
        queue.pending_messages_per_session[f"s{number}"] = []
        sessions.check(f"s{number}", "bob")
    assert len(queue.pending_messages_per_session) == MAX_SESSIONS
    sessions.check("of-ann", "ann")
    for number in range(3000):  # many clients: Gradio never drops one by itself
        sessions.check(f"c{number}", f"c{number // 100}")
    assert len(sessions._owners) < 2000


def test_a_page_with_a_key_may_change_its_address(tmp_path: Path) -> None:
    """A phone that leaves its Wi-Fi does so. Without keys, a page is identified by its address."""

    async def page(scope: Any, receive: Any, send: Any) -> None:
        served.append(scope["path"])

    async def body() -> Any:
        return {"type": "http.request", "body": b'{"session_hash": "one"}', "more_body": False}

    async def visits() -> None:
        studio = Studio(None, cast(Any, SimpleNamespace(root=tmp_path)), cast(Any, None))
        studio._page = asyncio.get_running_loop().create_future()
        studio._page.set_result(page)
        for key, other in (("ann", "bob"), (None, None)):
            queue = SimpleNamespace(active_jobs=[], event_queue_per_concurrency_id={})
            studio._sessions = Sessions(queue)
            for path, method in ((EVENT, "POST"), (MESSAGES, "GET")):
                scope = {"type": "http", "path": path, "method": method, "headers": []}
                scope |= {"query_string": b"session_hash=one"}
                callers = [Caller("10.0.0.1", key), Caller("192.0.2.7", other)]
                callers += [Caller("192.0.2.7", key)] * (key is not None)
                for caller in callers:
                    try:
                        await studio(scope | {SCOPE: caller}, body, None)
                        told.append(200)
                    except RefusedError as error:
                        told.append(error.status_code)

    served, told = list[str](), list[int]()
    asyncio.run(visits())
    assert told == [200, 403, 200] * 2 + [200, 403] * 2
    assert served.count(EVENT) == served.count(MESSAGES) == 3


def test_one_client_has_a_share_of_the_page_s_events() -> None:
    def event(name: str) -> Any:
        return SimpleNamespace(request=SimpleNamespace(scope={SCOPE: Caller("10.0.0.1", name)}))

    held = [[event("ann")] for _ in range(MAX_EVENTS - 1)]
    waiting = SimpleNamespace(queue=[event("ann")])
    sessions = Sessions(
        SimpleNamespace(
            active_jobs=[None, *held, None], event_queue_per_concurrency_id={"f": waiting}
        )
    )
    with pytest.raises(RefusedError) as refused:
        sessions.check_event("ann@10.0.0.1")
    assert refused.value.status_code == 503
    sessions.check_event("bob@10.0.0.1")


def test_uploads_are_counted_by_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safelight.server import uploads

    monkeypatch.setattr(uploads, "OWN", 250)
    monkeypatch.setattr(uploads, "LEAST", 1)
    gradio = Gradio(tmp_path / "uploads")
    app = Uploads(gradio, gradio.folder)
    assert [upload(app, 200, owner=name) for name in ("ann", "ann", "bob")] == [200, 429, 200]
