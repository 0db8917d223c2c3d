"""A model states its best settings, and every interface starts with them."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import sqlite3
import threading
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from inside import Inside
from PIL import Image
from serving import wait_for

import safelight
from safelight import cli
from safelight.cli.tools import verify
from safelight.compare import Axis, grid, requests
from safelight.defaults import is_distilled, with_level
from safelight.engine.requests import resolve_request
from safelight.errors import SafelightError
from safelight.families import SD
from safelight.families.control import CONTROL, IP_ADAPTER
from safelight.hires import HIRES
from safelight.picture import open_picture
from safelight.recipe import read_recipe
from safelight.region import INPAINTING
from safelight.request import Request
from safelight.server import catalogue
from safelight.server.apis.sdapi_shapes import TextToImage, understand
from safelight.server.costs import steps_of
from safelight.settings import settings_of
from safelight.weights.find import find
from safelight.weights.plan import read_plan


def test_a_server_fills_in_what_a_model_draws_best_with(tmp_path: Path) -> None:
    """A model without such settings gets only the usual defaults."""
    model = tmp_path / "model"
    shutil.copytree(Path(safelight.__file__).parent / "models" / "embedded", model)
    wanted = {"sampler": "ddim", "steps": 4, "guidance_scale": 1.0}
    for said, found in ((wanted, wanted), (None, {"sampler": "pndm", "steps": None})):
        (model / "safelight.json").write_text(json.dumps({"draw_with": said}))
        with Inside(tmp_path / "data", draws=False, model=str(model)) as server:
            job = server.ask("POST", "/api/jobs", {"prompt": "a cat"}).json()
            assert job["settings"].items() >= found.items()
            asked = {"prompt": "a cat", "steps": 8, "sampler": "euler"}
            job = server.ask("POST", "/api/jobs", asked).json()
            assert job["settings"].items() >= asked.items()
            # ddim has no karras, and nor has pndm.
            refused = server.ask("POST", "/api/jobs", {"prompt": "a cat", "schedule": "karras"})
            assert refused.status == 422
            assert "has no schedule karras" in refused.json()["detail"]


def plan_with(best: dict[str, Any]) -> Any:
    """Return a model's plan, as far as its defaults are concerned."""
    return SimpleNamespace(family=SD, notes={"draw_with": best})


def test_automatic1111s_clients_too() -> None:
    wanted = {"sampler": "ddim", "steps": 4, "guidance_scale": 1.0}
    said = {"sampler_name": "Euler a", "steps": 9, "cfg_scale": 3}
    for taught, body, found in (
        (wanted, {}, ("ddim", 4, 1.0)),
        (wanted, {"sampler_name": ""}, ("ddim", 4, 1.0)),
        (wanted, said, ("euler_a", 9, 3.0)),
        ({}, {}, ("euler", 50, 7.0)),
    ):
        asked = understand(TextToImage(**body), plan_with(taught)).request
        assert (asked.sampler, asked.steps, asked.guidance_scale) == found


@pytest.mark.parametrize(
    ("body", "left_out", "schedule"),
    [
        ({"fast": 1}, set(), None),
        ({"fast": 1, "scheduler": "Karras"}, set(), "karras"),
        ({"fast": 2}, {"sampler", "steps"}, None),
        ({"fast": 2, "scheduler": "Karras"}, {"sampler", "steps"}, "karras"),
        ({"fast": 2, "sampler_name": "DDIM", "steps": 9}, set(), None),
    ],
)
def test_automatic1111s_clients_leave_out_what_a_level_has_itself(
    body: dict[str, Any], left_out: set[str], schedule: str | None
) -> None:
    asked = understand(TextToImage.model_validate(body), plan_with({})).request
    assert {"sampler", "steps", "guidance_scale"} - asked.model_fields_set == left_out
    assert asked.schedule == schedule
    if "sampler" in left_out:  # the schedule is for the level's sampler, not for the model's
        own = plan_with({"sampler": "ddim", "steps": 4, "guidance_scale": 1.0})
        assert understand(TextToImage.model_validate(body), own).request.schedule == schedule


@pytest.mark.parametrize("model", ["embedded-fast", "embedded-unconditional"])
def test_automatic1111s_clients_get_no_sampler_of_a_level_that_the_model_leaves_out(
    model: str,
) -> None:
    body = {"fast": 2, "scheduler": "Karras", "eta": 0.5}
    asked = understand(TextToImage.model_validate(body), read_plan(find(model)))
    assert (asked.request.sampler, asked.request.schedule, asked.request.eta) == ("ddim", None, 0.5)
    assert asked.warnings == ["scheduler: DDIM has no karras; the model's is used"]


@pytest.mark.parametrize("fast", [[1], {"a": 1}, "2", 2.5])
def test_what_is_no_level_is_told(fast: Any) -> None:
    with pytest.raises(SafelightError, match="fast must be a whole number from 0 to 3"):
        understand(TextToImage.model_validate({"fast": fast}), plan_with({}))


def test_automatic1111s_clients_leave_a_model_that_is_elsewhere_to_its_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for body, said in (
        ({}, set[str]()),
        ({"fast": 2, "scheduler": "Automatic"}, set[str]()),
        ({"sampler_name": "DPM++ 2M", "cfg_scale": 3}, {"sampler", "guidance_scale"}),
        ({"steps": 9}, {"steps"}),
    ):
        asked = understand(TextToImage.model_validate(body), None)
        assert {"sampler", "steps", "guidance_scale"} & asked.request.model_fields_set == said
        assert (asked.request.schedule, asked.warnings) == (None, [])
    asked = understand(TextToImage(scheduler="Karras"), None)
    assert asked.request.schedule is None
    assert "needs a sampler_name" in asked.warnings[0]
    named = TextToImage(sampler_name="DPM++ 2M", scheduler="Karras")
    assert understand(named, None).request.schedule == "karras"

    def plan(*_: Any) -> None:
        raise SafelightError("no model of that name is here")

    stored: dict[str, Any] = {}

    async def submit(request: Request, **how: Any) -> None:
        stored.update(request.model_dump(exclude_unset=True))
        raise SafelightError("enough")

    with Inside(tmp_path / "data", draws=False) as server:
        known = server.hub.catalogue
        name = known.info.name
        known.on_message("loaded", [name, {"name": name, "width": 256, "height": 256}])
        known.arrived.set()
        monkeypatch.setattr(server.hub.names, "plan", plan)
        monkeypatch.setattr(server.hub, "submit", submit)
        server.ask("POST", "/sdapi/v1/txt2img", {"prompt": "a cat"})
    assert stored["prompt"] == "a cat"
    assert not {"sampler", "steps", "guidance_scale"} & stored.keys()


def test_while_no_worker_has_joined_nothing_waits_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def plan(*_: Any) -> None:
        """The model is not on this machine."""

    told = "no worker has joined yet: try again once one has"
    monkeypatch.setattr(catalogue, "UNKNOWN", 0.05)
    with Inside(tmp_path / "data", draws=False) as server:
        monkeypatch.setattr(server.hub, "plan", plan)
        monkeypatch.setattr(server.hub.catalogue, "_own_worker", False)
        monkeypatch.setattr(server.hub.keys, "limits", lambda _: ["pixel_steps"])
        for path, body, found in (
            ("/sdapi/v1/txt2img", {}, lambda body: body["detail"]),
            ("/v1/images/generations", {"size": "256x256"}, lambda body: body["error"]["message"]),
            ("/api/jobs", {}, lambda body: body["detail"]),
        ):
            answer = server.ask("POST", path, {"prompt": "a cat", **body})
            assert (answer.status, found(answer.json())) == (503, told)


@pytest.mark.parametrize(
    ("path", "more"), [("/sdapi/v1/txt2img", {}), ("/v1/images/generations", {"size": "256x256"})]
)
def test_a_call_is_queued_before_any_worker_has_joined(
    tmp_path: Path, path: str, more: dict[str, Any]
) -> None:
    """A job that is cancelled then answers the web UI's clients without pictures."""
    with Inside(tmp_path / "data", draws=False) as server:
        body = {"prompt": "a cat", **more}
        answers: list[Any] = []
        asking = threading.Thread(
            target=lambda: answers.append(server.ask("POST", path, body)), daemon=True
        )
        asking.start()
        wait_for(lambda: len(server.ask("GET", "/api/jobs").json()) == 1)
        assert not server.hub.catalogue.arrived.is_set()
        (job,) = server.ask("GET", "/api/jobs").json()
        server.ask("DELETE", f"/api/jobs/{job['id']}")
        asking.join(20)
        (answer,) = answers
        if path.startswith("/sdapi"):
            assert (answer.status, answer.json()["images"]) == (200, [])
        else:
            assert answer.json()["error"]["message"] == "the job was cancelled"


BEST = {"sampler": "dpmpp_2m", "steps": 3, "guidance_scale": 4.0, "guidance_start": 0.5}


def model_that_says(folder: Path, **notes: Any) -> str:
    """A copy of the embedded model with other notes."""
    model = folder / "model"
    shutil.copytree(Path(safelight.__file__).parent / "models" / "embedded", model)
    (model / "safelight.json").write_text(json.dumps(notes))
    return str(model)


def test_python_and_the_command_line_begin_there_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = model_that_says(tmp_path, draw_with=BEST)
    model = safelight.load(name, dtype="float32")
    made = model.generate("a cat", seed=1)
    assert made.settings.items() >= BEST.items()
    # Requested settings win, without a warning: the model only prefers its own.
    other = model.generate("a cat", seed=1, steps=2, guidance_scale=1.0)
    assert (other.settings["steps"], other.settings["sampler"]) == (2, "dpmpp_2m")
    guided = model.generate("a cat", seed=1, guidance_start=0)
    assert guided.images[0].tobytes() != made.images[0].tobytes()
    # Where guidance ends is asked for with where it begins: a default would lie after it.
    assert model.generate("a cat", seed=1, guidance_end=0.2).settings["guidance_start"] == 0
    assert made.warnings == other.warnings == []
    out = str(tmp_path / "a.png")
    command = ["generate", "a cat", "-s", "1", "-m", name, "--dtype", "float32", "-o", out]
    assert cli.run(command) == 0
    assert capsys.readouterr().err == ""
    assert open_picture(out).tobytes() == made.images[0].tobytes()


def test_openai_s_route_begins_there_too(tmp_path: Path) -> None:
    name = model_that_says(tmp_path, draw_with=BEST)
    with Inside(tmp_path / "data", model=name, dtype="float32", exact=True) as server:
        answer = server.ask("POST", "/v1/images/generations", {"prompt": "a cat", "seed": 1})
        drawn = base64.b64decode(answer.json()["data"][0]["b64_json"])
        assert read_recipe(drawn)["settings"].items() >= BEST.items()


FAST = {"cache_every": 3, "guidance_start": 0.3, "sampler": "dpmpp_2m", "steps": 10}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/api/jobs", {}),
        ("/v1/images/generations", {}),
        ("/sdapi/v1/txt2img", {"cfg_scale": 4.0, "prompt_syntax": "plain"}),
    ],
)
def test_a_level_of_the_fast_mode_is_taken_by_a_server_too(
    tmp_path: Path, path: str, body: dict[str, Any]
) -> None:
    wish = {"prompt": "a cat", "seed": 1, "fast": 3}
    with Inside(tmp_path / "data", dtype="float32", exact=True) as server:
        answer = server.ask("POST", path, wish | body).json()
        if path == "/api/jobs":
            assert answer["settings"].items() >= FAST.items()
            server.finished(answer["id"])
            drawn = server.picture(answer["id"])
        elif "data" in answer:
            drawn = base64.b64decode(answer["data"][0]["b64_json"])
        else:
            drawn = base64.b64decode(answer["images"][0])
        slower = server.ask("POST", "/api/jobs", wish | {"steps": 12, "cache_every": 2}).json()
        assert slower["settings"].items() >= {**FAST, "steps": 12, "cache_every": 2}.items()
    settings = read_recipe(drawn)["settings"]
    assert settings.items() >= FAST.items()
    alone = safelight.load(dtype="float32").generate(**wish)
    assert settings == alone.settings
    assert open_picture(drawn).tobytes() == alone.images[0].tobytes()
    assert not alone.warnings


def test_a_distilled_model_keeps_its_steps_at_each_level(tmp_path: Path) -> None:
    with Inside(tmp_path / "data", draws=False, model="embedded-fast") as server:
        job = server.ask("POST", "/api/jobs", {"prompt": "a cat", "fast": 2}).json()
    assert job["settings"].items() >= {"steps": 4, "sampler": "ddim", "cache_every": 2}.items()


@pytest.mark.parametrize(("guided", "wanted"), [(256, ("lcm", 4)), (None, ("dpmpp_2m", 12))])
def test_so_does_a_latent_consistency_model(guided: int | None, wanted: tuple[str, int]) -> None:
    unet = SimpleNamespace(
        block_out_channels=(320,), cross_attention_dim=768, in_channels=4, time_cond_proj_dim=guided
    )
    family = SD.variant({"unet": unet}, {}, {})
    request = with_level(Request(prompt="a cat", fast=2), family, {}).with_defaults(family.defaults)
    assert (request.sampler, request.steps, request.cache_every) == (*wanted, 2)


def test_a_family_s_own_are_filled_in(tmp_path: Path) -> None:
    sdxl = pytest.importorskip("tests.parity.sdxl_models")
    folder = sdxl.make_folder(tmp_path / "model", sdxl.UNET)
    with Inside(tmp_path / "data", draws=False, model=str(folder)) as server:
        job = server.ask("POST", "/api/jobs", {"prompt": "a cat"}).json()
    wanted = {"sampler": "euler", "steps": 50, "guidance_scale": 5.0}
    assert job["settings"].items() >= wanted.items()


def test_those_of_a_model_that_is_elsewhere_are_left_to_whoever_draws_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def plan(*_: Any) -> None:
        raise SafelightError("no model of that name is here")

    with Inside(tmp_path / "data", draws=False) as server:
        monkeypatch.setattr(server.hub.names, "plan", plan)
        body = {"prompt": "a cat", "steps": 9, "fast": 1, "schedule": "karras"}
        job = server.ask("POST", "/api/jobs", body).json()
        refused = server.ask("POST", "/api/jobs", body | {"sampler": "ddim"})
    assert refused.json()["detail"].startswith("ddim has no schedule karras")
    asked = Request.from_dict(job["settings"])
    assert (asked.steps, asked.schedule) == (9, "karras")
    drawn_with = resolve_request(safelight.load("embedded"), asked)
    assert (drawn_with.sampler, drawn_with.guidance_scale) == ("dpmpp_2m", 4.0)
    assert (drawn_with.steps, drawn_with.cache_every, drawn_with.guidance_start) == (9, 3, 0.25)


@pytest.mark.parametrize("said", [{}, {"sampler": "ddim"}, {"steps": 20}])
def test_a_strength_is_checked_against_steps_that_are_known(said: dict[str, Any]) -> None:
    """The worker that draws may know more: a number of steps, or a sampler with one step more."""
    picture = Image.new("RGB", (8, 8))
    request = Request(prompt="a cat", strength=0.01, image=picture, **said)
    steps_of(request, None)
    with pytest.raises(SafelightError, match=r"strength 0.01 leaves none of"):
        steps_of(request.replace(sampler="ddim", steps=20), None)


def test_null_is_left_out(tmp_path: Path) -> None:
    nothing = dict.fromkeys({*settings_of(Request)} - {"prompt"})
    with Inside(tmp_path / "data", draws=False) as server:
        sent = "POST", "/api/jobs", {"prompt": "a cat", **nothing}
        first, again = (server.ask(*sent, idempotency_key="k").json() for _ in range(2))
        assert first["settings"]["steps"] == 20
        assert first["settings"]["guidance_start"] == 0.25
        assert again["id"] == first["id"]
        assert (first["settings"]["sampler"], first["settings"]["guidance_scale"]) == (
            "dpmpp_2m",
            4.0,
        )
        assert server.ask("POST", "/api/jobs", {"prompt": None}).json()["settings"]["prompt"] == ""
        refused = server.ask("POST", "/api/jobs", {"promt": None})
        assert (refused.status, refused.json()["field"]) == (422, "promt")
        nothing = {"negative_prompt": None, "steps": None, "embeddings": None}
        assert server.ask("POST", "/api/tokens", {"prompt": "a cat", **nothing}).status == 200


def test_a_key_stays_one_job_when_the_server_has_other_defaults(tmp_path: Path) -> None:
    body = {"prompt": "a cat", "width": 256}
    sent = "POST", "/api/jobs", body
    with Inside(tmp_path / "data", draws=False) as server:
        first = server.ask(*sent, idempotency_key="k").json()
        newer = {*CONTROL, *IP_ADAPTER, *HIRES, *INPAINTING, "seed"}
        earlier = {k: v for k, v in first["settings"].items() if k not in newer}
        digest = hashlib.sha256(json.dumps(earlier, sort_keys=True).encode()).hexdigest()
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "a.txt").write_text("red\n")
    how: Any = {"draws": False, "wildcards_dir": str(tmp_path / "words")}
    with Inside(tmp_path / "data", model="embedded-fast", **how) as server:
        assert server.ask(*sent, idempotency_key="k").json()["id"] == first["id"]
        for other in ({"prompt": "a cat"}, {**body, "steps": 20}, {**body, "seed": 1}):
            assert server.ask("POST", "/api/jobs", other, idempotency_key="k").status == 422
    with closing(sqlite3.connect(tmp_path / "data" / "jobs.sqlite3")) as db, db:
        db.execute("UPDATE jobs SET digest = ?", (digest,))  # as earlier versions stored it
    with Inside(tmp_path / "data", draws=False) as server:
        assert server.ask(*sent, idempotency_key="k").json()["id"] == first["id"]


def test_steps_of_a_schedule_are_the_model_s(tmp_path: Path) -> None:
    asked = {"prompt": "a [cat:dog:0.5]", "prompt_syntax": "a1111"}
    with Inside(tmp_path / "data", draws=False) as server:
        for body, steps in (({}, 20), ({"model": "embedded-fast"}, 4), ({"steps": 50}, 50)):
            told = server.ask("POST", "/api/tokens", {**asked, **body}).json()["prompt"]
            stages = told["parts"][0]["stages"]
            assert [stage["until"] for stage in stages] == [steps // 2 + 1, steps]


def test_what_the_headers_rule_out_is_refused_at_once(tmp_path: Path) -> None:
    noise = {"model": "embedded-unconditional"}
    chosen = {"override_settings": {"sd_model_checkpoint": noise["model"]}}
    skipped = {"override_settings": {"CLIP_stop_at_last_layers": 12}}
    with Inside(tmp_path / "data", draws=False) as server:
        for name, side in (("embedded", 256), (noise["model"], 64)):  # as a worker says it
            facts = {"name": name, "width": side, "height": side}
            server.hub.catalogue.on_message("loaded", [name, facts])
        server.hub.catalogue.arrived.set()
        for path, body, status, line in (
            ("/api/jobs", {"clip_skip": 12}, 422, "clip_skip must be at most 4"),
            ("/api/jobs", {"cache_branch": 99}, 422, "cache_branch must be at most"),
            ("/api/jobs", {"unconditional": True, "prompt": ""}, 422, "draws from words"),
            ("/api/jobs", noise, 422, "embedded-unconditional draws from noise alone"),
            ("/sdapi/v1/txt2img", skipped, 422, "CLIP_stop_at_last_layers must be at most 4"),
            ("/sdapi/v1/txt2img", {"clip_skip": 12}, 422, "clip_skip must be at most 4"),
            ("/sdapi/v1/txt2img", chosen, 422, "embedded-unconditional draws from noise alone"),
            ("/v1/images/generations", {"clip_skip": 12}, 400, '"param":"clip_skip"'),
            ("/v1/images/generations", noise, 400, "model must be one that reads a prompt"),
        ):
            answer = server.ask("POST", path, {"prompt": "a cat", **body})
            assert (answer.status, line in answer.body.decode()) == (status, True), answer.body
        listed = server.ask("GET", "/v1/models").json()["data"]
        assert [one["id"] for one in listed] == ["embedded", "embedded-fast"]
        assert server.ask("GET", "/v1/models/embedded-unconditional").status == 404
        for asked in ("nothing", "embeded-unconditional"):
            body = {"prompt": "a cat", "model": asked}
            answer = server.ask("POST", "/v1/images/generations", body)
            told = f"no model {asked!r} on this server; there are embedded, embedded-fast"
            assert (answer.status, answer.json()["error"]["message"]) == (404, told)
        assert server.ask("POST", "/api/jobs", {**noise, "unconditional": True}).status == 202


def test_where_guidance_begins_may_lie_after_where_a_model_ends_it() -> None:
    best = BEST | {"guidance_start": 0.0, "guidance_end": 0.4}
    asked = Request(guidance_start=0.5).with_defaults(best)
    assert (asked.guidance_start, asked.guidance_end) == (0.5, None)
    assert Request(guidance_start=0.3).with_defaults(best).guidance_end == 0.4


def test_none_is_the_model_s_own() -> None:
    asked = Request(steps=None, guidance_start=None, guidance_end=0.5)
    filled = asked.with_defaults({"steps": 4, "guidance_start": 0.2, "guidance_end": 0.9})
    assert (filled.steps, filled.guidance_start, filled.guidance_end) == (4, None, 0.5)


def test_none_in_a_grid_is_the_model_s_own() -> None:
    cells = requests(Request(prompt="a cat", steps=7), Axis.parse("steps=none,8"))[0]
    assert [cell.with_defaults({"steps": 4}).steps for cell in cells] == [4, 8]
    assert cells[0].seed == cells[1].seed


@pytest.mark.parametrize(
    ("notes", "distilled"),
    [
        ({}, False),
        ({"draw_with": BEST}, False),
        ({"draw_with": BEST, "distilled": True}, True),
        ({"draw_with": BEST, "distilled": "yes"}, False),
        # As our distillation wrote before it wrote that.
        ({"draw_with": BEST, "made_from": "embedded"}, True),
        ({"draw_with": BEST, "made_from": "embedded", "distilled": False}, False),
        ({"made_from": "embedded"}, False),
    ],
)
def test_which_models_are_distilled(notes: dict[str, Any], distilled: bool) -> None:
    assert is_distilled(notes) is distilled


def test_a_distilled_model_warns_of_other_values(tmp_path: Path) -> None:
    model = safelight.load(model_that_says(tmp_path, draw_with=BEST, distilled=True))
    assert not [w for w in model.generate("a cat").warnings if "dpmpp_2m" in w]
    assert [w for w in model.generate("a cat", steps=2).warnings if "dpmpp_2m" in w]


def test_a_grid_and_a_warning_too(tmp_path: Path) -> None:
    """Settings that are neither axes nor options are those that the model was taught."""
    model = safelight.load("embedded-fast")
    made = grid(model, Request(prompt="a cat", seed=1, eta=0.5), Axis.parse("seed=1,2"))
    for result in made.results[0]:
        assert result.settings["sampler"] == "ddim"
        assert (result.settings["steps"], result.settings["guidance_scale"]) == (4, 1.0)
        assert result.warnings == []
    made.save(tmp_path / "grid.png")
    with pytest.raises(SafelightError, match="is a grid of several pictures"):
        verify(str(tmp_path / "grid.png"))
