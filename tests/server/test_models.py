"""Several models in one server: by name in each API, loaded on demand within a bound of memory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from serving import Serving, room_for_one

from safelight.errors import SafelightError
from safelight.server.loaded import LISTED, LoadedModels
from safelight.server.metrics import MAX_MODELS, REST, Metrics
from safelight.server.pulse import Pulse
from safelight.server.settings import WorkerSettings
from safelight.weights.find import MODELS
from safelight.weights.hub_names import HubName
from tests.guiding import controlnet

pytestmark = pytest.mark.xdist_group("models")  # they share a server

TEXT = {
    "prompt": "a cat",
    "steps": 4,
    "sampler": "ddim",
    "seed": 1,
    "width": 64,
    "height": 64,
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """A server with room for one model at a time; one model is broken, one does not know snow."""
    folder = tmp_path_factory.mktemp("models")
    models = folder / "library"
    broken = models / "broken"
    shutil.copytree(MODELS / "embedded", broken)
    weights = next((broken / "unet").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    notes = shutil.copytree(MODELS / "embedded-fast", models / "few") / "safelight.json"
    told = json.loads(notes.read_text())
    told["words"].remove("snow")
    notes.write_text(json.dumps(told))
    allowed = "embedded,embedded-fast,broken,few"
    room = room_for_one("embedded", "float32")
    bounds = ("--models-dir", str(models), "--allow-models", allowed, "--model-memory", room)
    with Serving(folder, "--dtype", "float32", *bounds) as running:
        running.ready()
        yield running


def loaded(server: Serving) -> list[str]:
    return [one["name"] for one in server.client.get("/api/models").json() if one["loaded"]]


def test_each_job_is_drawn_by_its_model(server: Serving) -> None:
    """One model is dropped for the other, and no job waits for ever."""
    jobs = [(name, server.submit(**TEXT, model=name)) for name in ("embedded", "embedded-fast") * 2]
    digests: dict[str, set[str]] = {}
    for name, job in jobs:
        ended = server.finished(job)
        assert (ended["status"], ended["model"]) == ("succeeded", name)
        recipe = ended["pictures"][0]["recipe"]["model"]
        assert recipe["name"] == name
        digests.setdefault(name, set()).add(recipe["sha256"])
        assert len(loaded(server)) <= 1
    assert [len(found) for found in digests.values()] == [1, 1]
    assert len(set.union(*digests.values())) == 2
    assert server.client.get("/readyz").json()["models"] == loaded(server)


def test_one_without_a_name_is_the_server_s_own(server: Serving) -> None:
    assert server.finished(server.submit(**TEXT))["model"] == "embedded"


def test_defaults_are_those_of_the_job_s_model(server: Serving) -> None:
    ended = server.finished(server.submit(prompt="a cat", seed=1, model="embedded-fast"))
    settings = ended["pictures"][0]["recipe"]["settings"]
    assert (settings["steps"], settings["guidance_scale"]) == (4, 1)


def test_a_broken_model_fails_its_own_jobs(server: Serving) -> None:
    bad, good = server.submit(**TEXT, model="broken"), server.submit(**TEXT)
    ended = server.finished(bad)
    assert ended["status"] == "failed"
    assert str(MODELS) not in ended["error"]
    assert "\n" not in ended["error"]
    assert server.finished(good)["status"] == "succeeded"


@pytest.mark.parametrize("name", ["embeded-fast", "embedded-unconditional", "/etc/passwd", "../x"])
def test_only_what_is_allowed(server: Serving, name: str) -> None:
    def refused(path: str, **body: Any) -> str:
        answer = server.client.post(path, json=body)
        assert answer.status_code in (404, 422)
        return answer.text

    said = refused("/api/jobs", **TEXT, model=name)
    assert "no model" in said
    if name == "embeded-fast":
        assert "embedded-fast" in said
    chosen = {"override_settings": {"sd_model_checkpoint": name}}
    assert "no model" in refused("/sdapi/v1/txt2img", prompt="a cat", steps=4, **chosen)


def test_a1111_s_clients_choose_theirs(server: Serving) -> None:
    client = server.client
    titles = [one["title"] for one in client.get("/sdapi/v1/sd-models").json()]
    assert any("embedded-fast" in title for title in titles)
    answer = client.post("/sdapi/v1/options", json={"sd_model_checkpoint": "embedded-fast"})
    assert answer.status_code == 200, answer.text
    assert "embedded-fast" in client.get("/sdapi/v1/options").json()["sd_model_checkpoint"]
    body = {"prompt": "a cat", "steps": 4, "sampler_name": "DDIM", "cfg_scale": 1}
    assert client.post("/sdapi/v1/txt2img", json=body).status_code == 200
    newest = client.get("/api/jobs", params={"limit": 1}).json()[0]
    assert newest["model"] == "embedded-fast"
    client.post("/sdapi/v1/options", json={"sd_model_checkpoint": "embedded"})


def test_prompts_are_read_as_each_model_reads_them(server: Serving) -> None:
    def asked(**body: Any) -> Any:
        return server.client.post("/api/tokens", json={"prompt": "a cat", **body})

    snow = {"prompt": "a cat in the snow"}
    assert asked(**snow).json()["prompt"]["unknown"] == []
    assert asked(**snow, model="few").json()["prompt"]["unknown"] == ["snow"]
    assert asked(model="nothing").status_code == 422
    assert "no model 'nothing'" in asked(model="nothing").json()["detail"]
    assert "model must be" in asked(model=3).json()["detail"]
    told = server.client.get("/api/library", params={"model": "embedded-fast"})
    assert told.json() == server.client.get("/api/library").json()
    assert server.client.get("/api/library", params={"model": "nothing"}).status_code == 422


def test_figures_are_told_by_model(server: Serving) -> None:
    for name in ("embedded-fast", "embedded"):
        server.finished(server.submit(**TEXT, model=name))
    told = server.client.get("/metrics").text
    figures = dict(line.rsplit(" ", 1) for line in told.splitlines() if line[0] != "#")

    def jobs(name: str) -> float:
        return float(figures[f'safelight_model_jobs{{model="{name}",status="succeeded"}}'])

    assert jobs("embedded-fast") >= 1
    assert sum(jobs(name) for name in ("embedded", "embedded-fast")) == float(
        figures['safelight_jobs{status="succeeded"}']
    )
    assert figures['safelight_model_loaded{model="embedded"}'] == "1.0"
    assert figures['safelight_model_loaded{model="embedded-fast"}'] == "0.0"
    assert float(figures['safelight_model_loads{model="embedded-fast"}']) >= 1


def test_figures_are_of_so_many_models_and_no_more() -> None:
    metrics = Metrics()
    counts = {f"m{i}": {"succeeded": i, "failed": 1} for i in range(MAX_MODELS + 50)}
    metrics._set_jobs({**counts, "": {"succeeded": 10**6}})
    [told] = [one for one in metrics._registry.collect() if one.name == "safelight_model_jobs"]
    values = {(one.labels["model"], one.labels["status"]): one.value for one in told.samples}
    assert len({model for model, _ in values}) == MAX_MODELS + 1
    rest = sum(range(51))
    assert values[REST, "succeeded"] == rest
    assert values[REST, "failed"] == 51
    assert values["(none)", "succeeded"] == 10**6


def test_openai_s_clients_name_one(server: Serving) -> None:
    body = {"prompt": "a cat", "model": "embedded-fast", "size": "256x256"}
    answer = server.client.post("/v1/images/generations", json=body)
    assert answer.status_code == 200, answer.text
    newest = server.client.get("/api/jobs", params={"limit": 1}).json()[0]
    assert newest["model"] == "embedded-fast"


@pytest.mark.parametrize("what", ["the model", "its ControlNet"])
def test_a_picture_is_drawn_again_only_by_the_same_files(tmp_path: Path, what: str) -> None:
    """In float32, after NaN: its files are found by name, and may be another model's by now."""
    net = None
    if what == "the model":
        folder = shutil.copytree(MODELS / "embedded-unconditional", tmp_path / "mine")
        changed = folder / "scheduler" / "scheduler_config.json"
    else:
        folder, net = MODELS / "embedded", controlnet(tmp_path / "edges")
        changed = net / "config.json"
    how: dict[str, Any] = {"dtype": "bfloat16", "controlnet": net and str(net)}
    models = LoadedModels(WorkerSettings(str(folder), "", "", **how), Pulse(), print)
    models.load_first()
    held = models.get(models.default)
    assert held is not None
    changed.write_text(changed.read_text() + "\n")
    with pytest.raises(SafelightError, match="were replaced after it was loaded") as caught:
        models.precise(held)
    assert caught.value.code == "weights_changed"
    assert held.precise is None
    models.close()


def test_a_model_of_the_hub_is_downloaded_before_its_memory_is_compared(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cached = set[str]()

    def from_hub(name: HubName, *_: Any, download: bool, **__: Any) -> Path:
        repo = str(name)
        if download:
            cached.add(repo)
        if repo not in cached:
            raise SafelightError(f"{repo} is not in the hub cache")
        return MODELS / "embedded" / ("vae" if repo == "org/vae" else "")

    monkeypatch.setattr("safelight.weights.find.from_hub", from_hub)
    parts: dict[str, Any] = {"vae": "org/vae", "refiner": "org/refiner"}
    models = LoadedModels(
        WorkerSettings("org/model", "", "", **parts, model_memory=1), Pulse(), print
    )
    with pytest.raises(SafelightError, match="and --model-memory is 0"):
        models.load_first()
    assert cached == {"org/model", *parts.values()}


def test_the_models_folder_is_not_listed_at_each_claim(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr("safelight.server.loaded.time", SimpleNamespace(monotonic=lambda: now))
    (tmp_path / "checkpoints").mkdir()
    settings = WorkerSettings("embedded", "", "", models_dir=str(tmp_path), elsewhere=True)
    models = LoadedModels(settings, Pulse(), print)
    assert "mine" not in (models.loadable or ())
    (tmp_path / "checkpoints" / "mine.safetensors").write_bytes(b"x")
    assert "mine" not in (models.loadable or ())
    now += LISTED + 1
    assert "mine" in (models.loadable or ())
    models.close()
