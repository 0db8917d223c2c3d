"""Thousands of connections, streams and visits: the others see none of it."""

from __future__ import annotations

import contextlib
import gc
import secrets
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2 as httpx
import pytest
from inside import SOAK, figure, size
from serving import Serving, wait_for
from test_worst import KEY, OTHER, QUICK, TOKEN, Others, Tree

from safelight.server.limits import most

pytestmark = pytest.mark.xdist_group("crowd")  # one server for them all
LONG = {"prompt": "a cat", "steps": 500, "sampler": "euler"}
MANY = size(100, 2000)
TRUSTED = [part for last in (1, 2) for part in ("--trust-proxy", f"127.0.0.{last}")]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 3 * MANY)), hard))
    folder = tmp_path_factory.mktemp("crowd")
    with Serving(folder, "--dtype", "float32", *TRUSTED, token=TOKEN) as running:
        running.ready()
        wait_for(lambda: running.client.get("/studio/").status_code == 200)
        yield running
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def connected(server: Serving) -> socket.socket:
    """Open a connection from another address, so that it is a stranger's."""
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), 30, source_address=("127.0.0.2", 0))


def draws(server: Serving) -> float:
    """Return the seconds until another client's job is drawn."""
    with httpx.Client(base_url=server.url, headers=OTHER, timeout=60) as client:
        began = time.perf_counter()
        job = client.post("/api/jobs", json=QUICK).json()["id"]
        wait_for(lambda: client.get(f"/api/jobs/{job}").json()["status"] == "succeeded", 30)
        return time.perf_counter() - began


def test_idle_connections(server: Serving) -> None:
    before = draws(server)
    with contextlib.ExitStack() as held, Tree(server.process.pid) as tree:
        for _ in range(MANY + 50):
            held.enter_context(contextlib.closing(connected(server)))
        with Others(server) as others:
            seconds = draws(server)
            wait_for(lambda: len(others.health) > 50)
    figure(
        f"26: {MANY + 50} idle connections: /healthz after {max(others.health) * 1000:.0f} ms at "
        f"most, another's job drawn after {seconds:.2f} s ({before:.2f} s before), "
        f"{tree.most:.0f} MB"
    )
    if SOAK:
        assert max(others.health) < 1


def test_half_open_streams(server: Serving) -> None:
    """Many addresses each open the stream of an existing job, and read nothing."""
    before, each = draws(server), 50
    jobs: list[tuple[dict[str, str], str]] = []
    with httpx.Client(base_url=server.url, headers=KEY, timeout=60) as client:
        for number in range(MANY // each):
            stranger = {"X-Forwarded-For": f"192.0.2.{number + 1}"}
            answer = client.post("/api/jobs", json=LONG, headers=stranger)
            jobs.append((stranger, answer.json()["id"]))
    with contextlib.ExitStack() as held, Tree(server.process.pid) as tree:
        sockets: list[socket.socket] = []
        for stranger, job in jobs:
            for _ in range(each):
                raw = held.enter_context(contextlib.closing(connected(server)))
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                raw.sendall(
                    f"GET /api/jobs/{job}/events HTTP/1.1\r\nHost: localhost\r\n"
                    f"X-Forwarded-For: {stranger['X-Forwarded-For']}\r\n"
                    f"Authorization: {KEY['Authorization']}\r\n\r\n".encode()
                )
                sockets.append(raw)
        opened = sum(raw.recv(15).startswith(b"HTTP/1.1 200") for raw in sockets)
        with Others(server) as others:
            seconds = draws(server)
            wait_for(lambda: len(others.health) > 50)
    with httpx.Client(base_url=server.url, headers=KEY, timeout=60) as client:
        for stranger, job in jobs:
            client.delete(f"/api/jobs/{job}", headers=stranger)
    figure(
        f"26: {opened} event streams that nobody reads: /healthz after "
        f"{max(others.health) * 1000:.0f} ms at most, another's job drawn after {seconds:.2f} s "
        f"({before:.2f} s before), {tree.most:.0f} MB"
    )
    assert opened == MANY <= most() // 2
    if SOAK:
        assert max(others.health) < 1


# --- visits --------------------------------------------------------------------------------------


def visit(client: httpx.Client) -> None:
    """Open the page, ask it for something and close it, as a browser does."""
    page = client.get("/studio/")
    assert page.status_code == 200
    session = secrets.token_hex(5)
    for name in ("theme.css", "gradio_api/startup-events"):
        assert client.get(f"/studio/{name}").status_code == 200
    body = {"data": [None, "embedded"], "fn_index": READ[0], "session_hash": session}
    joined = client.post("/studio/gradio_api/queue/join", json=body)
    assert joined.status_code == 200, joined.text
    with client.stream("GET", f"/studio/gradio_api/queue/data?session_hash={session}") as told:
        (ended,) = [line for line in told.iter_lines() if "process_completed" in line]
        assert '"success":true' in ended, ended


READ: list[int] = []


def memory(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 1e3


def test_visits_leave_nothing_behind(server: Serving) -> None:
    known = server.client.get("/studio/config").json()["dependencies"]
    READ.append(next(one["id"] for one in known if one["api_name"] == "read"))
    warm, count = size(20, 300), size(20, 10_000)
    grown: list[float] = []

    def visits(number: int) -> None:
        with httpx.Client(base_url=server.url, headers=KEY, timeout=60) as client:
            for _ in range(number):
                visit(client)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(visits, [warm // 2] * 2))
        before, began = memory(server.process.pid), time.monotonic()
        for _ in range(10):
            list(pool.map(visits, [count // 20] * 2))
            grown.append(memory(server.process.pid) - before)
    gc.collect()
    figure(
        f"17: {count} visits of the page in {time.monotonic() - began:.0f} s: the server's memory "
        f"{before:.0f} MB, then {', '.join(f'{one:+.0f}' for one in grown)}"
    )
    assert grown[-1] < size(12, 100)
