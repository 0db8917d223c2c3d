"""Overload: too much work, and clients that are too slow. Other clients do not notice it."""

from __future__ import annotations

import os
import signal
import socket
import statistics
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from inside import SOAK, figure, size
from serving import Serving, wait_for

pytestmark = pytest.mark.xdist_group("overload")  # one server for them all
PATIENCE = size(2, 30)
"""Seconds that the server waits for a client."""

BOUND = size(20, 1000)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    folder = tmp_path_factory.mktemp("overload")
    # A stopped worker is replaced; here it must not be while clients submit.
    with Serving(folder, "--queue", str(BOUND), slow=PATIENCE, silence=600) as running:
        running.ready()
        # What the first job imports is not measured here.
        running.finished(running.submit(prompt="a cat", steps=1, sampler="euler"))
        yield running


# --- too much work -------------------------------------------------------------------------------


def memory(pid: int) -> float:
    """Return a process's own memory in MB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 1024


class Health:
    """Measures how long /healthz takes, again and again."""

    def __init__(self, server: Serving) -> None:
        self.seconds: list[float] = []
        self._url, self._over = server.url, threading.Event()
        self._thread = threading.Thread(target=self._ask)

    def _ask(self) -> None:
        with httpx.Client(base_url=self._url, timeout=60) as client:
            while not self._over.is_set():
                began = time.perf_counter()
                assert client.get("/healthz").status_code == 200
                self.seconds.append(time.perf_counter() - began)
                time.sleep(0.005 if SOAK else 0.05)

    def __enter__(self) -> Health:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    @property
    def late(self) -> float:
        """Return the 99th percentile in milliseconds."""
        return 1000 * statistics.quantiles(self.seconds, n=100)[98]


def test_a_queue_is_bounded_while_submissions_hammer(server: Serving) -> None:
    """A job is accepted completely or not at all; the worker is stopped meanwhile."""
    n = size(160, 10_000)
    worker = server.worker()
    os.kill(worker, signal.SIGSTOP)
    try:
        with Health(server) as idle:
            wait_for(lambda: len(idle.seconds) >= size(20, 100))
        before = memory(server.process.pid)
        with Health(server) as health, ThreadPoolExecutor(8) as pool:
            began = time.perf_counter()
            answers = list(pool.map(lambda i: submitted(server, i), range(n)))
            seconds = time.perf_counter() - began
        grown = memory(server.process.pid) - before
        taken = [answer.json()["id"] for answer in answers if answer.status_code == 202]
        refused = [answer for answer in answers if answer.status_code == 429]
        assert (len(taken), len(refused)) == (BOUND // 2, n - BOUND // 2)
        assert all(int(answer.headers["retry-after"]) > 0 for answer in refused)
        assert retried_is_refused(server, taken)
        figure(
            f"9: {n} submissions against a bound of {BOUND} pictures, two each, by 8 clients: "
            f"{len(taken)} taken, {len(refused)} refused with 429, {n / seconds:.0f} a second; "
            f"health at the 99th percentile {health.late:.1f} ms of {len(health.seconds)} "
            f"(before {idle.late:.1f}), the server's memory {before:.0f} MB, then {grown:+.1f}"
        )
        assert health.seconds  # it answered all the while
        if SOAK:  # a suite shares its processors
            assert health.late < 100
        assert grown < 30
        for job in taken[size(3, 50) :]:
            server.client.delete(f"/api/jobs/{job}")
    finally:
        os.kill(worker, signal.SIGCONT)
    for job in taken[: size(3, 50)]:
        if server.job(job)["status"] != "cancelled":
            assert server.finished(job)["status"] == "succeeded"


def submitted(server: Serving, seed: int) -> Any:
    body = {"prompt": "a cat", "steps": 1, "sampler": "euler", "count": 2, "seed": seed}
    return server.client.post("/api/jobs", json=body)


def retried_is_refused(server: Serving, taken: list[str]) -> bool:
    """Return whether a cancelled job is refused again once another job has its place."""
    server.client.delete(f"/api/jobs/{taken[0]}")
    assert submitted(server, 0).status_code == 202
    answer = server.client.post(f"/api/jobs/{taken[0]}/retry")
    return answer.status_code == 429 and int(answer.headers["retry-after"]) > 0


def test_readiness_is_asked_of_the_worker_once(server: Serving) -> None:
    """One step answers all callers at once."""
    worker = server.worker()
    os.kill(worker, signal.SIGSTOP)
    try:
        with ThreadPoolExecutor(20) as pool:
            asked = [pool.submit(server.client.get, "/readyz") for _ in range(20)]
            time.sleep(0.5)
            os.kill(worker, signal.SIGCONT)
            assert {one.result().status_code for one in asked} == {200}
    finally:
        os.kill(worker, signal.SIGCONT)


# --- clients that are too slow -------------------------------------------------------------------

HEAD = b"POST /api/jobs HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
BODY = b'{"prompt": "%s"}' % (b"a" * 1000)
SLOW = {
    "head": HEAD,
    "nothing": b"",
    "body": HEAD + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY,
    "chunked body": HEAD + b"Transfer-Encoding: chunked\r\n\r\n400\r\n" + b" " * 1024,
    "second head": HEAD,
}
AT_ONCE = {"body": len(SLOW["body"]) - len(BODY), "chunked body": len(HEAD) + 33}


def held(server: Serving) -> dict[int, str]:
    """Return the ports of clients that the server is connected to, with the bytes that wait in the
    kernel for each.
    """
    own, found = int(server.url.rsplit(":", 1)[1]), {}
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        _, here, there, state, waits = line.split()[:5]
        # Established, or closed only by the client.
        if int(here[-4:], 16) == own and state in ("01", "08"):
            found[int(there[-4:], 16)] = waits
    return found


def connected(server: Serving) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), 4 * PATIENCE)


def dripped(server: Serving, what: str) -> float:
    """Return the seconds until a client is cut that sends a byte each third of PATIENCE."""
    with connected(server) as raw:
        if what == "second head":
            raw.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert b"200" in raw.recv(4096)
        at_once = AT_ONCE.get(what, 0)
        raw.sendall(SLOW[what][:at_once])
        raw.settimeout(PATIENCE / 3)
        began = time.monotonic()
        for i in range(at_once, at_once + 100):
            try:
                raw.sendall(SLOW[what][i : i + 1])
                while raw.recv(4096):  # an answer, as 408, and then the end
                    pass
                break
            except TimeoutError:
                assert time.monotonic() - began < 2 * PATIENCE, f"a slow {what} is not cut"
            except ConnectionError:
                break
        return time.monotonic() - began


def never_read(server: Serving) -> float:
    """Return the seconds until a client is cut that asks for much and reads nothing."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.socket() as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.connect((host, int(port)))
        raw.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * 150)
        waited, began = "", time.monotonic()
        while waits := held(server).get(raw.getsockname()[1]):
            if waits != waited:  # the kernel still accepts some of it
                waited, began = waits, time.monotonic()
            assert time.monotonic() - began < 5 * PATIENCE, "a client that never reads is not cut"
            time.sleep(0.1)
        return time.monotonic() - began


@pytest.mark.parametrize(
    "what", ["head", "nothing", "body", "chunked body", "second head", "reader"]
)
def test_slow_clients_are_cut_and_cost_the_others_nothing(server: Serving, what: str) -> None:
    many = size(10, 100) if what != "reader" else size(3, 30)
    cut: list[float] = []

    def one(_: int) -> None:
        cut.append(never_read(server) if what == "reader" else dripped(server, what))

    with ThreadPoolExecutor(many) as pool, Health(server) as health:
        list(pool.map(one, range(many)))
    assert len(cut) == many
    figure(
        f"10: {many} clients slow in {what}: cut after {max(cut):.1f} s at most, "
        f"health meanwhile {health.late:.1f} ms at the 99th percentile"
    )
    assert max(cut) < PATIENCE + size(3, 2)
    job = server.submit(prompt="a cat", steps=1, sampler="euler")
    assert server.finished(job)["status"] == "succeeded"


def test_no_connection_is_left(server: Serving) -> None:
    wait_for(lambda: len(held(server)) <= 1, 10)  # the client's own
