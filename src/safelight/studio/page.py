"""The page: its tabs, and what leads from one to another."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import gradio as gr
from gradio.themes import Base
from PIL import Image

from safelight.errors import SafelightError
from safelight.picture import open_picture
from safelight.request import draw_seed
from safelight.server.hub import Hub
from safelight.studio import form as forms
from safelight.studio.compare import compare
from safelight.studio.inside import PICTURES, Inside
from safelight.studio.parts import HEAD, STYLE, gallery, now, problem
from safelight.studio.recipes import recipe_settings
from safelight.studio.train import Train

_THEME = Base(
    primary_hue="orange",
    neutral_hue="stone",
    font=["system-ui", "sans-serif"],
    font_mono=["ui-monospace", "monospace"],
).set(
    # Gradio's own orange and grey are too pale to be read by everyone (WCAG 2.2, 1.4.3).
    color_accent="#b23c0b",
    button_primary_background_fill="#b23c0b",
    button_primary_background_fill_dark="#b23c0b",
    button_primary_background_fill_hover="#93310a",
    button_primary_background_fill_hover_dark="#93310a",
    body_text_color_subdued="#57534e",
    body_text_color_subdued_dark="#d6d3d1",
    block_info_text_color="#57534e",
    block_info_text_color_dark="#d6d3d1",
    block_label_text_color="#44403c",
    block_label_text_color_dark="#e7e5e4",
    block_title_text_color="#44403c",
    block_title_text_color_dark="#e7e5e4",
    input_placeholder_color="#6b6560",
    input_placeholder_color_dark="#bdb7b1",
)
DELETED = "This picture was deleted."
LOOK: dict[str, Any] = {"theme": _THEME, "css": STYLE, "head": HEAD}


def blocks(hub: Hub, defaults: dict[str, Any]) -> gr.Blocks:
    """Return the page of a server. defaults: what its model draws best with."""
    with gr.Blocks(title="Safelight", analytics_enabled=False, fill_width=True) as page:
        gr.HTML("<h1>Safelight</h1>")
        with gr.Tabs() as tabs:
            with gr.Tab("Make", id="make"):
                form, drawn = _make(hub, defaults)
            with gr.Tab("Find", id="find") as find:
                found, dropped, find_told = _find()
            with gr.Tab("Compare", id="compare"):
                compare(hub, form)
            with gr.Tab("Inside", id="inside"):
                inside = Inside(hub, defaults)
            with gr.Tab("Train", id="train") as training:
                train = Train(hub)

        settled = [tabs, form.problem, form.keep, form.change, *form.fields]

        def settle(
            settings: dict[str, Any], image: Image.Image | None, mask: Image.Image | None = None
        ) -> list[Any]:
            """A recipe in the form, and what of it cannot be had."""
            values, told = forms.shown(settings)
            if image is None and settings.get("image_sha256") is not None:
                told.append("it began with a picture, which is not here: put that in below")
            return [
                gr.Tabs(selected="make"),
                f"Of this recipe: {'; '.join(told[:3])}" if told else "",
                True,
                gr.Accordion(open=True) if "image_sha256" in settings else gr.skip(),
                *values,
                *forms.on_easel(image, mask),
            ]

        async def recall(event: gr.EventData) -> list[Any]:
            """All settings of a picture, and what it started from."""
            job, picture = await _picture(hub, event)
            start = [await asyncio.to_thread(hub.files.input, job.id, n) for n in PICTURES]
            return settle(picture.recipe["settings"], *start)

        async def use(event: gr.EventData) -> list[Any]:
            """A picture to start from, with its prompt and size."""
            _, picture = await _picture(hub, event)
            path = hub.picture_file(picture.id)
            if path is None:
                raise gr.Error(DELETED, print_exception=False)
            return [
                gr.Tabs(selected="make"),
                gr.Accordion(open=True),
                picture.recipe["settings"].get("prompt", ""),
                picture.width,
                picture.height,
                *forms.on_easel(await asyncio.to_thread(open_picture, path)),
            ]

        async def look(event: gr.EventData, by: gr.Request) -> AsyncIterator[list[Any]]:
            job, picture = await _picture(hub, event)
            settings = dict(picture.recipe["settings"])
            prompt = settings.pop("prompt", "")
            for name in PICTURES:
                if settings.pop(f"{name}_sha256", None) is not None:
                    settings[name] = hub.files.input_path(job.id, name)
            settings.pop("count", None)
            async for update in inside.show(prompt, settings, by):
                yield [gr.Tabs(selected="inside"), *update]

        def read(path: str | None) -> list[Any]:
            """A dropped picture's recipe into the form."""
            if path is None:
                return ["", *[gr.skip()] * len(settled)]
            try:
                return ["", *settle(recipe_settings(path), None)]
            except SafelightError as error:
                return [str(error), *[gr.skip()] * len(settled)]

        quiet: dict[str, Any] = {"show_progress": "hidden"}
        for shown in (drawn, found):
            shown.recall(recall, None, settled, **quiet)
            easel = [tabs, form.change, form.prompt, form.width, form.height, *form.fields[-2:]]
            shown.use(use, None, easel, **quiet)
            shown.inside(look, None, [tabs, *inside.outputs], concurrency_limit=None, **quiet)
        dropped.change(read, dropped, [find_told, *settled], **quiet)
        # Any new value loads the gallery. In the page alone: of two events that begin at once, the
        # answer to the second may be lost by Gradio's client, which closes their one stream.
        find.select(None, None, found, js="() => String(Math.random())")
        training.select(train.look, None, train.outputs, show_progress="hidden")
    return page


def _make(hub: Hub, defaults: dict[str, Any]) -> tuple[forms.Form, Any]:
    """The form, and what is drawn just now."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=5, min_width=320):
            form = forms.Form(defaults)
        with gr.Column(scale=5, min_width=320):
            drawn = now()

    async def submit(keep: bool, *values: Any) -> tuple[Any, Any, str]:
        """The new job's id, the next seed, the problem."""
        try:
            request = await asyncio.to_thread(forms.request, *values, hub=hub)
            job = await hub.submit(request, client="studio")
        except SafelightError as error:
            return gr.skip(), gr.skip(), str(error)
        return job.id, gr.skip() if keep else str(draw_seed()), ""

    for event in (form.draw.click, form.prompt.submit):
        event(
            submit,
            [form.keep, *form.fields],
            [drawn, form.seed, form.problem],
            show_progress="hidden",
            concurrency_limit=None,
        )
    return form, drawn


def _find() -> tuple[Any, Any, Any]:
    """The gallery, where a picture is dropped for its recipe, and where problems are told."""
    with gr.Row(equal_height=False, elem_id="finding"):
        with gr.Column(scale=7, min_width=320):
            found = gallery()
        with gr.Column(scale=3, min_width=260):
            dropped = gr.File(
                label="Drop a PNG to read its recipe",
                file_types=["image"],
                type="filepath",
                height=160,
                elem_id="recipe",
            )
            told = problem("find")
    return found, dropped, told


async def _picture(hub: Hub, event: gr.EventData) -> tuple[Any, Any]:
    """The job and the picture that an event of the page speaks of."""
    given = event._data
    picture_id = str(given.get("id", "")) if isinstance(given, dict) else ""
    job = await hub.job_of(picture_id)
    if job is None:
        raise gr.Error(DELETED, print_exception=False)
    return job, next(picture for picture in job.pictures if picture.id == picture_id)
