"""`safelight serve`, end to end, on the model that ships."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from inside import Inside
from PIL import Image
from serving import Serving, wait_for

import safelight
from safelight.engine import core
from safelight.engine.requests import resolve_request
from safelight.recipe import read_recipe

pytestmark = pytest.mark.xdist_group("serve")  # one server for them all
QUICK = {"steps": 3, "sampler": "euler"}
SMALL = {"width": 64, "height": 64}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    with Serving(tmp_path_factory.mktemp("serve"), "--dtype", "float32") as running:
        running.ready()
        yield running


def png(colour: str = "red", mode: str = "RGB") -> str:
    out = io.BytesIO()
    Image.new(mode, (64, 64), colour).save(out, "PNG")
    return base64.b64encode(out.getvalue()).decode()


def picture(server: Serving, job: Any, index: int = 0) -> bytes:
    answer = server.client.get(f"/api/pictures/{job['pictures'][index]['id']}")
    assert answer.status_code == 200
    return answer.content


def test_a_prompt_becomes_a_picture_with_its_recipe(server: Serving) -> None:
    job = server.finished(server.submit(prompt="a red apple", seed=3, count=2, **QUICK))
    assert job["status"] == "succeeded"
    assert [p["seed"] for p in job["pictures"]] == [3, 4]
    data = picture(server, job, 1)
    with Image.open(io.BytesIO(data)) as image:
        assert image.size == (256, 256)
    recipe = read_recipe(data)
    assert recipe["settings"]["prompt"] == "a red apple"
    assert recipe["settings"]["seed"] == 4


def test_the_same_picture_as_from_python(server: Serving) -> None:
    job = server.finished(server.submit(prompt="a cat", seed=7, **QUICK))
    with Image.open(io.BytesIO(picture(server, job))) as drawn:
        alone = safelight.load(dtype="float32").generate("a cat", seed=7, **QUICK).images[0]
        assert safelight.picture.largest_difference(drawn, alone) <= 1


def test_image_to_image_and_inpainting(server: Serving) -> None:
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    out = io.BytesIO()
    mask.save(out, "PNG")
    job = server.finished(
        server.submit(
            prompt="a cat", image=png(), mask=base64.b64encode(out.getvalue()).decode(), **QUICK
        )
    )
    with Image.open(io.BytesIO(picture(server, job))) as image:
        assert image.getpixel((60, 10)) == (255, 0, 0)
        assert image.crop((0, 0, 32, 64)).getextrema() != ((255, 255), (0, 0), (0, 0))
    assert "image_sha256" in job["settings"]


def test_events_of_a_job(server: Serving) -> None:
    job_id = server.submit(prompt="a cat", steps=40, sampler="euler")
    kinds: list[str] = []
    with server.client.stream("GET", f"/api/jobs/{job_id}/events") as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["x-accel-buffering"] == "no"
        for line in answer.iter_lines():
            if line.startswith("event: "):
                kinds.append(line.removeprefix("event: "))
            elif line.startswith("data: "):
                data = json.loads(line.removeprefix("data: "))
                assert data["job"]["id"] == job_id
                if kinds[-1] == "preview":
                    shown = Image.open(io.BytesIO(base64.b64decode(data["preview"])))
                    assert shown.size == (256, 256)
    assert kinds[-2:] == ["picture", "end"]  # of one picture, too
    assert {"progress", "preview"} <= set(kinds)
    assert data["job"]["status"] == "succeeded"
    assert data["job"]["progress"] == {"step": 40, "steps": 40}


def test_each_picture_has_an_event(server: Serving) -> None:
    job_id = server.submit(prompt="a cat", count=3, **QUICK)
    with server.client.stream("GET", f"/api/jobs/{job_id}/events") as answer:
        lines = list(answer.iter_lines())
    told = [
        json.loads(lines[i + 1][6:]) for i, line in enumerate(lines) if line == "event: picture"
    ]
    assert sorted(event["index"] for event in told) == [0, 1, 2]


def test_a_picture_at_another_size(server: Serving) -> None:
    job = server.finished(server.submit(prompt="a cat", **QUICK))
    path = f"/api/pictures/{job['pictures'][0]['id']}"
    large = server.client.get(path, params={"width": 512, "height": 256}).content
    with Image.open(io.BytesIO(large)) as image:
        assert image.size == (512, 256)
    assert read_recipe(large)["enlarged"] == [512, 256]
    for side in ("width", "height"):  # the other keeps the picture's proportions
        with Image.open(io.BytesIO(server.client.get(path, params={side: 128}).content)) as image:
            assert image.size == (128, 128)
    assert server.client.get(path, params={"width": 99999, "height": 64}).status_code == 422


def test_the_example_of_the_documentation_works(server: Serving) -> None:
    described = server.client.get("/openapi.json").json()["paths"]["/api/jobs"]["post"]
    content = described["requestBody"]["content"]["application/json"]
    job = server.finished(server.submit(**content["example"]))
    assert job["status"] == "succeeded"
    assert content["schema"]["properties"]["sampler"]["anyOf"][0]["enum"][0] == "pndm"


def test_events_of_a_job_that_is_over(server: Serving) -> None:
    job = server.finished(server.submit(prompt="a cat", **QUICK))
    text = server.client.get(f"/api/jobs/{job['id']}/events").text
    assert text.count("event: ") == 1
    assert "event: end" in text


def test_cancelled_within_a_step(server: Serving) -> None:
    job_id = server.submit(prompt="a cat", steps=1000, sampler="euler")
    wait_for(lambda: server.job(job_id)["progress"]["step"] > 0)
    assert server.client.delete(f"/api/jobs/{job_id}").json()["status"] == "cancelled"
    after = server.finished(server.submit(prompt="a cat", **QUICK), seconds=30)
    assert after["status"] == "succeeded"
    assert server.job(job_id)["status"] == "cancelled"
    again = server.client.post(f"/api/jobs/{job_id}/retry")
    assert (again.status_code, again.json()["status"]) == (202, "queued")
    server.client.delete(f"/api/jobs/{job_id}")


def test_a_finished_job_is_removed_with_its_pictures(server: Serving) -> None:
    job = server.finished(server.submit(prompt="a cat", image=png(), **QUICK))
    thumbnail = f"/api/pictures/{job['pictures'][0]['id']}/thumbnail"
    assert server.client.get(thumbnail).status_code == 200
    files = [p for p in server.data.rglob("*.png") if job["pictures"][0]["id"] in p.name]
    assert len(files) == 2
    assert server.client.delete(f"/api/jobs/{job['id']}").status_code == 200
    assert server.client.get(f"/api/jobs/{job['id']}").status_code == 404
    assert server.client.get(thumbnail).status_code == 404
    assert not any(p.exists() for p in files)
    assert not list((server.data / "inputs").glob(f"{job['id']}*"))


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"steps": 0}, "steps"),
        ({"steps": 1001}, "steps"),
        ({"steps": True}, "steps"),
        ({"width": 65}, "width"),
        ({"width": 2056}, "width"),
        ({"height": 56}, "height"),
        ({"count": 65}, "count"),
        ({"count": 64, "steps": 1000}, "steps × count"),
        ({"guidance_scale": 1e308}, "guidance_scale"),
        ({"guidance_scale": "7"}, "guidance_scale"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"prompt": "x" * 16385}, "prompt"),
        ({"prompt": "\0"}, "prompt"),
        ({"sampler": "eulr"}, "eulr"),
        ({"strength": 0}, "strength"),
        ({"strength": 0.1, "steps": 5, "image": png()}, "strength"),
        ({"steps": 1, "image": png()}, "strength"),
        ({"stepz": 3}, "stepz"),
        ({"image": "http://example.org/a.png"}, "image"),
        ({"image": "AAAA"}, "image"),
        ({"mask": png()}, "mask"),
    ],
)
def test_what_cannot_be_is_named(server: Serving, body: dict[str, Any], named: str) -> None:
    answer = server.client.post("/api/jobs", json=body)
    assert answer.status_code == 422
    told = answer.json()
    assert named in told["detail"]
    assert "\n" not in told["detail"]
    fields = {"steps × count": "steps", "eulr": "sampler"}
    assert told["field"] == fields.get(named, named)
    codes = {"stepz": "unknown_setting", "eulr": "unknown_sampler"}
    assert told["code"] == codes.get(named, "invalid")


@pytest.mark.parametrize(
    ("path", "status", "body"),
    [
        ("/v1/images/edits", 400, {"steps": "5", "strength": "0.1"}),
        ("/sdapi/v1/img2img", 422, {"steps": 5, "denoising_strength": 0.1, "init_images": [png()]}),
    ],
)
def test_a_strength_that_leaves_no_step(
    server: Serving, path: str, status: int, body: dict[str, Any]
) -> None:
    sent: dict[str, Any] = {"json": {"prompt": "a cat", **body}}
    if path.endswith("edits"):
        file = ("a.png", base64.b64decode(png()), "image/png")
        sent = {"data": {"prompt": "a cat", **body}, "files": {"image": file}}
    answer = server.client.post(path, **sent)
    assert answer.status_code == status, answer.text
    assert "strength 0.1 leaves none of 5 steps; it should be at least 0.2" in answer.text


def test_a_body_of_another_type(server: Serving) -> None:
    """Another site's page can send such a body without asking first."""
    answer = server.client.post("/api/jobs", content=b"{}", headers={"content-type": "text/plain"})
    assert answer.status_code == 422


def test_bodies_that_are_no_json(server: Serving) -> None:
    for body in (b"", b"{", b"[]", b"null", b'{"steps": NaN}', b"\xff\xfe", b"[" * 30_000):
        answer = server.client.post(
            "/api/jobs", content=body, headers={"content-type": "application/json"}
        )
        assert answer.status_code in (400, 422), body[:20]


def test_one_key_makes_one_job(server: Serving) -> None:
    answers: list[Any] = []

    def send() -> None:
        answers.append(
            server.client.post(
                "/api/jobs",
                json={"prompt": "a cat", "steps": 2},
                headers={"Idempotency-Key": "the same"},
            )
        )

    threads = [threading.Thread(target=send) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.json()["id"] for answer in answers}) == 1


def test_lists_models_samplers_metrics(server: Serving) -> None:
    server.finished(server.submit(prompt="a very rare zebra", **QUICK))
    found = server.client.get("/api/jobs", params={"search": "rare ZEBRA"}).json()
    assert [job["settings"]["prompt"] for job in found] == ["a very rare zebra"]
    model = server.client.get("/api/models").json()[0]
    assert (model["name"], model["ready"], model["width"]) == ("embedded", True, 256)
    names = [s["name"] for s in server.client.get("/api/samplers").json()["samplers"]]
    assert {"pndm", "euler_a", "dpmpp_2m"} <= set(names)
    metrics = server.client.get("/metrics").text
    assert 'safelight_jobs{status="succeeded"}' in metrics
    assert "safelight_ready 1.0" in metrics
    assert server.client.get("/openapi.json").json()["info"]["title"] == "Safelight"


def test_prompts_are_in_no_log(server: Serving) -> None:
    server.finished(server.submit(prompt="a secret wish", **QUICK))
    log = server.log()
    assert "secret" not in log
    lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    assert any(line.get("route") == "/api/jobs/{job_id}" for line in lines)


UP = ("..", "%2e%2e", "..%2f", "..%5c", "%252e%252e", "....//", "..;", "%c0%ae%c0%ae", "\\\\..")
TARGETS = ("etc/passwd", "jobs.sqlite3", "server.log", "inputs", "pictures/x.png", "%00", "C:%5cx")


@pytest.mark.parametrize(
    "place",
    ["/api/pictures/{}", "/api/pictures/{}/thumbnail", "/api/jobs/{}", "/v1/models/{}", "/{}"],
)
def test_no_path_leads_out_of_the_data_folder(server: Serving, place: str) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    for up in UP:
        for depth in (1, 3, 6):
            for target in TARGETS:
                path = place.format("/".join([up] * depth) + "/" + target)
                # No client in between that would tidy the path up.
                with socket.create_connection((host, int(port)), 10) as raw:
                    head = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close"
                    raw.sendall(f"{head}\r\n\r\n".encode())
                    answer = b"".join(iter(lambda: raw.recv(65536), b""))
                status = int(answer.split()[1])
                assert status in (400, 404, 405, 422), path
                assert b"root:" not in answer
                assert b"SQLite" not in answer


def test_health_answers_while_pictures_are_drawn(server: Serving) -> None:
    jobs = [server.submit(prompt="a cat", steps=100, sampler="euler") for _ in range(4)]
    assert all(server.client.get("/healthz").status_code == 200 for _ in range(50))
    for job in jobs:
        server.client.delete(f"/api/jobs/{job}")


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """Return a server for the tests that end its processes in turn."""
    with Serving(tmp_path_factory.mktemp("durable"), "--exact") as running:
        running.ready()
        yield running


class TestDurability:
    def test_killed_and_started_again(self, tmp_path: Path) -> None:
        """SIGKILL ends server and worker in the middle of jobs."""
        # Exact: such a worker does not measure how many rows pay, and is there sooner.
        serving = Serving(tmp_path, "--dtype", "float32", "--exact")
        wish: dict[str, Any] = {"prompt": "a cat", "steps": 30, "sampler": "euler"} | SMALL
        with serving:
            serving.ready()
            jobs = [serving.submit(**wish, seed=i, count=2) for i in range(3)]
            wait_for(lambda: any(serving.job(j)["progress"]["step"] > 3 for j in jobs))
            os.kill(serving.worker(), signal.SIGKILL)
            wait_for(lambda: serving.worker() != 0)
            wait_for(lambda: any(serving.job(j)["pictures"] for j in jobs))
            serving.process.kill()
            serving.process.wait()
            (serving.data / "pictures" / ".safelight-0123456789abcdef.part").write_bytes(b"x")
            serving.start()
            ended = [serving.finished(j) for j in jobs]
        model = safelight.load(dtype="float32")
        for i, job in enumerate(ended):
            assert job["status"] == "succeeded"
            assert [p["index"] for p in job["pictures"]] == [0, 1]
            path = serving.data / "pictures" / f"{job['pictures'][0]['id']}.png"
            alone = model.generate(**wish, seed=i).images[0]
            with Image.open(path) as drawn:
                assert drawn.tobytes() == alone.tobytes()
        rows = {p["id"] for job in ended for p in job["pictures"]}
        assert {p.stem for p in (serving.data / "pictures").iterdir()} == rows
        with sqlite3.connect(serving.data / "jobs.sqlite3") as database:
            assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        database.close()

    def test_a_poison_job_fails_and_the_others_finish(self, serving: Serving) -> None:
        poison = serving.submit(prompt="a dog", steps=1000, sampler="euler")
        wait_for(lambda: serving.job(poison)["progress"]["step"] > 0)
        others = [serving.submit(prompt="a cat", **QUICK, **SMALL) for _ in range(3)]
        for _ in range(3):
            wait_for(lambda: serving.job(poison)["progress"]["step"] > 0)
            os.kill(serving.worker(), signal.SIGSEGV)
            wait_for(lambda: serving.job(poison)["progress"]["step"] == 0)
        assert serving.finished(poison)["status"] == "failed"
        assert "stopped 3 times" in serving.job(poison)["error"]
        for other in others:
            assert serving.finished(other)["status"] == "succeeded"

    def test_told_to_end_it_puts_back_what_it_has_not_finished(self, serving: Serving) -> None:
        job = serving.submit(prompt="a cat", steps=1000, sampler="euler")
        wait_for(lambda: serving.job(job)["progress"]["step"] > 0)
        serving.process.send_signal(signal.SIGTERM)
        assert serving.process.wait(20) == 0
        serving.start()
        found = serving.job(job)
        assert (found["status"], found["attempts"]) in (("queued", 0), ("running", 1))

    def test_a_full_queue_says_when_to_come_back(self, tmp_path: Path) -> None:
        """test_overload gives the bound by --queue."""
        with Inside(tmp_path, draws=False, bound=2) as server:
            first = server.submit(prompt="a cat", steps=1000, count=2, sampler="euler")
            answer = server.ask("POST", "/api/jobs", {"prompt": "a cat"})
            assert answer.status == 429
            assert int(answer.headers["retry-after"]) > 0
            server.ask("DELETE", f"/api/jobs/{first}")
            assert server.ask("POST", "/api/jobs", {"prompt": "a cat"}).status == 202


def test_a_fault_of_ours_fails_one_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The worker goes on, and its log says where the fault is, without the prompt."""

    def resolve(model: Any, request: Any) -> Any:
        if request.prompt == "a secret":
            raise OverflowError(request.prompt)
        return resolve_request(model, request)

    monkeypatch.setattr(core, "resolve_request", resolve)
    with Inside(tmp_path, dtype="float32") as server:
        bad, good = (server.submit(prompt=prompt, **QUICK) for prompt in ("a secret", "a cat"))
        assert server.finished(good)["status"] == "succeeded"
        assert "met a fault of Safelight" in server.finished(bad)["error"]
    log = capfd.readouterr().err
    assert all(words in log for words in ("a job failed", "OverflowError", "in resolve"))
    assert "a secret" not in log


def refused(*arguments: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "safelight", "serve", "--data-dir", str(folder), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2, done.stderr
    return done.stderr.strip().splitlines()[-1]


def test_what_does_not_start(server: Serving, tmp_path: Path) -> None:
    line = refused("--host", "0.0.0.0", folder=tmp_path)
    assert (
        line == "error: --host 0.0.0.0 can be reached from other machines: add --token auto, "
        "or give a token by --token-file or SAFELIGHT_TOKEN; an empty one is none"
    )
    assert "no model" in refused("--model", "nothing", "--port", "0", folder=tmp_path)
    assert "--queue 0: expected 1 or more" in refused("--queue", "0", folder=tmp_path)
    port = server.url.rsplit(":", 1)[1]
    assert "cannot be listened on" in refused("--port", port, folder=tmp_path / "other")


def test_it_serves_without() -> None:
    """PyTorch belongs to the worker, and the command line adds the page to the server."""
    absent = ("torch", "safelight.studio", "gradio")
    code = f"import sys, safelight.server.run; print([m for m in {absent} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
