"""LoRAs of a server: only names of the models folder, and merging instead of loading again."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from inside import Inside
from PIL import Image
from safetensors.torch import save_file

import safelight
from safelight.recipe import read_recipe

pytestmark = pytest.mark.xdist_group("server loras")
DRAW: dict[str, Any] = {
    "prompt": "a cat",
    "steps": 2,
    "seed": 5,
    "sampler": "euler",
    "width": 64,
    "height": 64,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models folder with two LoRAs of the model that ships, one that does not fit, and one of
    Stable Diffusion 1."""
    root = tmp_path_factory.mktemp("models")
    (root / "Lora").mkdir()
    model = safelight.load(device="cpu", dtype="float32", plain=True)
    for seed, name in enumerate(("ink", "film")):
        torch.manual_seed(seed)
        tensors = {}
        for path, layer in model.unet.named_modules():
            if path.endswith((".to_q", ".to_v")):
                out, inner = layer.weight.shape
                key = f"lora_unet_{path.replace('.', '_')}"
                tensors[f"{key}.lora_down.weight"] = torch.randn(4, inner) * 0.2
                tensors[f"{key}.lora_up.weight"] = torch.randn(out, 4) * 0.2
        told = {"ss_output_name": f"{name} by me"}
        save_file(tensors, root / "Lora" / f"{name}.safetensors", told)
    save_file({"lora_unet_x.alpha": torch.tensor(1.0)}, root / "Lora" / "odd.safetensors")
    key = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    wide = {f"{key}.lora_down.weight": torch.ones(4, 768)}
    wide[f"{key}.lora_up.weight"] = torch.ones(144, 4)
    save_file(wide, root / "Lora" / "wide.safetensors")
    return root


@pytest.fixture(scope="module")
def server(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Inside]:
    folder = tmp_path_factory.mktemp("loras")
    with Inside(folder, dtype="float32", exact=True, models_dir=str(models)) as running:
        yield running


def drawn(server: Inside, **settings: Any) -> tuple[bytes, Any]:
    """The pixels of a job's picture, and its recipe."""
    job_id = server.submit(**{**DRAW, **settings})
    job = server.finished(job_id)
    assert job["status"] == "succeeded", job["error"]
    png = server.picture(job_id)
    with Image.open(io.BytesIO(png)) as image:
        return image.tobytes(), read_recipe(png)


def test_another_set_costs_no_load(
    server: Inside, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each set is merged once, and the pictures equal those made in Python."""
    from safelight.adapters import select
    from safelight.server import loaded

    assert server.worker is not None
    counts = {"loads": 0, "merges": 0}

    def count(what: str, call: Any) -> Any:
        def counted(*given: Any, **how: Any) -> Any:
            counts[what] += 1
            return call(*given, **how)

        return counted

    monkeypatch.setattr(loaded, "load_model", count("loads", loaded.load_model))
    monkeypatch.setattr(select, "merged", count("merges", select.merged))
    sets = [["ink:0.8"], ["film"], ["ink:0.8", "film:-0.5"], []]
    asked = [server.submit(**DRAW, loras=sets[i % 4]) for i in range(8)]
    made = []
    for job_id in asked:
        assert server.finished(job_id)["status"] == "succeeded"
        with Image.open(io.BytesIO(server.picture(job_id))) as image:
            made.append(image.tobytes())
    assert made[:4] == made[4:]
    assert len(set(made)) == 4
    assert counts == {"loads": 0, "merges": 3}
    alone = safelight.load(device="cpu", dtype="float32", models_dir=models)
    for loras, pixels in zip(sets, made, strict=False):
        one = alone.generate(**DRAW, loras=loras).images[0]
        assert largest(one, pixels) <= 1


def largest(image: Image.Image, pixels: bytes) -> int:
    other = Image.frombytes(image.mode, image.size, pixels)
    return safelight.picture.largest_difference(image, other)


def test_in_the_recipe(server: Inside) -> None:
    pixels, recipe = drawn(server, loras=["ink:0.5"])
    assert [one["name"] for one in recipe["loras"]] == ["ink"]
    assert recipe["settings"]["loras"] == ["ink:0.5"]
    alias, told = drawn(server, loras=["ink by me:0.5"])
    assert alias == pixels
    assert told["loras"][0]["sha256"] == recipe["loras"][0]["sha256"]


def test_names_alone(server: Inside, models: Path) -> None:
    inside = models / "Lora" / "ink.safetensors"
    for name in ("nothing", str(inside), "../Lora/ink", "/etc/passwd", "~/ink"):
        answer = server.ask("POST", "/api/jobs", {**DRAW, "loras": [name]})
        assert answer.status == 422
        told = answer.json()
        assert told["detail"].startswith("no lora ")
        assert told["field"] == "loras"
    told = server.ask("POST", "/api/jobs", {**DRAW, "loras": ["ink:x"]}).json()
    assert told["detail"] == "lora ink: the weight must be a number, not 'x'"
    tagged = {**DRAW, "prompt": "a cat <lora:nothing:1>", "prompt_syntax": "a1111"}
    assert server.ask("POST", "/api/jobs", tagged).status == 422


def test_one_that_does_not_fit_fails_its_job(server: Inside) -> None:
    job = server.finished(server.submit(**DRAW, loras=["odd"]))
    assert job["status"] == "failed"
    assert job["error"].startswith("lora odd.safetensors: 1 of 1 keys belongs to nothing")
    assert drawn(server)[0] == drawn(server, loras=["ink:0"])[0]


def test_one_of_another_kind_of_model_is_refused_at_once(server: Inside) -> None:
    line = "lora wide: it is for Stable Diffusion 1, and this model is "
    tagged = {"prompt": "a cat <lora:wide:1>", "steps": 2}
    for path, body in (
        ("/api/jobs", {**DRAW, "loras": ["wide"]}),
        ("/api/jobs", {**DRAW, "loras": ["ink", "wide:0"], "lora_unmatched": "warn"}),
        ("/api/jobs", {**tagged, "prompt_syntax": "a1111"}),
        ("/sdapi/v1/txt2img", tagged),
    ):
        answer = server.ask("POST", path, body)
        assert answer.status == 422, answer.body[:300]
        assert line in answer.body.decode()


def test_a_prompt_that_is_too_long_is_refused_at_once(server: Inside) -> None:
    long = "a BREAK " * 32 + "a"
    line = "prompt has 33 chunks of 46 tokens; at most 32 can be used"
    for path, body in (
        ("/api/jobs", {**DRAW, "prompt": long, "prompt_syntax": "a1111"}),
        ("/api/jobs", {**DRAW, "negative_prompt": long, "prompt_syntax": "a1111"}),
        ("/sdapi/v1/txt2img", {"prompt": long, "steps": 2}),
    ):
        answer = server.ask("POST", path, body)
        assert answer.status == 422, answer.body[:300]
        assert line in answer.body.decode()
    most = {**DRAW, "prompt": "a BREAK " * 31 + "a", "prompt_syntax": "a1111"}
    assert server.ask("POST", "/api/jobs", most).status == 202


def test_the_web_ui_s_api(server: Inside) -> None:
    """The prompt may have tags, and the LoRAs are listed."""
    assert server.ask("GET", "/api/library").json()["loras"] == ["film", "ink", "odd", "wide"]
    theirs = server.ask("GET", "/sdapi/v1/loras").json()
    assert [(one["name"], one["alias"]) for one in theirs][:2] == [
        ("film", "film by me"),
        ("ink", "ink by me"),
    ]
    body = {"prompt": "a cat <lora:ink:0.5>", "steps": 2, "seed": 5, "sampler_name": "Euler"}
    answer = server.ask("POST", "/sdapi/v1/txt2img", {**body, "cfg_scale": 7.5})
    assert answer.status == 200, answer.body[:300]
    told = answer.json()["info"]
    assert "Lora hashes" in told
    assert "<lora:ink:0.5>" in told
    answer = server.ask("POST", "/sdapi/v1/txt2img", {"prompt": "a cat <lora:none:0.5>"})
    assert answer.status == 422
