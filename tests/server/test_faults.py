"""The network returns values that are no numbers, or memory runs out: only that job is affected."""

from __future__ import annotations

import base64
import io
import itertools
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from inside import Inside, figure, size
from PIL import Image
from serving import wait_for

from safelight.engine import Job, core
from safelight.engine.capacity import probe
from safelight.engine.job import advance
from safelight.errors import SafelightError
from safelight.model import Model
from safelight.server.loaded import Loaded
from safelight.server.worker import Worker

pytestmark = pytest.mark.xdist_group("faults")  # one server for them all
SAMPLERS = ("euler", "euler_a", "dpmpp_2m", "heun", "ddim")
VALUES = {"NaN": float("nan"), "Inf": float("inf"), "-Inf": -float("inf")}
SMALL = {"width": 64, "height": 64}
NO_MEMORY = "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Inside]:
    with Inside(tmp_path_factory.mktemp("faults"), dtype="bfloat16", rows=8) as running:
        yield running


def loaded(server: Inside) -> Loaded:
    assert server.worker is not None
    one = server.worker._models.get("embedded")
    assert one is not None
    return one


def model_of(server: Inside) -> Model:
    return loaded(server).model


def poison(patch: pytest.MonkeyPatch, model: Any, place: str, call: int, value: float) -> list[int]:
    """Put the value into the result of this call, at a random place; return the list of calls.

    A text whose result is not finite is encoded again, so for a text each call gets the value.
    """
    owner, name = {
        "text": (model.text_encoder, "forward"),
        "unet": (model.unet, "forward"),
        "vae": (model.vae, "decode"),
    }[place]
    real, calls = getattr(owner, name), []

    def answer(*given: Any, **how: Any) -> Any:
        made = real(*given, **how).contiguous().clone()
        calls.append(1)
        if place == "text" or len(calls) == call:
            made.view(-1)[torch.randint(made.numel(), ())] = value
        return made

    patch.setattr(owner, name, answer)
    return calls


PLACES = [
    *(("text", 1) for _ in range(4)),
    *(("unet", step) for step in (1, 2, 3, 4)),
    *(("vae", 1) for _ in range(4)),
]
CASES = list(itertools.product(PLACES, VALUES, SAMPLERS))


@pytest.mark.parametrize("part", range(size(1, 4)))
def test_what_is_no_number_is_never_a_picture(
    server: Inside, monkeypatch: pytest.MonkeyPatch, part: int
) -> None:
    """There are 180 cases; each is tried once more in float32, with a warning."""
    assert server.worker is not None
    cases = CASES[part :: size(67, 4)]
    for i, ((place, call), value, sampler) in enumerate(cases):
        with monkeypatch.context() as patch:
            # Else prompts seen before are not encoded again.
            loaded(server).engine._conditionings.found.clear()
            calls = poison(patch, model_of(server), place, call, VALUES[value])
            job = server.finished(
                server.submit(
                    prompt="a cat",
                    seed=i,
                    steps=4,
                    sampler=sampler,
                    guidance_scale=4.0,
                    **SMALL,
                )
            )
        assert len(calls) >= call
        assert job["status"] == "succeeded", (place, call, value, sampler, job["error"])
        # Another warning comes if this processor has no instructions for bfloat16.
        assert job["warnings"][-1] == f"seed {i} gave NaN in bfloat16 and was drawn in float32"
        assert "was trained on 256x256" in job["warnings"][-2]
        assert len(job["warnings"]) == 2 + len(model_of(server).warnings)
        assert job["pictures"][0]["recipe"]["dtype"] == "float32"
        recipe = job["pictures"][0]["recipe"]
        assert recipe["warnings"] == job["warnings"]
        assert_is_that_of_float32(server, job)
    figure(f"13: {len(cases)} of {len(CASES)} poisoned calls, each drawn in float32 with a warning")


def assert_is_that_of_float32(server: Inside, job: Any) -> None:
    assert server.worker is not None
    settings = {k: v for k, v in job["settings"].items() if v is not None}
    precise = loaded(server).precise
    assert precise is not None
    alone = precise.generate(**settings).images[0]
    with Image.open(io.BytesIO(server.picture(job["id"]))) as drawn:
        assert drawn.tobytes() == alone.tobytes()


def test_no_numbers_in_float32_either(server: Inside, monkeypatch: pytest.MonkeyPatch) -> None:
    server.finished(server.submit(prompt="a dog", steps=2, sampler="euler"))
    for model in (
        model_of(server),
        server.worker and server.worker._models._load("embedded", "float32"),
    ):
        poison(monkeypatch, model, "unet", 2, VALUES["NaN"])
    assert server.worker is not None
    monkeypatch.setattr(loaded(server), "precise", model)
    job = server.finished(server.submit(prompt="a cat", steps=4, sampler="euler"))
    assert (job["status"], job["pictures"]) == ("failed", [])
    assert "NaN at step 2 of 4" in job["error"]


def test_a_preview_of_no_numbers_is_left_out(
    server: Inside, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server goes on: a decoder that fails midway may succeed in the end."""
    from safelight.engine import preview

    def refuse(*_: Any) -> None:
        raise SafelightError("the picture has values that are no numbers (NaN)")

    monkeypatch.setattr(preview, "preview", refuse)
    job_id = server.submit(prompt="a cat", steps=20, sampler="euler")
    assert server.ask("GET", f"/api/jobs/{job_id}/events").body.endswith(b"\n\n")
    assert server.job(job_id)["status"] == "succeeded"


@pytest.mark.parametrize(
    ("own", "decoding", "shown"), [(True, True, 0), (True, False, 2), (False, True, 2)]
)
def test_no_preview_is_decoded_beside_a_picture_of_the_same_autoencoder(
    monkeypatch: pytest.MonkeyPatch, own: bool, decoding: bool, shown: int
) -> None:
    """Both would pack the same layers at the same time."""
    made: list[Any] = []
    monkeypatch.setattr(
        "safelight.server.worker.encoded_preview", lambda *given: made.append(given)
    )
    model = SimpleNamespace(
        preview_vae=None if own else "tiny", family=SimpleNamespace(latent_rgb=None)
    )
    one: Any = SimpleNamespace(model=model, engine=SimpleNamespace(decoding=decoding))
    held: Any = SimpleNamespace(previewed=0.0, loaded=one, claim=SimpleNamespace(id="x"))
    job = SimpleNamespace(done=False, clean=1, view=2, size=(8, 8))
    worker: Any = SimpleNamespace(_pipe=SimpleNamespace(send=lambda _: None))
    Worker._preview(worker, held, SimpleNamespace(job=job, index=0))
    assert len(made) == shown


def test_a_model_that_decodes_for_a_cancelled_job_is_in_use(
    server: Inside, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dropping it would wait for the decoder, as if the worker hung."""
    go_on, real = threading.Event(), core.finish

    def finish(*given: Any) -> Any:
        go_on.wait(20)
        return real(*given)

    monkeypatch.setattr(core, "finish", finish)
    worker, engine = server.worker, loaded(server).engine
    assert worker is not None
    job = server.submit(prompt="a cat", steps=1, sampler="euler")
    wait_for(lambda: engine._in_flight is not None and not engine._in_flight.done())
    assert server.ask("DELETE", f"/api/jobs/{job}").status < 300
    wait_for(lambda: not worker._held)
    assert worker._drawing == {"embedded"}
    go_on.set()
    wait_for(lambda: not worker._drawing)


def test_to_look_for_them_costs_nothing(server: Inside) -> None:
    """It takes at most a hundredth of a step."""
    model = model_of(server)
    state = torch.randn(1, 4, 8, 8)

    def seconds(call: Any, times: int) -> float:
        best = []
        for _ in range(5):
            began = time.perf_counter()
            for _ in range(times):
                call()
            best.append((time.perf_counter() - began) / times)
        return min(best)

    with torch.inference_mode():
        step = seconds(lambda: probe(model, 2), 3)
        look = seconds(lambda: bool(torch.isfinite(state).all()), 1000)
    figure(f"13: to look for NaN takes {100 * look / step:.3f} % of a step of `embedded`")
    assert look < 0.01 * step


def short_of_memory(patch: pytest.MonkeyPatch) -> list[int]:
    """Make room for two rows of small pictures only; the list returned grows at each failure."""
    ran_out: list[int] = []

    def step(model: Model, jobs: list[Job]) -> None:
        if sum(job.conditioning.evaluations for job in jobs) > 2 or jobs[0].state.shape[-1] > 16:
            ran_out.append(len(jobs))
            raise RuntimeError(NO_MEMORY)
        advance(model, jobs)

    patch.setattr(core, "advance", step)
    return ran_out


def test_out_of_memory_fails_one_job_alone(server: Inside, monkeypatch: pytest.MonkeyPatch) -> None:
    ran_out = short_of_memory(monkeypatch)
    times, good = size(5, 100), 0
    for i in range(times):
        assert server.worker is not None
        loaded(server).engine.capacity.set(8)  # as if it had not learned
        settings = {"prompt": "a cat", "steps": 1, "sampler": "euler", "seed": i, **SMALL}
        large = server.submit(**settings | {"width": 512})
        together = server.submit(**settings, count=4)
        failed = server.finished(large)
        assert failed["status"] == "failed"
        assert failed["error"] == "out of memory: ask for a smaller picture"
        assert server.finished(together)["status"] == "succeeded"
        good += server.finished(server.submit(**settings))["status"] == "succeeded"
    assert good == times
    assert any(rows > 1 for rows in ran_out)
    figure(f"8: {good} of {times} small jobs good after one that ran out of memory")


@pytest.mark.parametrize("part", ["encode", "decode"])
def test_out_of_memory_in_the_autoencoder(
    server: Inside, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    model = model_of(server)
    real = getattr(model.vae, part)

    def autoencoder(x: Any) -> Any:
        if x.shape[-1] in (8, 128):
            raise RuntimeError(NO_MEMORY)
        return real(x)

    monkeypatch.setattr(model.vae, part, autoencoder)
    settings = {"prompt": "a cat", "steps": 2, "sampler": "euler"}
    large = server.finished(server.submit(**settings, width=128, height=128, image=png(128)))
    assert large["error"] == "out of memory: ask for a smaller picture"
    assert server.finished(server.submit(**settings, image=png(64)))["status"] == "succeeded"


def png(side: int) -> str:
    out = io.BytesIO()
    Image.new("RGB", (side, side), "red").save(out, "PNG")
    return base64.b64encode(out.getvalue()).decode()


def test_nothing_was_left_of_all_that(server: Inside) -> None:
    rows = {p["id"] for j in server.ask("GET", "/api/jobs?limit=200").json() for p in j["pictures"]}
    names = {path.name for path in Path(server.data / "pictures").iterdir()}
    assert {f"{row}.png" for row in rows} <= names
    assert not [name for name in names if name.endswith(".part")]


def test_cancelled_while_it_is_committed_and_retried(
    server: Inside, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its input pictures are kept, and the new attempt draws all of it."""
    real, seen = Worker._commit, list[str]()

    def commit(worker: Worker, held: Any, *given: Any) -> None:
        if held.claim.id not in seen:
            seen.append(held.claim.id)
            assert worker._store.cancel(held.claim.id) is not None
            assert worker._store.retry(held.claim.id, 1000) is not None
            worker._cancelled.add(held.claim.id)
        real(worker, held, *given)

    monkeypatch.setattr(Worker, "_commit", commit)
    start = io.BytesIO()
    Image.effect_noise((64, 64), 60).convert("RGB").save(start, "PNG")
    job = server.submit(
        prompt="", image=base64.b64encode(start.getvalue()).decode(), steps=2, strength=1.0
    )
    # It is cancelled for a moment, but that is not its end.
    wait_for(lambda: server.job(job)["status"] in ("succeeded", "failed"), seconds=60)
    ended = server.job(job)
    assert (ended["status"], ended["error"], len(ended["pictures"])) == ("succeeded", None, 1)
    assert seen == [job]
