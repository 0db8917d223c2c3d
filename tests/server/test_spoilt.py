"""Weights overwritten while a server runs: one line says so, and no restart loops."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from serving import Serving, wait_for

from safelight.server.supervisor import ending
from weights_tiny import text_folder

JOB = {"prompt": "a", "steps": 4, "sampler": "euler", "width": 64, "height": 64}


def overwrite(path: Path, value: float) -> None:
    """Write other numbers over the end of a file, in place."""
    with path.open("r+b") as file:
        file.seek(-4096, os.SEEK_END)
        file.write(torch.full((1024,), value).numpy().tobytes())


@pytest.mark.soak  # the pauses before a restart add up to half a minute
def test_weights_that_are_overwritten_and_broken_while_a_server_draws(tmp_path: Path) -> None:
    model = text_folder(tmp_path / "model")
    unet = next((model / "unet").glob("*.safetensors"))
    text = next((model / "text_encoder").glob("*.safetensors"))
    arguments = ("--model", str(model), "--dtype", "float32")
    with Serving(tmp_path, *arguments) as server:
        server.ready()
        first = server.client.get("/api/models").json()[0]["sha256"]
        worker = server.worker()

        overwrite(unet, 0.25)
        job = server.finished(server.submit(**JOB))
        assert (job["status"], job["pictures"]) == ("failed", [])
        assert "was overwritten after it was loaded" in job["error"]
        assert server.finished(server.submit(**JOB))["status"] == "succeeded"
        assert server.worker() != worker
        assert server.client.get("/api/models").json()[0]["sha256"] != first
        assert "the model's files are others than before" in server.log()

        good = text.read_bytes()
        text.write_bytes(good[:1000])
        job = server.finished(server.submit(**JOB | {"prompt": "another"}))
        assert job["status"] == "failed"
        wait_for(lambda: server.log().count("cannot be loaded any more") >= 3)
        answer = server.client.get("/readyz")
        assert answer.status_code == 503
        assert "the model cannot be loaded any more" in answer.json()["detail"]
        assert server.client.get("/healthz").status_code == 200
        assert "safelight_ready 0.0" in server.client.get("/metrics").text
        waiting = server.submit(**JOB)
        text.write_bytes(good)
        assert server.finished(waiting)["status"] == "succeeded"
        assert server.client.get("/readyz").status_code == 200
        assert "Traceback" not in server.log()
        lines = [line for line in server.log().splitlines() if "starting it again in" in line]
        pauses = [float(line.rpartition(" in ")[2].split()[0]) for line in lines]
        assert pauses == sorted(pauses)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (1, "exit code 1"),
        (None, "exit code None"),
        (-9, "SIGKILL"),
        (-7, "SIGBUS: a file"),
        (-200, "signal 200"),
    ],
)
def test_the_end_of_a_worker_in_words(code: int | None, said: str) -> None:
    assert ending(code).startswith(said)
