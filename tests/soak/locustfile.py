"""Users of Locust, some who draw and some who look. `load.py` starts a server for them.

    locust --locustfile tests/soak/locustfile.py --host http://localhost:7860

The variable SAFELIGHT_TOKEN is the server's token, if it has one.
"""

from __future__ import annotations

import os
import time
from typing import Any

from locust import HttpUser, between, task

TOKEN = os.environ.get("SAFELIGHT_TOKEN")
THINGS = ("apple", "cat", "dog", "pizza", "teddy bear", "car", "banana", "chair")


class Person(HttpUser):
    abstract = True
    wait_time = between(0.2, 1.0)

    def on_start(self) -> None:
        if TOKEN:
            self.client.headers["Authorization"] = f"Bearer {TOKEN}"


class Drawer(Person):
    """Requests a picture, follows its job, and gets picture and thumbnail."""

    weight = 3

    @task
    def draw(self) -> None:
        began = time.monotonic()
        thing = THINGS[int(began * 1000) % len(THINGS)]
        settings = {"prompt": f"a red {thing}", "steps": 4, "sampler": "euler"}
        with self.client.post("/api/jobs", json=settings, catch_response=True) as answer:
            if answer.status_code == 429:  # a full queue, with the time to wait
                answer.success()
                time.sleep(int(answer.headers["Retry-After"]))
                return
        job: Any = answer.json()
        while job.get("status") in ("queued", "running"):
            time.sleep(0.5)
            job = self.client.get(f"/api/jobs/{job['id']}", name="/api/jobs/ID").json()
        failed = None if job.get("status") == "succeeded" else RuntimeError(str(job)[:200])
        self.environment.events.request.fire(
            request_type="JOB",
            name="from asking to the picture",
            response_time=(time.monotonic() - began) * 1000,
            response_length=0,
            exception=failed,
            context={},
        )
        if failed is None:
            picture = job["pictures"][0]["id"]
            self.client.get(f"/api/pictures/{picture}", name="/api/pictures/ID")
            place = f"/api/pictures/{picture}/thumbnail"
            self.client.get(place, name="/api/pictures/ID/thumbnail")


class Looker(Person):
    """Looks through the pictures."""

    weight = 2

    @task(3)
    def recent(self) -> None:
        self.client.get("/api/jobs?limit=20", name="/api/jobs?limit=20")

    @task(2)
    def search(self) -> None:
        self.client.get("/api/jobs?search=apple", name="/api/jobs?search=…")

    @task
    def health(self) -> None:
        self.client.get("/healthz")

    @task
    def figures(self) -> None:
        self.client.get("/metrics")
