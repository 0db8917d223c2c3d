"""The studio in a real browser, against a real server on the model that ships."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from axe_playwright_python.sync_playwright import Axe
from PIL import Image, ImageFilter, PngImagePlugin
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright
from serving import Serving, wait_for

import safelight
from safelight.recipe import read_recipe
from safelight.request import Request
from safelight.studio import form
from safelight.studio.recipes import recipe_settings
from safelight.studio.run import Command

pytestmark = pytest.mark.xdist_group("studio")  # one server for them all

expect.set_options(timeout=30_000)
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
ARTEFACTS = os.environ.get("SAFELIGHT_SCREENSHOTS")
"""A folder for what the page looked like; those of docs/studio.md are from here."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed")
    with Serving(tmp_path_factory.mktemp("studio"), "--dtype", "float32") as running:
        running.ready()
        wait_for(lambda: running.client.get("/studio/").status_code == 200)
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Sandboxed frames stay in the page's process: of those in one of their own, one in four was
    never found by Playwright on a busy machine.
    """
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed")
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--disable-features=IsolateSandboxedIframes"],
        )
        yield running
        running.close()


def opened(browser: Browser, **how: Any) -> BrowserContext:
    # Without motion: software draws it, on the processors that the server needs.
    size = {"width": 1280, "height": 950}
    return browser.new_context(viewport=size, reduced_motion="reduce", **how)


@pytest.fixture(scope="module")
def context(browser: Browser) -> Iterator[BrowserContext]:
    """One for all tests: it keeps Gradio's scripts, and what was compiled of them."""
    kept = opened(browser)
    yield kept
    kept.close()


class Watched:
    """A page, and what it must not do."""

    def __init__(self, context: BrowserContext, url: str) -> None:
        self.page = context.new_page()
        self.page.set_default_timeout(30_000)
        self.url, self.hosts, self.errors = url, set[str](), list[str]()
        self.page.on("request", lambda request: self.hosts.add(urlsplit(request.url).netloc))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", self._said)

    def _said(self, message: Any) -> None:
        if message.type == "error":
            self.errors.append(f"{message.text} {message.location}")

    def open(self) -> Page:
        self.page.goto(f"{self.url}/studio")
        expect(self.page.get_by_label("Prompt", exact=True)).to_be_visible()
        return self.page

    def close(self) -> None:
        self.page.close()
        assert self.hosts <= {urlsplit(self.url).netloc, ""}
        assert self.errors == []


@pytest.fixture
def page(
    server: Serving, context: BrowserContext, request: pytest.FixtureRequest
) -> Iterator[Page]:
    watched = Watched(context, server.url)
    yield watched.open()
    shot(watched.page, request.node.name)
    watched.close()


def shot(page: Page, name: str) -> None:
    if ARTEFACTS:
        page.screenshot(path=f"{ARTEFACTS}/{name}.png")


def event(server: Serving, name: str, *data: Any) -> dict[str, Any]:
    """What an event of Gradio's answers to a client that is no browser: `data`, or `error`."""
    known = server.client.get("/studio/config").json()["dependencies"]
    body = {
        "data": data,
        "fn_index": next(one["id"] for one in known if one["api_name"] == name),
        "session_hash": secrets.token_hex(5),
    }
    sent = {"content": json.dumps(body), "headers": {"content-type": "application/json"}}
    assert server.client.post("/studio/gradio_api/queue/join", **sent).status_code == 200
    data_of = f"/studio/gradio_api/queue/data?session_hash={body['session_hash']}"
    with server.client.stream("GET", data_of) as stream:
        for line in stream.iter_lines():
            said = json.loads(line.removeprefix("data:")) if line else {}
            if said.get("msg") == "process_completed":
                return said["output"]
    raise AssertionError("it did not end")


def submitted(server: Serving, **fields: Any) -> str:
    """The problem that Make tells of these fields; empty if it drew."""
    usual = {
        "prompt": "a cat",
        "negative_prompt": "",
        "sampler": "ddim",
        "steps": 2,
        "guidance_scale": 7.5,
        "count": 1,
        "seed": "5",
        "width": 0,
        "height": 0,
        "schedule": form.OWN,
        "spacing": form.OWN,
        "eta": 0,
        "strength": 0.7,
        "picture": None,
        "enlarged": None,
    }
    assert fields.keys() <= usual.keys()
    output = event(server, "submit", True, *(usual | fields).values())
    return str(output["data"][2] if "data" in output else output["error"])


def draw(page: Page, prompt: str, **fields: int) -> None:
    """Ask for a picture, and wait for it."""
    ask(page, prompt, **fields)
    expect(page.locator(".now .status")).to_have_text(f"“{prompt}” is done.")


def ask(page: Page, prompt: str, **fields: int) -> None:
    page.get_by_label("Prompt", exact=True).fill(prompt)
    for label, value in fields.items():
        page.get_by_label(f"number input for {label}").fill(str(value))
    page.get_by_role("button", name="Draw").click()


def newest(server: Serving) -> Any:
    return server.client.get("/api/jobs", params={"limit": 1}).json()[0]


def tab(page: Page, name: str) -> None:
    page.get_by_role("tab", name=name).click()


def choose(page: Page, action: str, where: str = ".now") -> None:
    """What can be done with the first picture there."""
    page.locator(f"{where} .grid button").first.click()
    page.locator("#picture").get_by_role("button", name=action).click()


def test_a_picture_develops_before_ones_eyes(server: Serving, page: Page) -> None:
    ask(page, "a red apple", Steps=150)
    live = page.locator(".now .live")
    expect(live).to_be_visible()
    for label in ("Clean estimate", "Noisy state"):
        expect(live.get_by_alt_text(label)).to_have_attribute("src", re.compile("^data:image/png"))
    expect(live.locator(".left")).to_have_text(re.compile(r"Step \d\d of 150, \d+ s left"))
    shot(page, "live")
    expect(page.locator(".now .status")).to_have_text("“a red apple” is done.")
    expect(page.locator(".now .grid img").first).to_have_attribute("alt", "a red apple")
    assert newest(server)["client"] == "studio"


def test_several_wait_and_one_is_cancelled(server: Serving, page: Page) -> None:
    ask(page, "a cat", Steps=150, Pictures=16)
    expect(page.locator(".now .live .prompt")).to_have_text("a cat")
    ask(page, "a dog", Steps=150, Pictures=16)
    expect(page.locator(".now .waiting li")).to_have_count(1)
    page.get_by_role("button", name="Cancel a dog").click()
    expect(page.locator(".now .waiting li")).to_have_count(0)
    page.locator(".now .live").get_by_role("button", name="Cancel").click()
    expect(page.locator(".now .status")).to_have_text("“a cat” was cancelled.")
    jobs = server.client.get("/api/jobs", params={"limit": 2}).json()
    assert [job["status"] for job in jobs] == ["cancelled", "cancelled"]


def test_what_cannot_be_is_told_in_a_sentence(page: Page) -> None:
    page.get_by_label("Seed", exact=True).fill("many")
    page.get_by_role("button", name="Draw").click()
    expect(page.locator("#make-problem")).to_contain_text("seed must be a whole number")
    page.get_by_label("Seed", exact=True).fill("5")
    page.get_by_role("button", name="Size and schedule").click()
    page.wait_for_timeout(500)  # it unfolds
    page.get_by_label("Width").fill("65")
    page.keyboard.press("Tab")
    page.wait_for_timeout(500)  # Gradio takes a field a moment after it is left
    page.get_by_role("button", name="Draw").click()
    expect(page.locator("#make-problem")).to_contain_text("width must be a multiple of 8")


def test_the_seed_is_kept_when_it_is_locked(server: Serving, page: Page) -> None:
    seed = page.get_by_label("Seed", exact=True)
    before = seed.input_value()
    page.get_by_role("button", name="New seed").click()
    expect(seed).not_to_have_value(before)
    page.get_by_label("Keep it").check()
    kept = seed.input_value()
    draw(page, "a banana", Steps=3)
    expect(seed).to_have_value(kept)
    assert str(newest(server)["pictures"][0]["seed"]) == kept


def test_a_picture_is_changed_and_then_a_part_of_it(server: Serving, page: Page) -> None:
    draw(page, "a red apple", Steps=10)
    choose(page, "Use this one")
    expect(page.locator("#easel canvas").first).to_be_visible()
    page.wait_for_timeout(1500)  # the editor takes the picture in
    draw(page, "a green apple", Steps=10)
    first = newest(server)
    assert first["settings"]["image_sha256"]
    assert "mask_sha256" not in first["settings"]
    page.get_by_role("button", name="Brush").first.click()
    page.locator("#easel canvas").first.scroll_into_view_if_needed()
    box = page.locator("#easel canvas").first.bounding_box()
    assert box is not None
    middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(*middle)
    page.mouse.down()
    page.mouse.move(middle[0] + 60, middle[1] + 40, steps=8)
    page.mouse.up()
    page.wait_for_timeout(800)
    draw(page, "a star", Steps=10)
    second = newest(server)
    assert "mask_sha256" in second["settings"]
    picture = server.client.get(f"/api/pictures/{second['pictures'][0]['id']}").content
    with (
        Image.open(io.BytesIO(picture)) as image,
        Image.open(server.data / "inputs" / f"{second['id']}-image.png") as before,
        Image.open(server.data / "inputs" / f"{second['id']}-mask.png") as mask,
    ):
        painted = mask.convert("L").resize((64, 64)).filter(ImageFilter.MaxFilter(5))
        black = Image.new("RGB", (64, 64))
        now = Image.composite(black, image, painted)
        then = Image.composite(black, before.resize((64, 64), Image.Resampling.LANCZOS), painted)
        assert 0.005 < mask.convert("L").histogram()[255] / (mask.width * mask.height) < 0.5
        assert safelight.picture.largest_difference(now, then) == 0  # but for what was painted


def test_found_by_words_and_all_settings_brought_back(server: Serving, page: Page) -> None:
    server.finished(
        server.submit(
            prompt="a purple guitar", negative_prompt="blue", steps=7, seed=11, sampler="ddim"
        )
    )
    server.finished(server.submit(prompt="a pizza", steps=3))
    tab(page, "Find")
    page.get_by_label("Search").fill("purple")
    expect(page.locator(".find .status")).to_have_text("1 picture")
    shot(page, "find")
    choose(page, "All its settings", ".find")
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("a purple guitar")
    expect(page.get_by_label("Negative prompt")).to_have_value("blue")
    expect(page.get_by_label("number input for Steps")).to_have_value("7")
    expect(page.get_by_label("Seed", exact=True)).to_have_value("11")
    page.get_by_role("button", name="Draw").click()
    wanted = {"search": "purple", "status": "succeeded"}
    wait_for(lambda: len(server.client.get("/api/jobs", params=wanted).json()) == 2)
    first, again = server.client.get("/api/jobs", params=wanted).json()
    pixels = []
    for job in (first, again):
        data = server.client.get(f"/api/pictures/{job['pictures'][0]['id']}").content
        with Image.open(io.BytesIO(data)) as image:
            pixels.append(image.tobytes())
    assert pixels[0] == pixels[1]


def test_downloaded_and_deleted(server: Serving, page: Page, tmp_path: Path) -> None:
    draw(page, "a lemon", Steps=3)
    page.locator(".now .grid button").first.click()
    with page.expect_download() as download:
        page.locator("#picture").get_by_role("link", name="Download").click()
    download.value.save_as(tmp_path / "lemon.png")
    assert read_recipe(tmp_path / "lemon.png")["settings"]["prompt"] == "a lemon"
    job = newest(server)
    page.locator("#picture").get_by_role("button", name="Delete").click()
    page.locator("#picture").get_by_role("button", name="Delete for good?").click()
    expect(page.locator("#picture")).not_to_be_visible()
    wait_for(lambda: server.client.get(f"/api/jobs/{job['id']}").status_code == 404)


def graph() -> dict[str, str]:
    """A picture's texts as ComfyUI writes them."""
    nodes = {
        "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "a.safetensors"}},
        "2": {"class_type": "CLIPTextEncode", "inputs": {"text": "a violin", "clip": ["1", 1]}},
        "3": {"class_type": "CLIPTextEncode", "inputs": {"text": "grey", "clip": ["1", 1]}},
        "4": {
            "class_type": "EmptyLatentImage",
            "inputs": {"width": 64, "height": 64, "batch_size": 1},
        },
        "5": {
            "class_type": "KSampler",
            "inputs": {
                "seed": 77,
                "steps": 9,
                "cfg": 6.5,
                "sampler_name": "dpmpp_2m",
                "scheduler": "karras",
                "denoise": 1,
                "model": ["1", 0],
                "positive": ["2", 0],
                "negative": ["3", 0],
                "latent_image": ["4", 0],
            },
        },
    }
    links = [
        [1, 1, 0, 5, 0, "MODEL"],
        [2, 1, 1, 2, 0, "CLIP"],
        [3, 1, 1, 3, 0, "CLIP"],
        [4, 2, 0, 5, 1, "CONDITIONING"],
        [5, 3, 0, 5, 2, "CONDITIONING"],
        [6, 4, 0, 5, 3, "LATENT"],
    ]
    return {"prompt": json.dumps(nodes), "workflow": json.dumps({"links": links})}


THEIRS = {
    "parameters": "a violin\nNegative prompt: grey\nSteps: 9, Sampler: DPM++ 2M Karras, "
    "CFG scale: 6.5, Seed: 77, Size: 64x64"
}


@pytest.mark.parametrize("texts", [THEIRS, graph()], ids=["AUTOMATIC1111", "ComfyUI"])
def test_a_dropped_recipe_fills_the_form(page: Page, texts: dict[str, str], tmp_path: Path) -> None:
    written = PngImagePlugin.PngInfo()
    for name, text in texts.items():
        written.add_text(name, text)
    Image.new("RGB", (64, 64)).save(tmp_path / "theirs.png", pnginfo=written)
    tab(page, "Find")
    page.locator("#recipe input[type=file]").set_input_files(tmp_path / "theirs.png")
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("a violin")
    expect(page.get_by_label("Negative prompt")).to_have_value("grey")
    expect(page.get_by_label("number input for Steps")).to_have_value("9")
    expect(page.get_by_label("number input for Guidance")).to_have_value("6.5")
    expect(page.get_by_label("Seed", exact=True)).to_have_value("77")
    page.get_by_role("button", name="Size and schedule").click()
    expect(page.get_by_label("Schedule")).to_have_value("karras")


def test_a_picture_without_a_recipe_is_told(page: Page, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "plain.png")
    tab(page, "Find")
    page.locator("#recipe input[type=file]").set_input_files(tmp_path / "plain.png")
    expect(page.locator("#find-problem")).to_contain_text("carries no recipe")


def test_settings_compared_on_one_picture(server: Serving, page: Page) -> None:
    page.get_by_label("Prompt", exact=True).fill("a cat")
    tab(page, "Compare")
    page.get_by_label("Values of the columns").fill("ddim, euler")
    page.get_by_label("Values of the rows").fill("2, 3")
    page.get_by_role("button", name="Compare").click()
    expect(page.get_by_alt_text("The grid")).to_be_visible(timeout=60_000)
    grids = list((server.data / "grids").iterdir())
    assert read_recipe(grids[0])["grid"] == {"sampler": ["ddim", "euler"], "steps": [2, 3]}
    page.get_by_label("Values of the columns").fill("ddim, brush")
    page.get_by_role("button", name="Compare").click()
    expect(page.locator("#compare-problem")).to_contain_text("no sampler 'brush'")


def test_the_apis_page_asks_nobody_else(server: Serving, context: BrowserContext) -> None:
    watched = Watched(context, server.url)
    watched.page.goto(f"{server.url}/docs")
    expect(watched.page.get_by_text("/api/jobs", exact=True).first).to_be_visible()
    watched.close()


def test_one_picture_is_looked_into(page: Page) -> None:
    draw(page, "a cat above a pizza", Steps=5)
    choose(page, "Look inside")
    frame = page.frame_locator("#inside-frame iframe")
    expect(frame.get_by_role("heading", name="a cat above a pizza").first).to_be_visible(
        timeout=90_000
    )
    expect(frame.locator("input[type=range]").first).to_be_visible()


def test_the_example_is_trained(page: Page) -> None:
    tab(page, "Train")
    page.get_by_label("number input for Training steps").fill("20")
    page.get_by_role("button", name="Start").click()
    expect(page.get_by_role("img", name=re.compile("^Loss: "))).to_be_visible(timeout=120_000)
    expect(page.get_by_alt_text("Samples of the model")).to_be_visible(timeout=60_000)


def test_training_with_other_steps_is_another_training(server: Serving, page: Page) -> None:
    """It cannot go on from a plan of other steps, and nobody on this page could give a folder."""
    tab(page, "Train")
    for wrong in (None, "x", 10**9):
        assert event(server, "begin", wrong)["data"][0] == "Training steps must be 1 to 3000."
    page.get_by_label("number input for Training steps").fill("40")
    page.get_by_role("button", name="Start").click()
    expect(page.locator("#train-status")).to_contain_text(re.compile("Starting|step"))
    page.get_by_role("button", name="Stop").click()
    expect(page.locator("#train-status")).to_contain_text("Ended.", timeout=60_000)
    expect(page.locator("#train-problem")).to_have_text("")
    assert (server.data / "training" / "digits-40").is_dir()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nobody_is_kept_out(server: Serving, browser: Browser, scheme: Any) -> None:
    """axe-core finds no serious fault, and on a phone nothing is wider than the screen."""
    watched = Watched(opened(browser, color_scheme=scheme), server.url)
    page = watched.open()
    for name in ("Make", "Find", "Compare", "Inside", "Train"):
        tab(page, name)
        if name == "Make":
            page.get_by_role("button", name="Change a picture").click()
        page.wait_for_timeout(300)
        # What hangs on the colours is asked in both schemes, the rest in one.
        asked = {} if scheme == "light" else {"runOnly": ["color-contrast"]}
        found = Axe().run(page, options=asked).response["violations"]
        assert [v["id"] for v in found if v["impact"] in ("serious", "critical")] == []
    page.set_viewport_size({"width": 390, "height": 844})
    tab(page, "Make")
    draw(page, "W" * 160)
    page.locator(".now .grid button").first.click()
    for wide in ("document.documentElement", "document.querySelector('#picture')"):
        assert page.evaluate(f"{wide}.scrollWidth <= {wide}.clientWidth"), wide
    watched.close()


def test_by_keyboard_alone(server: Serving, page: Page) -> None:
    page.get_by_label("Prompt", exact=True).focus()
    page.keyboard.type("a key")
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.locator(".now .status")).to_have_text("“a key” is done.")
    page.locator(".now .grid button").first.focus()
    page.keyboard.press("Enter")
    expect(page.locator("#picture")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#picture")).not_to_be_visible()


SCRIPTS = [
    f"{before}<{tag} {handler}=\"document.title='owned'\">{after}"
    for before in ("", "'\">", "</p>", "{{value}}", "${1}")
    for tag in ("img src=x", "svg", "script>document.title='owned'</script", "iframe", "details")
    for handler in ("onerror", "onload")
    for after in ("", "</svg>")
]


def test_no_script_in_a_prompt_runs(server: Serving, page: Page) -> None:
    """In the live view, the gallery, the recipe, and a problem's sentence."""
    assert len(SCRIPTS) == 100
    for start in range(0, 100, 25):
        jobs = [server.submit(prompt=p, steps=1) for p in SCRIPTS[start : start + 25]]
        for job in jobs:
            server.finished(job)
    tab(page, "Find")
    expect(page.locator(".find .grid button").nth(55)).to_be_visible()
    for i in range(0, 56, 8):
        page.locator(".find .grid button").nth(i).click()
        page.keyboard.press("Escape")
    choose(page, "All its settings", ".find")
    page.get_by_label("Seed", exact=True).fill("<img src=x onerror=document.title=1>")
    page.get_by_role("button", name="Draw").click()
    expect(page.locator("#make-problem")).to_contain_text("seed must be")
    assert page.title() == "Safelight"


def test_a_request_names_no_file_and_no_address(server: Serving, tmp_path: Path) -> None:
    """Gradio's events take files by their paths: those alone that the page uploaded."""
    Image.new("RGB", (64, 64), "red").save(tmp_path / "private.png")
    theirs = [tmp_path / "private.png", server.data / "uploads" / ".." / "jobs.sqlite3"]
    for path in (*map(str, theirs), "/etc/hostname", "http://127.0.0.1:1/x.png"):
        named = {"path": path, "meta": {"_type": "gradio.FileData"}}
        editor = {"background": named, "layers": [], "composite": None}
        for problem in (
            submitted(server, picture=editor),
            submitted(server, prompt=named),
            event(server, "read", named)["error"],
            event(server, "of_prompt", named, 2)["error"],
        ):
            assert "not uploaded" in problem or "not fetched" in problem
    assert not [p for p in (server.data / "uploads").rglob("*") if p.name in ("hostname",)]


@pytest.mark.parametrize(
    "path",
    [
        "gradio_api/file=http://127.0.0.1:1/x",
        "gradio_api/file=%68ttp://127.0.0.1:1/x",
        "gradio_api/file=/etc/passwd",
        "gradio_api/proxy=http://127.0.0.1:1/x",
        "gradio_api/dev/reload",
        "gradio_api/vibe-code/",
        "gradio_api/component_server",
        "gradio_api/call/submit",
        "gradio_api/info",
        "monitoring/summary",
        "kept/../jobs.sqlite3",
        "kept/training/digits-20/checkpoint.pt",
    ],
)
def test_of_gradio_only_what_the_page_needs(server: Serving, path: str) -> None:
    assert server.client.get(f"/studio/{path}").status_code in (403, 404)
    assert server.client.post(f"/studio/{path}").status_code in (403, 404, 405)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"steps": "x"}, "steps must be"),
        ({"steps": 10**30}, "steps must be"),
        ({"count": None}, "count must be"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be"),
        ({"seed": "9" * 5000}, "seed must be"),
        ({"seed": str(2**63)}, "seed must be"),
        ({"seed": None}, "seed must be"),
        ({"sampler": [1]}, "sampler must be"),
        ({"width": 64.5}, "width must be"),
        ({"width": -8}, "width must be"),
        ({"prompt": "a\0b"}, "prompt must be"),
        ({"prompt": "\ud800"}, "prompt must be"),
        ({"prompt": {"a": 1}}, "prompt must be"),
        ({"steps": None, "width": None, "prompt": "שלום 🦊"}, ""),
    ],
)
def test_anything_in_a_field_is_told_in_a_sentence(
    server: Serving, fields: dict[str, Any], told: str
) -> None:
    problem = submitted(server, **fields)
    assert problem.startswith(told)
    assert bool(problem) == bool(told)


def test_a_recipe_of_anything_at_all() -> None:
    """Files come from strangers: what can be had is taken, and the rest is told."""
    values, told = form.shown({"prompt": "a cat", "seed": {}, "steps": -1, "sampler": [], "z": 1})
    assert values[0] == "a cat"
    assert [sentence.split()[0] for sentence in told] == ["seed", "steps", "sampler", "there"]
    values, told = form.shown(Request(sampler="ddim", eta=0.5, spacing="trailing").to_dict())
    assert {0.5, "trailing"} <= set(values)
    assert told == []


def test_a_sampler_that_is_not_had_is_told(tmp_path: Path) -> None:
    written = PngImagePlugin.PngInfo()
    written.add_text("parameters", "a cat\nSteps: 9, Sampler: Magic, Schedule type: Simple")
    Image.new("RGB", (64, 64)).save(tmp_path / "theirs.png", pnginfo=written)
    _, told = form.shown(recipe_settings(tmp_path / "theirs.png"))
    assert told[0].startswith("there is no sampler 'Magic'")
    assert told[1].startswith("schedule must be")


def test_a_changed_picture_is_made_again(server: Serving, page: Page) -> None:
    """Picture, mask, strength, and settings that are out of the way, all brought back."""
    square, mask = Image.new("RGB", (64, 64), "navy"), Image.new("L", (64, 64))
    for image, colour, box in ((square, "gold", (7, 9, 40, 33)), (mask, 255, (10, 0, 51, 37))):
        image.paste(colour, box)
    given = {}
    for name, image in (("image", square), ("mask", mask)):
        image.save(buffer := io.BytesIO(), "PNG")
        given[name] = base64.b64encode(buffer.getvalue()).decode()
    how = {"steps": 4, "seed": 3, "sampler": "ddim", "eta": 0.4, "spacing": "trailing"}
    first = server.finished(server.submit(prompt="a moon", strength=0.6, **how, **given))
    page.get_by_role("button", name="Change a picture").click()
    tab(page, "Find")
    page.get_by_label("Search").fill("moon")
    choose(page, "All its settings", ".find")
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("a moon")
    expect(page.locator("#easel canvas").first).to_be_visible()
    page.wait_for_timeout(2500)  # the editor takes the picture in
    page.get_by_role("button", name="Draw").click()
    wait_for(lambda: newest(server)["id"] != first["id"])
    again = server.finished(newest(server)["id"])
    settings = [{**job["settings"], "width": 64, "height": 64} for job in (first, again)]
    assert settings[0] == settings[1]
    pixels = [
        server.client.get(f"/api/pictures/{job['pictures'][0]['id']}").content
        for job in (first, again)
    ]
    one, other = (Image.open(io.BytesIO(data)) for data in pixels)
    assert safelight.picture.largest_difference(one, other) <= 1


def test_what_is_no_picture_is_told_and_a_large_one_made_fit(
    server: Serving, page: Page, tmp_path: Path
) -> None:
    (tmp_path / "notes.png").write_text("no picture")
    Image.new("RGB", (4096, 2048), "teal").save(tmp_path / "large.jpg")
    page.get_by_role("button", name="Change a picture").click()
    chosen = page.locator("#easel input[type=file]").first
    chosen.set_input_files(tmp_path / "notes.png")
    expect(
        page.get_by_text("“notes.png” is no picture that this browser can read.")
    ).to_be_visible()
    chosen.set_input_files(tmp_path / "large.jpg")
    expect(page.locator("#easel canvas").first).to_be_visible()
    page.wait_for_timeout(4000)  # the editor takes the picture in
    draw(page, "a teal sea", Steps=2)
    kept = server.data / "inputs" / f"{newest(server)['id']}-image.png"
    with Image.open(kept) as image:
        assert image.size == (2048, 1024)


def test_each_page_shows_its_own_first(
    server: Serving, context: BrowserContext, page: Page
) -> None:
    other = Watched(context, server.url)
    theirs = other.open()
    ask(theirs, "a cow", Steps=150, Pictures=16)
    expect(page.locator(".now .live .prompt")).to_have_text("a cow")
    ask(page, "a pig", Steps=150, Pictures=16)
    expect(page.locator(".now .live .prompt")).to_have_text("a pig")
    expect(theirs.locator(".now .live .prompt")).to_have_text("a cow")
    for shown in (page, theirs):
        shown.locator(".now .live").get_by_role("button", name="Cancel").click()
    expect(theirs.locator(".now .status")).to_have_text(re.compile("was cancelled"))
    other.close()


def test_a_failure_is_told_though_another_is_shown(server: Serving, page: Page) -> None:
    ask(page, "a slow one", Steps=150, Pictures=16)
    expect(page.locator(".now .live .prompt")).to_have_text("a slow one")
    ask(page, "a bad one", Steps=150)
    expect(page.locator(".now .waiting")).to_contain_text("a bad one")

    def failed(route: Any) -> None:
        jobs = route.fetch().json()
        for job in jobs:
            if job["settings"]["prompt"] == "a bad one":
                job |= {"status": "failed", "error": "the picture has values that are no numbers"}
        route.fulfill(json=jobs)

    page.route("**/api/jobs?limit=60", failed)
    expect(page.get_by_role("alert").get_by_text("“a bad one” failed: the picture")).to_be_visible()
    expect(page.locator(".now .live .prompt")).to_have_text("a slow one")
    page.unroute_all()
    server.client.delete(f"/api/jobs/{newest(server)['id']}")
    page.locator(".now .live").get_by_role("button", name="Cancel").click()


def test_two_pages_look_inside(server: Serving) -> None:
    """One after the other, since each loads the model; neither ends the other's."""
    shown: list[Any] = []

    def look() -> None:
        shown.append(event(server, "of_prompt", "a cat", 2)["data"])

    pages = [threading.Thread(target=look) for _ in range(2)]
    for one in pages:
        one.start()
    for one in pages:
        one.join(120)
    assert [data[:2] for data in shown] == [["", ""]] * 2
    for data in shown:
        assert server.client.get(f"/studio/kept/inside/{data[2]}.html").status_code == 200


def test_a_prompt_is_not_in_the_list_of_processes() -> None:
    async def run() -> tuple[bytes, str]:
        command = await Command.start("explain", "--model=none", "--", "a secret")
        try:
            listed = Path(f"/proc/{command._process.pid}/cmdline").read_bytes()
            await command.ended()
        finally:
            command.kill()
        return listed, command.last

    with ThreadPoolExecutor(1) as thread:  # this one has the browser's loop
        listed, last = thread.submit(asyncio.run, run()).result()
    assert b"safelight.studio.run" in listed
    assert b"secret" not in listed
    assert "none" in last  # it came to read the arguments


def test_what_runs_beside_the_server_ends_with_it(tmp_path: Path) -> None:
    """However the server ends: here by SIGKILL."""
    arguments = ["train", "unconditional", "digits", f"--out={tmp_path / 'out'}", "--steps=3000"]
    server = (
        "import asyncio, sys\nfrom safelight.studio.run import Command\n"
        "async def run():\n"
        "    command = await Command.start(*sys.argv[1:])\n"
        "    print(command._process.pid, flush=True)\n"
        "    await command.ended()\n"
        "asyncio.run(run())"
    )
    running = subprocess.Popen([sys.executable, "-c", server, *arguments], stdout=subprocess.PIPE)
    assert running.stdout is not None
    command = Path(f"/proc/{int(running.stdout.readline())}")
    wait_for(lambda: (tmp_path / "out" / "tensorboard").exists())
    running.kill()
    running.wait()
    running.stdout.close()
    wait_for(lambda: not command.exists() or "State:\tZ" in (command / "status").read_text())
    assert (tmp_path / "out" / "checkpoint.pt").exists()


def test_the_form_begins_with_what_a_model_was_taught(tmp_path: Path) -> None:
    with Serving(tmp_path, "--model", "embedded-fast") as server:
        wait_for(lambda: server.client.get("/studio/").status_code == 200)
        fields = dict[str, Any]()
        for one in server.client.get("/studio/config").json()["components"]:
            fields.setdefault(one["props"].get("label"), one["props"].get("value"))
    assert (fields["Sampler"], fields["Steps"], fields["Guidance scale"]) == ("ddim", 4, 1.0)


def test_a_model_without_words(tmp_path: Path) -> None:
    with Serving(tmp_path, "--model", "embedded-unconditional") as server:
        server.ready()
        wait_for(lambda: server.client.get("/studio/").status_code == 200)
        assert "from noise alone: leave both prompts" in submitted(server)
        assert submitted(server, prompt="") == ""
        assert server.finished(newest(server)["id"])["status"] == "succeeded"


@pytest.mark.parametrize(("command", "code"), [("studio", 0), ("serve", 2)])
def test_one_server_to_a_data_folder(server: Serving, command: str, code: int) -> None:
    """A second one would take what the first draws for left over. The studio leads to the first."""
    arguments = ["--data-dir", str(server.data), *(["--no-browser"] if code == 0 else ["--port=0"])]
    done = subprocess.run(
        [sys.executable, "-m", "safelight", command, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == code
    assert f"is served already, at {server.url}" in done.stderr


def test_what_was_typed_outlives_a_reload(page: Page) -> None:
    page.get_by_label("Prompt", exact=True).fill("words that took me long")
    page.reload()
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("words that took me long")


def test_it_goes_on_after_a_restart(server: Serving, context: BrowserContext) -> None:
    port = server.url.rsplit(":", 1)[1]
    page = Watched(context, server.url).open()  # whose requests fail while it is away
    ask(page, "a train", Steps=100)
    expect(page.locator(".now .live")).to_be_visible()
    server.process.send_signal(signal.SIGTERM)
    server.process.wait(30)
    expect(page.locator(".now .status")).to_contain_text("does not answer")
    server.start(port=port)
    expect(page.locator(".now .status")).to_have_text("“a train” is done.", timeout=120_000)
    assert newest(server)["status"] == "succeeded"
    wait_for(lambda: server.client.get("/studio/").status_code == 200)
    # A worker that dies is replaced, and its job drawn once more.
    ask(page, "a bus", Steps=150, Pictures=2)
    expect(page.locator(".now .live")).to_be_visible()
    os.kill(server.worker(), signal.SIGKILL)
    expect(page.locator(".now .status")).to_have_text("“a bus” is done.", timeout=120_000)
    assert [newest(server)["status"], newest(server)["attempts"]] == ["succeeded", 2]
    page.close()


class TestToken:
    def test_the_page_asks_for_it_once(self, tmp_path: Path, browser: Browser) -> None:
        with Serving(tmp_path, token="open sesame") as server:
            wait_for(lambda: server.client.get("/studio/").status_code == 200)
            own = opened(browser)
            watched = Watched(own, server.url)
            watched.page.goto(f"{server.url}/studio")
            watched.page.get_by_label("token").fill("wrong")
            watched.page.get_by_role("button", name="Enter").click()
            expect(watched.page.get_by_role("alert")).to_contain_text("not this server's token")
            watched.page.get_by_label("token").fill("open sesame")
            watched.page.get_by_role("button", name="Enter").click()
            expect(watched.page.get_by_label("Prompt", exact=True)).to_be_visible()
            cookie = own.cookies()[0]
            assert (cookie["httpOnly"], cookie["sameSite"]) == (True, "Strict")
            assert "sesame" not in cookie["value"]
            draw(watched.page, "a red apple", Steps=3)
