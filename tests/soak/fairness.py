"""Fairness: one key has many jobs, another key one. How long does the one job wait?

    python tests/soak/fairness.py [--jobs 1000] [--exact] [--tries 3]

A real server in this process draws with the embedded model. The time of one job is measured on the
idle server; then one key queues JOBS of them, and another key asks for one. Prints the time from
that request to its job's end, and how many jobs of the first key ended meanwhile.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "server"))

from inside import Inside
from serving import wait_for

from safelight.request import Request
from safelight.server.costs import cost
from safelight.server.store import new_id

KEYS = {"anna": "key of anna", "ben": "key of ben"}
BODY = {"prompt": "a red apple", "steps": 20, "sampler": "euler", "seed": 1}


def ask(server: Inside, name: str, method: str, path: str, body: Any = None) -> Any:
    return server.ask(method, path, body, authorization=f"Bearer {KEYS[name]}").json()


def drawn(server: Inside, name: str) -> tuple[float, float]:
    """Return the seconds from a request to its job's end, and to the moment a worker took it."""
    began = time.monotonic()
    job = ask(server, name, "POST", "/api/jobs", BODY)["id"]
    wait_for(lambda: ask(server, name, "GET", f"/api/jobs/{job}")["status"] == "succeeded", 600)
    took, told = time.monotonic() - began, ask(server, name, "GET", f"/api/jobs/{job}")
    created, started = (datetime.fromisoformat(told[f"{at}_at"]) for at in ("created", "started"))
    return took, (started - created).total_seconds()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--tries", type=int, default=3)
    parser.add_argument("--exact", action="store_true")
    options = parser.parse_args()
    how: dict[str, Any] = {"token": "of the admin", "keys": KEYS, "exact": options.exact}
    with (
        tempfile.TemporaryDirectory() as folder,
        Inside(Path(folder), bound=10 * options.jobs, **how) as server,
    ):

        def count(status: str) -> int:
            return server.hub.store.counts().get(status, 0)

        drawn(server, "ben")  # the first one is slower
        alone = min(drawn(server, "ben")[0] for _ in range(3))
        request, info = Request(**BODY), server.hub.catalogue.info
        assert info.width is not None
        assert info.height is not None
        native = info.width, info.height
        for _ in range(options.jobs):  # not over HTTP, which would take longer than the drawing
            server.hub.store.submit(
                new_id(),
                request.to_dict(),
                client="api",
                cost=cost(request, 20, native),
                bound=10 * options.jobs,
                owner="key:anna",
            )
        ask(server, "anna", "POST", "/api/jobs", BODY)
        for _ in range(options.tries):
            queued, running, before = count("queued"), count("running"), count("succeeded")
            took, waited = drawn(server, "ben")
            others = count("succeeded") - before - 1
            print(  # noqa: T201
                f"a job alone takes {alone:.2f} s; beside {queued} that wait and {running} in the "
                f"making of another key {took:.2f} s ({took / alone:.1f} times as long), of which "
                f"{waited:.3f} s until a worker took it; {others} of the other's ended"
            )


if __name__ == "__main__":
    main()
