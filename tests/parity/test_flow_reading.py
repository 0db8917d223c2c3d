"""How models of flow matching read requests: prompts, their cache, steps, samplers, warnings."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from safelight import cli
from safelight.adapters.embeddings import EmbeddingFinder
from safelight.adapters.reader import PromptReader
from safelight.engine import Engine
from safelight.engine.requests import new_result, resolve_request
from safelight.errors import SafelightError
from safelight.families.flow import texts_of
from safelight.hires import second_pass
from safelight.model import Model
from safelight.nets import zimage
from safelight.nets.flux2 import Flux2Config, Flux2Transformer2DModel
from safelight.nets.qwen3 import Qwen3Config, Qwen3Model
from safelight.nets.zimage import MAX_KEPT, ZImageConfig, ZImageTransformer2DModel
from safelight.request import Request
from safelight.server.costs import cost, pixel_steps, steps_of
from safelight.server.names import Names
from safelight.server.settings import WorkerSettings
from safelight.weights import load
from safelight.weights.find import find
from safelight.weights.load import pick_dtype
from safelight.weights.plan import Plan, read_plan
from tests.parity.flow_models import (
    KLEIN,
    QWEN,
    ZIMAGE,
    make_flux,
    make_klein,
    make_sd3,
    make_zimage,
)
from tests.parity.test_pictures import ours

SIZE: Any = {"width": 64, "height": 64}
ABLE = "euler, euler_a, heun, dpmpp_2m, dpmpp_2m_sde, dpmpp_2s, unipc, lcm"
LONG = {
    "dev": "text_encoder_2",
    "sd3": "text_encoder_3",
    "base": "text_encoder",
    "klein-base": "text_encoder",
}
"""The text encoder that takes long, by the model."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("reading")
    return {
        "sd3": make_sd3(root / "sd3"),
        "bare": make_sd3(root / "bare", t5=False),
        "dev": make_flux(root / "dev", guided=True),
        "schnell": make_flux(root / "schnell", guided=False),
        "klein": make_klein(root / "klein", distilled=True),
        "klein-base": make_klein(root / "klein-base", distilled=False),
        "turbo": make_zimage(root / "turbo", shift=3.0),
        "base": make_zimage(root / "base", shift=6.0),
    }


def plan_of(folder: Path) -> Plan:
    return read_plan(find(str(folder)))


def warnings(model: Model, **asked: Any) -> list[str]:
    request = Request(**asked)
    return new_result(model, request, resolve_request(model, request)).warnings


# --- prompts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("syntax", "prompt", "read", "marked"),
    [
        ("a1111", "a red apple BREAK on a table", "a red apple on a table", True),
        ("a1111", "a (red:1.3) apple", "a red apple", True),
        ("a1111", "a cat AND a dog", "a cat", True),
        ("a1111", "a poster that says 7:30", "a poster that says 7:30", False),
        ("a1111", "a (red:1.3) clock at 7:30", "a red clock at 7:30", True),
        ("compel", '("a red apple", "on a table").and()', "a red apple on a table", True),
        ("compel", '("a cat", "a dog").blend(0.5, 0.5)', "a cat a dog", True),
        ("compel", "a red++ apple on a table", "a red apple on a table", True),
        (
            "compel",
            "a cat playing with a ball++ in the forest",
            "a cat playing with a ball in the forest",
            True,
        ),
        ("compel", "a cat on a mat", "a cat on a mat", False),
        ("plain", "a cat BREAK a dog", "a cat BREAK a dog", False),
    ],
)
def test_words_stay_apart(
    folders: dict[str, Path], syntax: Any, prompt: str, read: str, marked: bool
) -> None:
    model = ours(folders["dev"])
    asked = {"prompt": prompt, "prompt_syntax": syntax, "width": 1024, "height": 1024}
    assert texts_of(model, resolve_request(model, Request(**asked))) == {"prompt": read}
    assert [said.partition(",")[0] for said in warnings(model, **asked)] == marked * [
        "prompt has weights"
    ]


@pytest.mark.parametrize(
    ("name", "room", "most"),
    [
        *[("sd3", 255, 256), ("bare", 75, 77), ("dev", 511, 512)],
        *[("turbo", 493, 512), ("klein", 487, 512)],
    ],
)
def test_tokens_are_those_of_the_long_encoder(
    folders: dict[str, Path],
    name: str,
    room: int,
    most: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = WorkerSettings(str(folders[name]), "", "")
    read = Names(settings).describe(Request(prompt="a (red:2) apple", prompt_syntax="a1111"))
    [part] = read["parts"]
    [chunk] = part["stages"][0]["texts"][0]["chunks"]
    assert chunk["room"] == room
    assert 0 < chunk["count"] == len(chunk["tokens"]) < 20
    said = "".join(token["token"].replace("</w>", " ") for token in chunk["tokens"])
    assert said.translate({ord(mark): None for mark in "▁Ġ"}).split() == ["a", "red", "apple"]
    assert {token["weight"] for token in chunk["tokens"]} == {1}
    assert read["warnings"][0].startswith("it has weights, parts or changes")
    assert cli.run(["tokens", "red apple " * 400, "--model", str(folders[name]), "--json"]) == 0
    read = json.loads(capsys.readouterr().out)
    [chunk] = read["parts"][0]["stages"][0]["texts"][0]["chunks"]
    assert chunk["count"] == chunk["room"] >= room
    assert read["warnings"][0].startswith(f"cut at {most} tokens; left out: ")


def test_a_text_that_fits_is_not_called_cut(folders: dict[str, Path]) -> None:
    """What is put behind a text may not fit; that is no text."""
    model = ours(folders["turbo"])
    room = 493
    for count, cut in ((room, 0), (room + 3, 0), (room + 20, 7)):
        left = model.family.left_out(model, "a" * count)  # type: ignore[attr-defined]
        assert left == ("a" * cut or None), count


def test_an_unreadable_prompt_is_refused_at_once(folders: dict[str, Path]) -> None:
    reader = PromptReader(plan_of(folders["dev"]), EmbeddingFinder(None))
    with pytest.raises(SafelightError, match="prompt has a weight that is not between"):
        reader.check(Request(prompt="(a:1e9)".replace("1e9", "9" * 9), prompt_syntax="a1111"))


# --- the cache of texts --------------------------------------------------------------------------


def draw(engine: Engine, **asked: Any) -> Image.Image:
    engine.add(Request(**asked, **SIZE, seed=1))
    ticket = engine.tickets[-1]
    while engine.busy:
        engine.step()
    assert ticket.image is not None
    return ticket.image


@pytest.mark.parametrize("name", LONG)
def test_a_long_encoder_reads_a_text_once(folders: dict[str, Path], name: str) -> None:
    model = ours(folders[name])
    calls: list[int] = []
    hook = model.parts[LONG[name]].register_forward_hook(lambda *_: calls.append(1))
    engine = Engine(model)
    texts = {"prompt": "a red apple", "negative_prompt": ""}
    for scale in (2.0, 3.0, 4.0):
        draw(engine, **texts, steps=1, guidance_scale=scale)
    both = 1 if name == "dev" else 2  # FLUX.1 reads no negative prompt
    assert len(calls) == both
    draw(engine, **texts | {"negative_prompt": "table"}, steps=1, guidance_scale=2)
    assert len(calls) == both + (both - 1)
    draw(engine, **texts | {"prompt": "table"}, steps=1, guidance_scale=2)
    assert len(calls) == (2 if name == "dev" else 3)  # in the cache as the negative prompt
    draw(engine, **texts, steps=1, guidance_scale=1)
    assert len(calls) == (2 if name == "dev" else 3)
    hook.remove()


@pytest.mark.parametrize("name", LONG)
def test_a_cached_text_is_drawn_with_the_scale_that_is_asked(
    folders: dict[str, Path], name: str
) -> None:
    engine = Engine(ours(folders[name]))
    first, later = (draw(engine, prompt="a cat", steps=2, guidance_scale=g) for g in (2.0, 6.0))
    assert first.tobytes() != later.tobytes()
    alone = draw(Engine(ours(folders[name])), prompt="a cat", steps=2, guidance_scale=6.0)
    assert later.tobytes() == alone.tobytes()


def test_a_schedule_is_read_anew_for_other_steps(folders: dict[str, Path]) -> None:
    """At 5 steps it begins with the other word than at 20."""
    asked: Any = {"prompt": "a [cat:dog:0.1] on a mat", "prompt_syntax": "a1111"}
    asked |= {"guidance_scale": 1.0}
    model = ours(folders["base"])
    engine = Engine(model)
    draw(engine, **asked, steps=20)
    again = draw(engine, **asked, steps=5)
    assert again.tobytes() == draw(Engine(model), **asked, steps=5).tobytes()


# --- steps, samplers, cost -----------------------------------------------------------------------


@pytest.mark.parametrize(("strength", "steps", "taken"), [(0.2, 4, 1), (0.05, 8, 1), (0.6, 4, 3)])
def test_a_server_takes_every_strength(
    folders: dict[str, Path], strength: float, steps: int, taken: int
) -> None:
    """As diffusers counts for these models: 4 steps at 0.6 are 3, and no strength leaves none."""
    picture = Image.new("RGB", (64, 64), "red")
    request = Request(prompt="x", image=picture, strength=strength, steps=steps)
    plan, model = plan_of(folders["schnell"]), ours(folders["schnell"])
    request = request.with_defaults(model.defaults)
    assert steps_of(request, plan) == steps
    assert steps_of(request, None) == steps  # a model on another machine may be of flow matching
    resolved = resolve_request(model, request)
    assert model.family.steps_taken(resolved) == taken
    assert len(model.family.table(model, resolved).rows) == taken


def test_a_second_pass_costs_the_steps_that_the_model_takes(folders: dict[str, Path]) -> None:
    """Of 10 steps at 0.75 models of flow matching take 8, others 7."""
    plan, model = plan_of(folders["schnell"]), ours(folders["schnell"])
    request = Request(prompt="x", steps=10, hires_scale=2, hires_strength=0.75, **SIZE)
    request = request.with_defaults(model.defaults)
    second = second_pass(resolve_request(model, request), plan.native_size)
    assert model.family.steps_taken(second) == 8
    pixels = 64 * 64 * 10 + 128 * 128 * 8
    assert pixel_steps(request, 10, plan.native_size, plan) == pixels
    assert pixel_steps(request, 10, plan.native_size) == pixels - 128 * 128
    calls = 2 if request.guidance_scale > 1 and not plan.family.takes_guidance(plan) else 1
    rows = round(calls * pixels / math.prod(plan.native_size))
    assert cost(request, 10, plan.native_size, plan) == max(1, rows)
    many = request.replace(steps=36, hires_strength=0.74, count=64)
    with pytest.raises(SafelightError, match="at most 4000, not 4032"):
        steps_of(many, plan)
    assert steps_of(many, None) == 36  # not known: as others count


def test_a_strength_that_leaves_no_step_is_refused_for_others() -> None:
    plan = read_plan(find("embedded"))
    picture = Image.new("RGB", (64, 64), "red")
    request = Request(prompt="x", image=picture, strength=0.2, steps=4, sampler="euler")
    with pytest.raises(SafelightError, match="leaves none of 4 steps"):
        steps_of(request, plan)


@pytest.mark.parametrize("sampler", ["ddim", "deis"])
def test_samplers_for_other_models_are_refused_at_once(
    folders: dict[str, Path], sampler: str
) -> None:
    names = Names(WorkerSettings(str(folders["sd3"]), "", ""))
    with pytest.raises(SafelightError, match=f"{sampler} is no sampler.* sd3 .* {ABLE}") as told:
        names.check(Request(prompt="x", sampler=sampler))
    assert told.value.field == "sampler"
    names.check(Request(prompt="x"))  # the model's own


def test_guidance_as_an_input_costs_nothing(folders: dict[str, Path]) -> None:
    request = Request(prompt="x", guidance_scale=3.5)
    native = (1024, 1024)
    assert cost(request, 28, native, plan_of(folders["dev"])) == 28
    assert cost(request, 28, native, plan_of(folders["klein"])) == 28
    assert cost(request, 28, native, plan_of(folders["klein-base"])) == 2 * 28
    assert cost(request, 28, native, plan_of(folders["base"])) == 2 * 28
    assert cost(request, 28, native, read_plan(find("embedded"))) == 2 * 28


# --- warnings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "told"),
    [
        ((768, 512), False),
        ((512, 512), False),
        ((1536, 1536), False),
        ((384, 384), True),
        ((2048, 2048), True),
    ],
)
def test_any_shape_of_a_usual_area_is_drawn_well(
    folders: dict[str, Path], size: tuple[int, int], told: bool
) -> None:
    found = warnings(ours(folders["turbo"]), prompt="x", width=size[0], height=size[1])
    assert [said.split(" at ")[0] for said in found] == told * ["turbo was trained on 1024x1024;"]


@pytest.mark.parametrize(
    ("name", "asked", "told"),
    [
        ("turbo", {"negative_prompt": "y"}, "negative_prompt does nothing .*: leave it out"),
        ("base", {"negative_prompt": "y", "guidance_scale": 1}, "negative_prompt .*: try 5"),
        ("schnell", {"steps": 50, "sampler": "euler_a"}, "schnell was taught to draw with .*4"),
        ("turbo", {"guidance_scale": 5}, "turbo was taught to draw with"),
        ("dev", {"fast": 1}, "fast 1 changes nothing with dev here: leave it out"),
        ("schnell", {"fast": 3}, "fast 3 changes nothing with schnell here: leave it out"),
        ("turbo", {"fast": 2}, "fast 2 changes nothing with turbo here: leave it out"),
        ("klein", {"negative_prompt": "y"}, "negative_prompt does nothing .*: leave it out"),
        ("klein", {"guidance_scale": 3}, "guidance_scale does nothing with klein: leave it out"),
        ("klein", {"steps": 50}, "klein was taught to draw with .*4"),
        ("klein", {"fast": 2}, "fast 2 changes nothing with klein here: leave it out"),
        ("klein-base", {"negative_prompt": "y", "guidance_scale": 1}, "negative_prompt .*: try 4"),
        ("klein-base", {"fast": 3}, None),
        ("turbo", {"steps": 9}, None),
        ("dev", {"fast": 2}, None),
        ("base", {"fast": 3}, None),
        ("base", {"negative_prompt": "y"}, None),
    ],
)
def test_what_helps_nothing_is_told(
    folders: dict[str, Path], name: str, asked: dict[str, Any], told: str | None
) -> None:
    found = warnings(ours(folders[name]), prompt="x", width=1024, height=1024, **asked)
    assert len(found) == (told is not None), found
    assert all(re.match(told or "", said) for said in found), found


# --- devices -------------------------------------------------------------------------------------


class NoFloat64(TorchDispatchMode):
    """Refuses float64 on the device "meta", as Apple's GPU does."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in tree_flatten(out)[0]:
            if isinstance(one, torch.Tensor) and one.is_meta and one.dtype == torch.float64:
                raise TypeError(f"{func}: float64")
        return out


def test_no_network_needs_float64_on_the_device() -> None:
    with torch.device("meta"):
        network = ZImageTransformer2DModel(ZImageConfig.from_dict(ZIMAGE))
        encoder = Qwen3Model(Qwen3Config.from_dict(QWEN))
        x, times, text = torch.zeros(1, 16, 8, 8), torch.zeros(1), torch.zeros(1, 4, 32)
        klein = Flux2Transformer2DModel(Flux2Config.from_dict(json.loads(json.dumps(KLEIN))))
        latents, states = torch.zeros(1, 64, 4, 4), torch.zeros(1, 4, 96)
        ids = torch.zeros(1, 4, dtype=torch.int64)
    with NoFloat64():
        assert network(x, times, text).shape == x.shape
        assert klein(latents, times, states).shape == latents.shape
        assert encoder(ids, [-2], 3)[0].shape == (1, 4, 32)


@torch.inference_mode()
def test_angles_are_computed_once_for_a_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    network = ZImageTransformer2DModel(ZImageConfig.from_dict(ZIMAGE)).eval()
    calls: list[int] = []
    angles = zimage.rotary_angles
    monkeypatch.setattr(zimage, "rotary_angles", lambda *a: calls.append(1) or angles(*a))
    x, times = torch.randn(1, 16, 8, 8), torch.zeros(1)
    texts = [torch.randn(1, length, 32) for length in (4, 40)]
    wanted = [network(x, times, text) for text in texts]
    assert all(map(torch.equal, wanted, (network(x, times, text) for text in texts)))
    assert len(calls) == 2
    for side in range(2, 2 * MAX_KEPT + 4, 2):
        network(torch.randn(1, 16, side, 8), times, texts[0])
    assert len(network._kept) == MAX_KEPT
    assert torch.equal(network(x, times, texts[1]), wanted[1])


@torch.inference_mode()
def test_float16_holds_numbers_beyond_its_largest() -> None:
    """The norms behind both parts of a block take such numbers back."""
    torch.manual_seed(0)
    network = ZImageTransformer2DModel(ZImageConfig.from_dict(ZIMAGE)).eval()
    for name, parameter in network.named_parameters():
        torch.nn.init.normal_(parameter, std=0.1)
        if "norm" in name and name.endswith("weight"):
            parameter.fill_(1)
    for block in network.layers:
        for layer in (block.feed_forward.w1, block.feed_forward.w3, block.attention.to_out[0]):  # type: ignore[union-attr]
            layer.weight.mul_(3e4)  # type: ignore[union-attr, operator]
    x, times, text = torch.randn(1, 16, 8, 8), torch.full((1,), 0.3), torch.randn(1, 4, 32)
    wanted = network(x, times, text)
    found = network.half()(x.half(), times, text.half()).float()
    assert wanted.isfinite().all()
    assert found.isfinite().all()


def test_auto_is_bfloat16_where_a_gpu_has_it(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    half = plan_of(folders["base"]).family.half
    assert read_plan(find("embedded")).family.half == "float16"
    cuda, mps = torch.device("cuda"), torch.device("mps")
    for major, dtype in ((9, torch.bfloat16), (8, torch.bfloat16), (7, torch.float16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, n=major: (n, 0))
        assert pick_dtype("auto", cuda, half) == dtype
        assert pick_dtype("auto", cuda) == torch.float16
    for new, dtype in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda *_, n=new: n)
        assert pick_dtype("auto", mps, half) == dtype
    assert pick_dtype("float16", cuda, half) == torch.float16


def test_a_model_is_loaded_in_what_its_family_prefers(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, ...]] = []
    pick = load.pick_dtype

    def noted(*given: Any) -> torch.dtype:
        asked.append(given)
        return pick("float32", given[1])

    monkeypatch.setattr(load, "pick_dtype", noted)
    load.load_model(str(folders["base"]), device="cpu")
    assert asked[-1][2] == "bfloat16"
