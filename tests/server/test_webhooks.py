"""Webhooks: where they are sent, how they are signed, and that none is lost."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import ipaddress
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx2
import pytest
from inside import Inside
from serving import wait_for
from test_owners import finish
from test_store import claim, submit

from safelight import SafelightError
from safelight.server import webhooks
from safelight.server.jobs import Job, Status
from safelight.server.outbox import Notice
from safelight.server.store import Store
from safelight.server.webhooks import (
    EACH,
    WAITS,
    BlockedError,
    Webhooks,
    check_url,
    is_public,
    resolve,
)

URL = "https://example.com/done"


class Receiver(HTTPServer):
    """Keeps what it receives. statuses: of the next answers; then 200."""

    def __init__(self) -> None:
        self.got: list[tuple[dict[str, str], bytes]] = []
        self.statuses: list[int] = []
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                receiver.got.append(({k.lower(): v for k, v in self.headers.items()}, body))
                self.send_response(receiver.statuses.pop(0) if receiver.statuses else 200)
                self.send_header("location", "/elsewhere")
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None: ...

        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/done?x=1"


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    opened = Receiver()
    yield opened
    opened.shutdown()
    opened.server_close()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store(f"sqlite:///{tmp_path / 'jobs.sqlite3'}")
    opened.migrate()
    yield opened
    opened.close()


def ended(store: Store, url: str = URL, **how: Any) -> str:
    """Return a job with a webhook that has ended."""
    job = submit(store, webhook=url, **how)
    mine = claim(store, alone=True)
    store.finish(mine.id, mine.token, warnings=[])
    return job.id


def next_notice(store: Store, now: float) -> Notice:
    found = store.next_notice(now, (), now + 60)
    assert found is not None
    return found


def test_a_job_stays_until_its_webhook_was_told(store: Store) -> None:
    """Retention deletes the job's row, and with it the webhook's."""
    ended(store)
    end = time.time() + 100
    assert store.mark(end, end) == 0
    store.ended(end)
    store.noticed(next_notice(store, end), end, end + 7200)  # not taken: it is tried again
    assert store.mark(end, end) == 0
    store.noticed(next_notice(store, end + 7200), end, None)
    assert store.mark(end, end) == 1


# --- where they go --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        *(
            "",
            "example.com",
            "ftp://example.com/",
            "file:///etc/passwd",
            "https://",
            7,
            None,
            ["x"],
        ),
        *(
            "https://anna:secret@example.com/",
            "http://example.com:99999/",
            "http://[::1",
            "http://a b/",
        ),
        *("https://exämple.com/", "https://example.com/\n", "https://example.com/" + "x" * 2000),
        *("http://127.0.0.1/", "http://[::1]:80/", "http://10.1.2.3/", "http://169.254.169.254/"),
        *("http://[fe80::1]/", "http://[::ffff:127.0.0.1]/", "http://0.0.0.0/"),
        *("http://[v1.x]/", "http://[64:ff9b:1::1]/", "http://[::127.0.0.1]/"),
    ],
)
def test_what_is_no_address_of_the_open_network_is_refused(url: Any) -> None:
    with pytest.raises(SafelightError, match=r"^webhook must be an http or https URL") as refused:
        check_url(url, private=False)
    assert refused.value.field == "webhook"


def test_private_addresses_may_be_allowed() -> None:
    assert check_url("http://127.0.0.1/", private=True) == "http://127.0.0.1/"
    assert check_url(URL, private=False) == URL


@pytest.mark.parametrize(
    ("address", "public"),
    [
        *(("1.1.1.1", True), ("2606:4700::1111", True), ("64:ff9b::101:101", True)),
        *(("127.8.8.8", False), ("10.0.0.1", False), ("172.16.0.1", False), ("0.0.0.0", False)),
        *(("192.168.1.1", False), ("169.254.1.1", False), ("100.64.0.1", False)),
        *(("224.0.0.1", False), ("255.255.255.255", False), ("::", False), ("::1", False)),
        *(("fe80::1", False), ("fc00::1", False), ("ff02::1", False), ("::ffff:10.0.0.1", False)),
        *(("64:ff9b::a00:1", False), ("2002:a00:1::", False), ("2001::1", False)),
        *(("64:ff9b:1::a00:1", False), ("64:ff9b:1::101:101", False), ("::a00:1", False)),
        *(("::ffff:0:a00:1", False), ("::ffff:0:101:101", True)),
    ],
)
def test_which_addresses_are_of_the_open_network(address: str, public: bool) -> None:
    assert is_public(ipaddress.ip_address(address)) is public


@pytest.mark.parametrize("host", ["localhost", "2130706433", "0x7f.1", "127.1"])
def test_names_of_this_machine_are_blocked_whatever_they_look_like(host: str) -> None:
    with pytest.raises((BlockedError, socket.gaierror)):
        asyncio.run(resolve(host, 80, private=False))


def test_one_private_address_among_others_blocks_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def looked_up(*_: Any, **__: Any) -> Any:
        return [(2, 1, 6, "", (address, 80)) for address in ("1.1.1.1", "10.0.0.1")]

    monkeypatch.setattr(socket, "getaddrinfo", looked_up)
    with pytest.raises(BlockedError):
        asyncio.run(resolve("rebound.example", 80, private=False))
    assert asyncio.run(resolve("rebound.example", 80, private=True)) == ["1.1.1.1", "10.0.0.1"]


def test_a_name_is_looked_up_once_and_that_address_is_connected_to(
    store: Store, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    real = socket.getaddrinfo

    def looked_up(host: Any, *given: Any, **how: Any) -> Any:
        asked.append(str(host))
        return real("127.0.0.1" if host == "rebound.example" else host, *given, **how)

    monkeypatch.setattr(socket, "getaddrinfo", looked_up)
    store.submit(
        "a" * 32, {"count": 1}, client="api", cost=1, bound=9,
        webhook=f"http://rebound.example:{receiver.server_port}/done",
    )  # fmt: skip
    mine = claim(store)
    store.finish(mine.id, mine.token, warnings=[])
    _run(store, lambda: bool(receiver.got))
    assert asked.count("rebound.example") == 1
    assert receiver.got[0][0]["host"] == f"rebound.example:{receiver.server_port}"


def test_slow_look_ups_hold_up_their_owner_and_no_other_work(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A look-up goes on in its thread after it was given up; it cannot be ended."""
    asked: list[str] = []
    answer = threading.Event()

    def looked_up(host: Any, *given: Any, **how: Any) -> Any:
        asked.append(str(host))
        answer.wait(60)
        raise socket.gaierror

    monkeypatch.setattr(socket, "getaddrinfo", looked_up)
    monkeypatch.setattr(webhooks, "PATIENCE", 0.3)
    for i in range(EACH + 1):
        ended(store, url=f"http://{i}.example/", owner="a")

    async def run() -> None:
        loop = asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(1))
        sender = Webhooks(store, private=True)
        sender._client = await asyncio.to_thread(httpx2.AsyncClient)  # it takes long
        sender.start()
        async with asyncio.timeout(60):
            while len(asked) < EACH or sender.sent["refused"] < EACH:
                await asyncio.to_thread(time.sleep, 0.01)
            for _ in range(20):  # a third one would begin now
                sender._wake.set()
                await asyncio.sleep(0.01)
            assert len(asked) == EACH
            answer.set()
            while len(asked) <= EACH:
                await asyncio.sleep(0.01)
        await sender.stop()

    asyncio.run(run())


def _run(store: Store, done: Any) -> Webhooks:
    """Send webhooks that are due until a condition is met."""

    async def run() -> Webhooks:
        sender = Webhooks(store, private=True)
        sender.start()
        async with asyncio.timeout(60):
            while not done():
                await asyncio.sleep(0.01)
            while sender._sending:
                await asyncio.sleep(0.01)
        await sender.stop()
        return sender

    return asyncio.run(run())


# --- what they say --------------------------------------------------------------------------------


def test_a_notice_is_signed_as_the_standard_has_it(
    tmp_path: Path, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhooks, "LOOK", 0.1)
    with Inside(tmp_path, draws=False) as server:
        refused = server.ask("POST", "/api/jobs", {"prompt": "x", "webhook": receiver.url})
        assert refused.status == 422
        assert refused.json()["field"] == "webhook"
        server.hub.webhooks.private = True
        body = {"prompt": "a secret", "webhook": receiver.url}
        made = server.ask("POST", "/api/jobs", body, idempotency_key="k")
        assert made.status == 202
        assert "webhook" not in made.json()["settings"]
        other = {"prompt": "a secret", "webhook": f"{receiver.url}&y=2"}
        refused = server.ask("POST", "/api/jobs", other, idempotency_key="k")
        assert refused.status == 422
        assert "came with another request" in refused.json()["detail"]
        picture = finish(server)[made.json()["id"]]
        wait_for(lambda: receiver.got)
        secret = server.ask("GET", "/api/webhook-secret").json()["secret"]
    headers, body = receiver.got[0]
    told = json.loads(body)
    assert told["type"] == "job.succeeded"
    assert told["data"]["id"] == made.json()["id"]
    assert [one["url"] for one in told["data"]["pictures"]] == [f"/api/pictures/{picture}"]
    assert b"secret" not in body
    key = base64.b64decode(secret.removeprefix("whsec_"))
    content = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
    mark = base64.b64encode(hmac.new(key, content, hashlib.sha256).digest()).decode()
    assert headers["webhook-signature"] == f"v1,{mark}"
    assert headers["content-type"] == "application/json"
    assert len(receiver.got) == 1


def test_no_word_of_the_prompt_is_in_it() -> None:
    """Warnings and errors may quote names of a prompt."""
    settings = {"prompt": "a secret", "negative_prompt": "secret"}
    at = datetime(2026, 1, 1, tzinfo=UTC)
    job = Job(
        id="0" * 32,
        status=Status.FAILED,
        created_at=at,
        client="api",
        model=None,
        settings=settings,
        expires_at=None,
    )
    job.warnings = ["embedded was never taught: secret; left out"]
    job.error = "prompt has <lora:secret>, and no such LoRA is there"
    body = webhooks.body_of(job)
    assert json.loads(body)["type"] == "job.failed"
    assert b"secret" not in body


def test_each_owner_has_a_secret_of_its_own(store: Store) -> None:
    secrets = [store.webhook_secret(owner) for owner in ("key:anna", "key:ben", "key:anna")]
    assert secrets[0] == secrets[2] != secrets[1]
    assert len(base64.b64decode(secrets[0].removeprefix("whsec_"))) == 32


# --- none is lost ---------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [500, 404, 302, 410])
def test_what_is_not_taken_is_tried_again_later(
    store: Store, receiver: Receiver, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    monkeypatch.setattr(webhooks, "WAITS", (0.01, 0.01, 0.01))
    monkeypatch.setattr(webhooks, "check_url", lambda url, private: receiver.url)
    receiver.statuses = [status, status, 200]
    ended(store)
    wanted = 1 if status == 410 else 3
    sender = _run(store, lambda: len(receiver.got) == wanted)
    assert sender.sent == ({"refused": 1} if status == 410 else {"refused": 2, "taken": 1})
    assert len({headers["webhook-id"] for headers, _ in receiver.got}) == 1
    assert not store.ended(1e12)


def test_a_restart_goes_on_where_it_was(store: Store) -> None:
    job = ended(store)
    assert store.next_notice(100, (), 160) is None  # its end was not noticed yet
    assert store.ended(100) == 1
    first = store.next_notice(100, (), 160)
    assert isinstance(first, Notice)
    assert (first.job.id, first.url, first.tries) == (job, URL, 1)
    assert store.next_notice(159, (), 200) is None  # it is on the way
    again = store.next_notice(160, (), 200)  # it was under way when the server ended
    assert again is not None
    assert again.tries == 2
    store.noticed(again, 170, None)
    assert store.ended(200) == 0
    assert store.next_notice(1e9, (), 1e9) is None


def test_slow_receivers_hold_up_their_own(store: Store) -> None:
    for owner in ("a", "a", "a", "b"):
        ended(store, owner=owner)
    store.ended(100)
    assert store.next_notice(100, ["a"], 160).owner == "b"  # pyright: ignore[reportOptionalMemberAccess]
    assert store.next_notice(100, ["a"], 160) is None


def test_a_retry_is_told_anew_and_what_waits_is_not_told(store: Store) -> None:
    job = submit(store, webhook=URL)
    assert store.ended(100) == 0
    store.cancel(job.id)
    assert store.ended(100, [job.id]) == 1
    store.noticed(next_notice(store, 100), 100, None)
    store.retry(job.id, 9)
    assert store.ended(100) == 0
    mine = claim(store)
    store.finish(mine.id, mine.token, warnings=[], error="no")
    assert store.ended(100) == 1
    notice = next_notice(store, 100)
    assert (notice.tries, notice.job.status) == (1, "failed")


@pytest.mark.parametrize("due", [None, 106])
def test_an_answer_after_a_retry_does_not_count_for_the_second_end(
    store: Store, due: float | None
) -> None:
    """The receiver retries the job before it answers. due: None if it took the notice."""
    job = submit(store, webhook=URL)
    mine = claim(store)
    store.finish(mine.id, mine.token, warnings=[], error="no")
    store.ended(100)
    first = next_notice(store, 100)
    store.retry(job.id, 9)
    store.noticed(first, 101, due)
    assert store.next_notice(200, (), 260) is None  # the job waits
    mine = claim(store)
    store.finish(mine.id, mine.token, warnings=[])
    assert store.ended(300) == 1
    second = next_notice(store, 300)
    assert (second.tries, second.job.status) == (1, "succeeded")


def test_tries_go_by_the_database_s_clock(
    store: Store, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server's machine may have another time."""
    receiver.statuses = [500]
    ended(store, url=receiver.url)
    monkeypatch.setattr(store, "now", lambda: 1000.0)
    _run(store, lambda: bool(receiver.got))
    assert receiver.got[0][0]["webhook-timestamp"] == "1000"
    assert store.next_notice(1000 + 0.9 * WAITS[0] - 1, (), 2000) is None
    assert store.next_notice(1000 + 1.1 * WAITS[0] + 1, (), 2000) is not None


@pytest.mark.parametrize("turns", range(4))
def test_it_stops_though_a_job_ends_at_that_moment(store: Store, turns: int) -> None:
    """turns: of the event loop between the job's end and the stop."""

    async def run() -> None:
        hooks = Webhooks(store)
        hooks.start()
        await asyncio.sleep(0.1)  # it waits for what ends
        hooks.ended("a job")
        for _ in range(turns):
            await asyncio.sleep(0)
        await asyncio.wait_for(hooks.stop(), 5)

    asyncio.run(run())
