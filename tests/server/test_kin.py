"""Variants of what an attack found: other places with the same faults; see docs/decisions/0109."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import logging
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from fake import encoded as as_base64
from inside import Inside
from PIL import Image, PngImagePlugin
from pydantic import BaseModel
from test_guard import ask
from typer.testing import CliRunner

from safelight.adapters.asked import asked_of
from safelight.cli import app as command_line
from safelight.errors import SafelightError
from safelight.pixels import picture_sha256
from safelight.prompt.styles import Style, apply_styles
from safelight.request import Request
from safelight.request_pictures import MAX_REFERENCES
from safelight.server import connections, entrance, limits, logs
from safelight.server.events import Events
from safelight.server.guard import Guard, Rules
from safelight.server.jobs import Job, ModelInfo, Progress, Status
from safelight.server.listening import listen
from safelight.server.station import _on_signal
from safelight.server.store import MAX_LISTED
from safelight.server.turns import Turns
from safelight.studio import easel, mount
from safelight.studio.suits import Suits
from safelight.weights.library import Library

SECRET = "the prompt of a person"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Inside]:
    with Inside(tmp_path_factory.mktemp("kin"), draws=False) as running:
        running.hub.catalogue.info = ModelInfo(
            name="embedded", sha256="0" * 64, width=64, height=64
        )
        running.hub.catalogue.arrived.set()
        yield running


# --- row 2: what lets anyone in -------------------------------------------------------------------


@pytest.mark.parametrize("host", ["", "0", "0.0.0.0", "::", "::ffff:0.0.0.0", "*", "127.0.0.1.x"])
def test_no_host_beyond_loopback_without_a_token(host: str) -> None:
    with pytest.raises(SafelightError, match="token"):
        listen(host, 0, None)


@pytest.mark.parametrize("host", ["b\xfccher..de", "\udcff", "a\0b"])
def test_a_host_that_no_name_can_be_is_one_line(host: str) -> None:
    with pytest.raises(SafelightError, match=r"cannot be listened on .* another --host"):
        listen(host, 0, "a token")


def test_on_windows_a_port_is_not_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """SO_REUSEADDR there lets two servers listen on one port."""
    for name, shared in (("posix", True), ("nt", False)):
        monkeypatch.setattr("safelight.server.listening.os", SimpleNamespace(name=name))
        with listen("127.0.0.1", 0, None) as listening:
            found = listening.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR)
            assert bool(found) == shared


def test_on_windows_a_signal_ends_a_worker() -> None:
    """Windows' event loops take no handlers of signals."""
    called: list[bool] = []

    class Loop(asyncio.SelectorEventLoop):
        def add_signal_handler(self, *_: Any) -> None:
            raise NotImplementedError

    async def told() -> None:
        _on_signal(asyncio.get_running_loop(), signal.SIGTERM, lambda: called.append(True))
        signal.raise_signal(signal.SIGTERM)
        await asyncio.sleep(0)

    before = signal.getsignal(signal.SIGTERM)
    try:
        with asyncio.Runner(loop_factory=Loop) as runner:
            runner.run(told())
    finally:
        signal.signal(signal.SIGTERM, before)
    assert called == [True]


def test_a_trusted_proxy_needs_a_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SAFELIGHT_TOKEN", raising=False)
    given = ["serve", "--data-dir", str(tmp_path), "--trust-proxy", "127.0.0.1"]
    done = CliRunner().invoke(command_line, given)
    assert "--trust-proxy lets other machines in: add --token auto" in str(done.exception)


def test_the_address_that_is_printed_leads_on(
    server: Inside, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = mount.Studio(server.app, server.hub, cast(Any, None))
    for installed, wanted in ((True, "/studio"), (False, "/docs")):
        monkeypatch.setattr(mount, "available", lambda found=installed: found)
        for method in ("GET", "HEAD"):
            code, headers, _ = ask(
                Rules(), {"host": "localhost"}, path="/", method=method, app=page
            )
            assert (code, headers["location"]) == (307, wanted)


def test_an_allowed_origin_reaches_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}
    monkeypatch.delenv("SAFELIGHT_TOKEN", raising=False)
    monkeypatch.setattr("safelight.cli.serve.start", lambda *_, **how: given.update(how))
    for does in ("private.keep", "listen", "hold"):
        monkeypatch.setattr(f"safelight.cli.serve.{does}", lambda *_: None)
    pages = ["--allow-origin", "http://localhost:3000", "--allow-origin", "null"]
    done = CliRunner().invoke(command_line, ["serve", "--data-dir", str(tmp_path), *pages])
    assert given["origins"] == {"http://localhost:3000", "null"}
    assert "every page of that origin may use this server" in done.stderr


# --- row 34: other ways to try tokens -------------------------------------------------------------


def _basic(guess: str) -> dict[str, str]:
    return {"authorization": "Basic " + base64.b64encode(f"me:{guess}".encode()).decode()}


WAYS: dict[str, Any] = {
    "bearer": lambda g: ({"authorization": f"Bearer {g}"}, {}),
    "basic": lambda g: (_basic(g), {}),
    "cookie": lambda g: ({"cookie": f"safelight={entrance.cookie_of(g)}"}, {}),
    "two cookies": lambda g: ({"cookie": f"safelight=x; safelight={entrance.cookie_of(g)}"}, {}),
    "link": lambda g: ({}, {"path": "/studio", "query": f"token={g}".encode()}),
    "form": lambda g: (
        {},
        {"path": "/studio/enter", "method": "POST", "body": [b"token=" + g.encode()]},
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_wrong_tokens_are_slowed_whichever_way_they_come(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    monkeypatch.setattr(limits.asyncio, "sleep", sleep)
    guard = Guard(None, Rules("the token"))
    # One guard, as a server has: `ask` makes one for each request.
    monkeypatch.setattr("test_guard.Guard", lambda *_: guard)
    codes = []
    for number in range(limits.FREE_GUESSES + 3):
        headers, how = WAYS[way](f"guess{number}")
        codes.append(ask(Rules("x"), {"host": "localhost", **headers}, **how)[0])
    assert set(codes) == {401}
    assert len(slept) == 3
    headers, how = WAYS[way]("the token")
    guard.app = _ok
    assert ask(Rules("x"), {"host": "localhost", **headers}, **how)[0] in (200, 303)


async def _ok(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b""})


# --- rows 4 and 5: one client's work holds up no other's ------------------------------------------


def test_turns_are_shared_by_clients() -> None:
    async def run() -> list[str]:
        turns, order = Turns(2), list[str]()

        async def work(client: str) -> None:
            async with turns.turn(client):
                order.append(client)
                await asyncio.sleep(0)

        await asyncio.gather(*(work("hostile") for _ in range(20)), work("a"), work("b"))
        assert not turns._running
        return order

    order = asyncio.run(run())
    assert order.index("a") < 3
    assert order.index("b") < 4
    assert len(order) == 22


@pytest.mark.parametrize("what", ["upload", "enlarge", "thumbnail"])
def test_pictures_of_one_client_keep_a_place_for_others(server: Inside, what: str) -> None:
    """While one client has all the turns that it may have, another client still gets one."""

    async def run() -> Any:
        turns = server.app.app.state.decoders.handling
        job = await _submit(server)
        held = [turns.turn("@10.0.0.1") for _ in range(turns.count - 1)]
        for one in held:
            await one.__aenter__()
        queued = asyncio.ensure_future(turns.take("@10.0.0.1"))
        await asyncio.sleep(0)
        try:
            if what == "upload":
                body = {"prompt": "", "image": as_base64(Image.new("RGB", (64, 64)))}
                return (await server.asked("POST", "/api/jobs", body)).status
            path = f"/api/pictures/{job}" + (
                "/thumbnail" if what == "thumbnail" else "?width=64&height=64"
            )
            return (await server.asked("GET", path)).status
        finally:
            queued.cancel()
            for one in held:
                await one.__aexit__(None, None, None)

    assert server.within(run()) in (200, 202)


async def _submit(server: Inside, **settings: Any) -> str:
    from safelight.recipe import png_texts
    from safelight.server.jobs import Picture

    job = await server.hub.submit(Request(prompt="x", **settings), owner="at:local")
    claim = server.hub.store.claim("w", alone=True)
    while claim is not None and claim.id != job.id:
        server.hub.store.finish(claim.id, claim.token, warnings=[])
        claim = server.hub.store.claim("w", alone=True)
    assert claim is not None
    recipe = {"safelight": "1", "model": {"name": "m", "sha256": "0" * 64}}
    recipe |= {"settings": {**claim.settings, "steps": 1}, "size": [8, 8]}
    for index in range(claim.settings["count"]):
        picture = Picture(
            id=claim.picture_id(index), index=index, seed=0, width=8, height=8, recipe=recipe
        )
        if index == 0:
            server.hub.files.keep(Image.new("RGB", (8, 8)), picture.id, png_texts(recipe))
        server.hub.store.add_picture(claim.id, claim.token, picture)
    server.hub.store.finish(claim.id, claim.token, warnings=[])
    return claim.picture_id(0)


def test_a_list_of_long_prompts_comes_in_parts(
    server: Inside, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One job of 64 pictures takes 2 MiB: 200 of them would hold up everyone."""
    for _ in range(3):
        server.within(_submit(server, negative_prompt="n" * 16_000, count=60, steps=1))
    total = server.hub.store.counts()["succeeded"]
    path, seen, largest = "/api/jobs?limit=200", list[str](), 0
    for _ in range(20):
        answer = server.ask("GET", path)
        largest = max(largest, len(answer.body))
        seen += [job["id"] for job in answer.json()]
        if "link" not in answer.headers:
            break
        assert answer.headers["link"].endswith('; rel="next"')
        path = answer.headers["link"].split(">")[0][1:]
    assert len(seen) == len(set(seen)) == total
    assert largest < MAX_LISTED + (2 << 20)


@pytest.mark.parametrize("status", [Status.QUEUED, Status.RUNNING, Status.SUCCEEDED])
def test_only_a_job_that_is_drawn_has_a_worker_s_progress(status: Status) -> None:
    """Progress that is reported after a job's end has no effect."""
    events = Events(lambda *_: None, lambda _: None)
    told = {"id": "a", "client": "api", "created_at": datetime.now(UTC), "settings": {}}
    job = Job.model_validate({**told, "status": status})
    events.publish("progress", "a", [7, 20])
    shown = events.with_progress(job).progress
    assert shown == (Progress(step=7, steps=20) if status == Status.RUNNING else job.progress)
    assert bool(events._progress) is not status.final


def test_events_bring_no_recipes_but_of_their_picture(server: Inside) -> None:
    from safelight.server.apis.ours import _brief
    from safelight.server.jobs import Event

    server.within(_submit(server, count=3))
    job = server.within(server.hub.list(limit=1))[0][0]
    for kind in ("progress", "preview", "picture"):
        told = _brief(Event(kind=kind, job=job, index=1))
        full = [bool(picture.recipe) for picture in told.job.pictures]
        assert full == [False, kind == "picture", False]
    assert all(picture.recipe for picture in job.pictures)
    assert _brief(Event(kind="end", job=job)).job is job


def test_an_editor_has_few_layers() -> None:
    """Each layer is decoded, and one uploaded file may be named thousands of times."""
    layers = [SimpleNamespace(path="x")] * (easel.MAX_LAYERS + 1)
    picture = SimpleNamespace(background=SimpleNamespace(path="x"), layers=layers)
    suits = Suits(controlnets=("edges",), ip_adapter="face")
    for place, named in enumerate(
        ("the picture", "the control image", "the picture of the prompt")
    ):
        values = [None, None, 1, None, 1, None, 1]
        values[1 + 2 * place] = picture
        with pytest.raises(SafelightError, match=f"{named} must have at most .* layers"):
            asyncio.run(easel.read_easels(values, cast(Any, None), "", suits))
    shown = [SimpleNamespace(image=SimpleNamespace(path="x"))] * (MAX_REFERENCES + 1)
    values = [SimpleNamespace(root=shown), None, 1, None, 1, None, 1]
    with pytest.raises(SafelightError, match="of pictures to edit there may be 10, not 11"):
        asyncio.run(easel.read_easels(values, cast(Any, None), "", suits))


def test_cells_of_a_grid_share_their_picture() -> None:
    first = Request(prompt="", image=Image.new("RGB", (64, 64)), mask=Image.new("L", (64, 64)))
    other = first.replace(steps=3)
    assert (other.image, other.mask, other.steps) == (first.image, first.mask, 3)
    assert other.image is first.image
    smaller = Image.new("RGB", (32, 32))
    with pytest.raises(SafelightError, match="mask must have the picture's size"):
        first.replace(image=smaller)
    with pytest.raises(SafelightError, match="unconditional"):
        first.replace(prompt="", unconditional=True)
    assert first.replace(image=smaller, mask=None).mask is None
    assert first.without_pictures().image is None


# --- row 14: other words that quote a prompt ------------------------------------------------------


class _Body(BaseModel):
    prompt: int


def _key() -> None:
    {}[SECRET]


def _validation() -> None:
    _Body.model_validate({"prompt": SECRET})


def _cause() -> None:
    try:
        raise ValueError(SECRET)
    except ValueError as error:
        raise RuntimeError("another") from error


def _context() -> None:
    try:
        raise ValueError(SECRET)
    except ValueError:
        raise RuntimeError("another")  # noqa: B904


def _group() -> None:
    raise ExceptionGroup(SECRET, [ValueError(SECRET), OSError(5, "Input/output error", SECRET)])


def _unicode() -> None:
    (SECRET + "\ud800").encode()


def _note() -> None:
    error = ValueError("another")
    error.add_note(SECRET)
    raise error


FAILURES = [_key, _validation, _cause, _context, _group, _unicode, _note]


def logged(caught: pytest.LogCaptureFixture) -> str:
    return "\n".join(logs.Lines().format(record) for record in caught.records)


@pytest.mark.parametrize("fails", FAILURES)
@pytest.mark.parametrize("way", ["a route", "a task", "a thread", "an event of the page", "no one"])
def test_no_exception_brings_a_prompt_to_the_log(
    fails: Any, way: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    monkeypatch.setattr("sys.unraisablehook", lambda _: None)
    logs.log_all_exceptions()
    if way == "a thread":
        thread = threading.Thread(target=fails)
        thread.start()
        thread.join()
    elif way == "a task":

        async def run() -> None:
            loop = asyncio.get_running_loop()
            loop.set_exception_handler(connections.on_exception)
            loop.call_soon(fails)
            await asyncio.sleep(0)

        asyncio.run(run())
    else:
        try:
            fails()
        except Exception as error:
            if way == "an event of the page":
                mount._Logged().print_exc()
            elif way == "a route":
                logging.getLogger("uvicorn.error").exception("Exception in ASGI application")
            else:
                hook: Any = sys.unraisablehook
                hook(SimpleNamespace(exc_value=error))
    told = logged(caplog)
    assert SECRET not in told
    assert fails.__name__ in told  # the place where it was raised is shown
    assert "Error" in told or "ExceptionGroup" in told


def test_an_error_of_the_system_keeps_its_words() -> None:
    with pytest.raises(FileNotFoundError) as raised:
        Path("/nowhere/at/all").read_bytes()
    assert "FileNotFoundError: No such file or directory" in logs.without_words(raised.value)


# --- rows 30 to 33: other values, other echoes ----------------------------------------------------

JOB, HALF = "0" * 32, "\ud800"
QUERIES = [
    *(f"/api/jobs?before={b}" for b in ("9999-12-31T23:59:59", "0001-01-01T00:00:00%2B23:59")),
    *(f"/api/jobs?before={b}" for b in ("1e308", "-1e308", "nan", "9" * 400, "-99999999999", "")),
    *("/api/jobs?before=9999-12-31T23:59:59-23:59", "/api/jobs?before=2026-02-30T00:00:00"),
    *(f"/api/jobs?limit={n}" for n in ("0", "-1", "201", "9" * 400, "1e3", "nan", "")),
    *("/api/jobs?status=", "/api/jobs?status=%00", "/api/jobs?status=" + "x" * 10_000),
    *("/api/jobs?search=%00", "/api/jobs?search=%ED%A0%80", "/api/jobs?search=%25_%5C"),
    *("/api/jobs?search=" + "x" * 201, "/api/jobs?search=a&search=b"),
    *(f"/api/pictures/{JOB}?width={n}&height={n}" for n in ("0", "9" * 400, "nan", "-64")),
    *(f"/sdapi/v1/progress?skip_current_image={n}" for n in ("2", "%00", "x" * 10_000)),
    *(f"/api/jobs/{name}" for name in ("٠" * 32, "0" * 31, JOB + "%0A", "F" * 32)),
]


@pytest.mark.parametrize("path", QUERIES)
def test_odd_values_in_an_address_are_refused_or_fine(server: Inside, path: str) -> None:
    answer = server.ask("GET", path)
    assert answer.status in (200, 404, 422), answer
    assert answer.status == 200 or len(answer.body) < 2000


LONG = "k" * 250_000
ECHOES: dict[str, Any] = {
    "a name": {"prompt": "", LONG: 1},
    "half a pair in a name": {"prompt": "", HALF: 1},
    "half a pair in a value": {"prompt": "", "sampler": HALF, "sampler_name": HALF, "size": HALF},
    "half a pair in a prompt": {"prompt": HALF},
    "a value": {"prompt": "", "sampler": LONG, "sampler_name": LONG},
    "a list": {"prompt": [LONG]},
    "a value of another type": {"prompt": {LONG: LONG}},
    "a model": {"prompt": "", "model": LONG, "sampler_name": LONG, "steps": LONG},
    "a size": {"prompt": "", "size": LONG, "width": LONG},
    "a long number": {"prompt": "", "n": 10**4000, "count": 10**4000, "batch_size": 10**4000},
    "a product": {"prompt": "", "n": 10**4000, "batch_size": 10**4000, "n_iter": 10**4000},
    "a float": {"prompt": "", "n": 1e308, "steps": 1e308, "seed": 1e308},
    "a number beyond": {"prompt": "", "guidance_scale": 1e400, "cfg_scale": 1e400, "n": 1e400},
    "a scheduler": {"prompt": "", "scheduler": LONG, "schedule": LONG, "n": LONG},
    "a script": {"prompt": "", "script_name": LONG, "n": LONG},
    "a picture": {"prompt": "", "image": LONG, "init_images": [LONG], "mask": LONG},
    "a picture of half a pair": {"prompt": "", "image": HALF, "init_images": [HALF]},
}


@pytest.mark.parametrize("what", ECHOES)
@pytest.mark.parametrize(
    "path", ["/api/jobs", "/v1/images/generations", "/sdapi/v1/img2img", "/sdapi/v1/png-info"]
)
def test_answers_echo_little_and_can_always_be_written(
    server: Inside, path: str, what: str
) -> None:
    answer = server.ask("POST", path, ECHOES[what])
    assert 400 <= answer.status < 500, answer
    assert len(answer.body) < 4000
    json.loads(answer.body)


@pytest.mark.parametrize("value", ['"\\ud800"', '"\\udfff"', '"a\\u0000b"'])
def test_texts_of_a_stranger_s_picture_can_be_answered_with(server: Inside, value: str) -> None:
    texts = PngImagePlugin.PngInfo()
    texts.add_text("parameters", f"x\nSteps: 20, Model: {value}, Size: 1x1")
    out = io.BytesIO()
    Image.new("RGB", (16, 16)).save(out, "PNG", pnginfo=texts)
    body = {"image": base64.b64encode(out.getvalue()).decode()}
    answer = server.ask("POST", "/sdapi/v1/png-info", body)
    assert answer.status == 200
    assert answer.json()["parameters"]["Steps"] == "20"


def test_a_model_is_named_without_its_path(tmp_path: Path) -> None:
    folder = tmp_path / "secret place" / "a model"
    folder.mkdir(parents=True)
    with Inside(tmp_path / "data", draws=False, model=str(folder)) as server:
        for path in ("/api/models", "/v1/models", "/sdapi/v1/sd-models", "/sdapi/v1/options"):
            answer = server.ask("GET", path)
            assert b"a model" in answer.body
            assert b"secret place" not in answer.body
        server.within(server.hub.submit(Request(prompt=""), owner="at:local"))
        claim = server.hub.store.claim("w")
        assert claim is not None
        why = f"'{folder}/unet.safetensors' and '{server.data}/x' cannot be read {HALF}"
        server.hub.store.finish(claim.id, claim.token, warnings=[], error=why.replace(HALF, "?"))
        told = server.ask("GET", "/api/jobs").body
        assert b"secret place" not in told
        assert str(server.data).encode() not in told


# --- row 11: what a retry needs -------------------------------------------------------------------


@pytest.mark.parametrize("when", ["it waits", "it is drawn", "it failed"])
def test_a_retried_job_has_what_it_starts_from(server: Inside, when: str) -> None:
    start, mask = Image.effect_noise((64, 64), 60).convert("RGB"), Image.new("L", (64, 64), 255)
    request = Request(prompt="", image=start, mask=mask, count=2)
    job = server.within(server.hub.submit(request, owner="at:local"))
    store = server.hub.store
    if when != "it waits":
        claim = store.claim("w", alone=True)
        while claim is not None and claim.id != job.id:
            store.finish(claim.id, claim.token, warnings=[])
            claim = store.claim("w", alone=True)
        assert claim is not None
        if when == "it failed":
            store.finish(claim.id, claim.token, warnings=[], error="it had to")
    if when != "it failed":
        assert server.ask("DELETE", f"/api/jobs/{job.id}").json()["status"] == "cancelled"
    assert server.ask("POST", f"/api/jobs/{job.id}/retry").status == 202
    claim = store.claim("w", alone=True)
    assert claim is not None
    assert claim.id == job.id
    found = (server.hub.files.input(job.id, name) for name in ("image", "mask"))
    again = Request.from_dict(claim.settings, **dict(zip(("image", "mask"), found, strict=True)))
    assert again.image is not None
    assert again.image.tobytes() == start.tobytes()
    store.finish(claim.id, claim.token, warnings=[])


def test_no_more_is_kept_than_is_drawn_from(server: Inside) -> None:
    """The worker reads inputs again: at full size they would take its memory as well."""
    start = Image.effect_noise((300, 200), 60).convert("RGB")
    body = {"image": as_base64(start), "mask": as_base64(start), "width": 96, "height": 64}
    job = server.ask("POST", "/api/jobs", body).json()
    kept = server.hub.files.input(job["id"], "image")
    assert kept is not None
    assert kept.tobytes() == start.resize((96, 64), Image.Resampling.LANCZOS).tobytes()
    mask = server.hub.files.input(job["id"], "mask")
    assert mask is not None
    assert (mask.mode, mask.size) == ("L", (96, 64))
    assert job["settings"]["image_sha256"] == picture_sha256(start)
    refused = server.ask("POST", "/api/jobs", {"image": as_base64(start.crop((0, 0, 40, 80)))})
    assert (refused.status, refused.json()["field"]) == (422, "image")


# --- names that requests bring --------------------------------------------------------------------


def test_styles_around_styles_stay_short() -> None:
    double = {"double": Style("{prompt} {prompt}", "")}
    assert apply_styles(double, ["double"] * 3, "a", "")[0] == " ".join("a" * 8)
    with pytest.raises(SafelightError, match="16 KiB with style 'double'"):
        apply_styles(double, ["double"] * 60, "a", "")
    with pytest.raises(SafelightError) as refused:
        apply_styles(double, ["d" * 16_000], "a", "")
    assert len(str(refused.value)) < 300


def test_a_prompt_names_few_loras() -> None:
    """Each LoRA is looked up in the models folder, and applied."""
    tags = "".join(f"<lora:a:0.{n}>" for n in range(1, 65))
    request = Request(prompt=tags, prompt_syntax="a1111")
    assert len(asked_of(request)[0]) == 64
    with pytest.raises(SafelightError, match="loras must be at most 64"):
        asked_of(request.replace(prompt="<lora:a>" * 1800))
    with pytest.raises(SafelightError, match="loras must be at most 64"):
        asked_of(request.replace(loras=("ink",)))


@pytest.mark.parametrize(
    "name",
    ["../secret", "..\\secret", "/etc/passwd", "a/../../secret", "secret.txt", "~", "\x00", "."],
)
def test_no_name_leads_out_of_the_models_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "secret.safetensors").write_bytes(b"x")
    (tmp_path / "models" / "Lora").mkdir(parents=True)
    (tmp_path / "models" / "Lora" / "ink.safetensors").write_bytes(b"x")
    library = Library(tmp_path / "models")
    for kind in ("lora", "embedding", "vae", "model"):
        assert library.matches(name, kind) == []
        with pytest.raises(SafelightError) as refused:
            library.find(name, kind)
        assert str(tmp_path) not in str(refused.value)
    assert library.find("ink", "lora").name == "ink"
