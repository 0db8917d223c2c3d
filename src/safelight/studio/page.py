"""The page: its tabs, and the actions that lead from one tab to another."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gradio as gr
from gradio.themes import Base
from PIL import Image

from safelight.errors import SafelightError
from safelight.picture import open_picture
from safelight.request_basics import draw_seed
from safelight.request_pictures import (
    REFERENCES,
    by_setting,
    digest_key,
    inputs_in,
    inputs_of,
    setting_of,
)
from safelight.server.decoding import Decoders
from safelight.server.hub import Hub
from safelight.studio import easel, entries, nets
from safelight.studio.compare import compare
from safelight.studio.form import Form
from safelight.studio.inside import Inside, steps_of
from safelight.studio.parts import HEAD, STYLE, asker, chooser, gallery, now, problem
from safelight.studio.suits import EXAMPLE, Suits, suits_of
from safelight.studio.train import Train

_THEME = Base(
    primary_hue="orange",
    neutral_hue="stone",
    font=["system-ui", "sans-serif"],
    font_mono=["ui-monospace", "monospace"],
).set(
    # Gradio's own orange and grey have too little contrast (WCAG 2.2, 1.4.3).
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
RECIPE = "safelight.studio.recipes:settings_in"
DELETED = "This picture was deleted."
LOOK: dict[str, Any] = {"theme": _THEME, "css": STYLE, "head": HEAD}


def blocks(hub: Hub, defaults: dict[str, Any], decoders: Decoders) -> gr.Blocks:
    """Return the page of this server.

    defaults: what its model says it draws best with. decoders: read what
    is uploaded.
    """
    suits = Suits.of(hub.names, None, defaults)
    with gr.Blocks(title="Safelight", analytics_enabled=False, fill_width=True) as page:
        gr.HTML("<h1>Safelight</h1>", elem_id="head")
        model = chooser(hub.catalogue.info.name)
        with gr.Tabs() as tabs:
            with gr.Tab("Make", id="make"):
                form, drawn = _make(hub, model, suits, decoders)
            with gr.Tab("Find", id="find") as find:
                found, dropped, find_told = _find()
            with gr.Tab("Compare", id="compare"):
                compare(hub, form, model, decoders)
            with gr.Tab("Inside", id="inside"):
                inside = Inside(hub, model, suits)
            with gr.Tab("Train", id="train") as training:
                train = Train(hub)

        settled = [tabs, model, form.problem, form.keep]
        settled += [
            form.change,
            form.edit,
            form.guide,
            form.prompted,
            form.words,
            inside.steps,
            *form.fields,
        ]

        async def settle(
            settings: dict[str, Any],
            name: str,
            stored: Mapping[str, Image.Image | None] = MappingProxyType({}),
            controlnets: Sequence[str] = (),
        ) -> list[Any]:
            """Return updates that fill the form with a recipe, and say what cannot be used.

            name: the model that is to draw. stored: the recipe's pictures, by their inputs.
            controlnets: the names of the recipe's.
            """
            suits = await suits_of(hub, name)
            settings, stored, moved = nets.arranged(settings, stored, controlnets, suits)
            values, told = entries.shown(settings, suits)
            told += moved
            asked = {setting_of(one) for one in inputs_in(settings)}
            lost = {setting_of(one) for one in inputs_in(settings) if stored.get(one) is None}
            guided = suits.guided and "control_image" in asked
            if guided:
                told[:0] = nets.lost(settings, stored, suits)
            prompted = suits.prompted and "ip_adapter_image" in asked
            if prompted and "ip_adapter_image" in lost:
                told.insert(0, "the picture of the prompt is not stored: add it below")
            edited = suits.edits and REFERENCES in asked
            if edited and REFERENCES in lost:
                told.insert(0, "the pictures to edit are not stored: add them below")
            # Of a picture to start from, AUTOMATIC1111's text has the strength alone.
            started = "image" in asked or settings.get("strength") is not None
            if started and stored.get("image") is None:
                told.insert(0, "the picture to start from is not stored: add it below")
            guide: dict[str, Any] = form.guiding(suits) | ({"open": True} if guided else {})
            shown: dict[str, Any] = form.prompting(suits) | ({"open": True} if prompted else {})
            edit: dict[str, Any] = form.editing(suits) | ({"open": True} if edited else {})
            references = [*by_setting(stored).get(REFERENCES, ())] if edited else None
            easels = [references, *easel.on_easel(stored.get("image"), stored.get("mask"))]
            # A form has as many editors as the server has ControlNets.
            for one in (*inputs_of("control_image")[: len(form.controls)], "ip_adapter_image"):
                easels += easel.on_easel(stored.get(one))
            return [
                gr.Tabs(selected="make"),
                name,
                f"Not used from this recipe: {'; '.join(told)}" if told else "",
                True,
                gr.Accordion(open=True) if started else gr.skip(),
                gr.update(**edit),
                gr.update(**guide),
                gr.update(**shown),
                gr.Accordion(open=True) if entries.says_more(settings) else gr.skip(),
                steps_of(suits),
                *form.filled([*values, *easels], suits),
            ]

        async def choose(name: Any, fast: Any) -> list[Any]:
            """Let the form show what suits the model that was chosen, at the level of `fast`."""
            try:
                suits = await suits_of(hub, name)
                looks = [gr.update(**look) for look in form.looks(suits, fast)]
                return ["", steps_of(suits), *form.best_of(suits, fast), *looks]
            except SafelightError as error:
                return [str(error), *[gr.skip()] * (len(suited) - 1)]

        async def recall(now: str, event: gr.EventData, by: gr.Request) -> list[Any]:
            """Fill the form with all settings of a picture, its model and what it started from."""
            job, picture = await _picture(hub, event, by)
            start = {
                name: await _stored(decoders, by, hub.files.input, job.id, name)
                for name in inputs_in(job.settings)
            }
            names = nets.recorded(picture.recipe)
            try:
                name = await hub.find_model(job.model)
                return await settle(picture.recipe["settings"], name, start, names)
            except SafelightError as error:  # its model is not there any more
                filled = await settle(picture.recipe["settings"], now, start, names)
                filled[2] = f"{error}. {filled[2]}".strip()
                return filled

        async def use(event: gr.EventData, by: gr.Request) -> list[Any]:
            """Start from a picture, with its prompt and size."""
            picture, image = await opened(event, by)
            return [
                gr.Tabs(selected="make"),
                gr.Accordion(open=True),
                # Without the styles: those in the form are applied again.
                picture.recipe.get("template", picture.recipe["settings"]).get("prompt", ""),
                picture.width,
                picture.height,
                *easel.on_easel(image),
            ]

        async def read_alone(event: gr.EventData, by: gr.Request) -> list[Any]:
            """Make a picture the control image, or the prompt's."""
            _, image = await opened(event, by)
            return [gr.Tabs(selected="make"), gr.Accordion(open=True), *easel.on_easel(image)]

        async def edit(given: Any, event: gr.EventData, by: gr.Request) -> list[Any]:
            """Add a picture to those that are to be edited."""
            _, image = await opened(event, by)
            pictures = [*easel.files_of(given), image]
            return [gr.Tabs(selected="make"), gr.Accordion(open=True), pictures]

        async def opened(event: gr.EventData, by: gr.Request) -> tuple[Any, Image.Image]:
            """Return the picture that an event names, and what it shows."""
            _, picture = await _picture(hub, event, by)

            def read() -> Image.Image | None:
                data = hub.picture_bytes(picture.id)
                return None if data is None else open_picture(data)

            image = await _stored(decoders, by, read)
            if image is None:
                raise gr.Error(DELETED, print_exception=False)
            return picture, image

        async def look(event: gr.EventData, by: gr.Request) -> AsyncIterator[list[Any]]:
            job, picture = await _picture(hub, event, by)
            settings = dict(picture.recipe["settings"])
            prompt = settings.pop("prompt", "")
            settings.pop("count", None)
            with tempfile.TemporaryDirectory() as folder:
                paths: dict[str, Any] = {}
                for name in inputs_in(settings):
                    del settings[digest_key(name)]
                    where = hub.files.input_path, job.id, name, Path(folder)
                    paths[name] = await _stored(decoders, by, *where)
                settings |= by_setting(paths)
                async for update in inside.show(prompt, settings, job.model, by):
                    yield [gr.Tabs(selected="inside"), *update]

        async def read(path: str | None, now: str, by: gr.Request) -> list[Any]:
            """Fill the form with the settings stored in a dropped picture."""
            if path is None:
                return ["", *[gr.skip()] * len(settled)]
            try:
                found = await easel.read_file(decoders, RECIPE, path, asker(by).name)
                filled = await settle(found["settings"], now, controlnets=found["controlnets"])
                return ["", *filled]
            except SafelightError as error:
                return [str(error), *[gr.skip()] * len(settled)]

        quiet: dict[str, Any] = {"show_progress": "hidden"}
        for shown in (drawn, found):
            shown.recall(recall, model, settled, **quiet)
            used = [tabs, form.change, form.prompt, form.width, form.height, *form.easel]
            shown.use(use, None, used, **quiet)
            edited = [tabs, form.edit, form.references]
            shown.edit(edit, form.references, edited, **quiet)
            shown.guide(read_alone, None, [tabs, form.guide, *form.control_easels[0]], **quiet)
            shown.prompt(read_alone, None, [tabs, form.prompted, *form.prompt_easel], **quiet)
            shown.inside(look, None, [tabs, *inside.outputs], concurrency_limit=None, **quiet)
        suited = [form.problem, inside.steps, *form.best, *form.adapted]
        # If several models are chosen in a row, the last one counts.
        model.choose(choose, [model, form.fast], suited, trigger_mode="always_last", **quiet)
        dropped.change(read, [dropped, model], [find_told, *settled], **quiet)
        # Any new value loads the gallery. This runs in the browser alone: if two events begin at
        # once, Gradio's client may lose the answer to the second when it closes their shared
        # stream.
        find.select(None, None, found, js="() => String(Math.random())")
        training.select(train.look, None, train.outputs, show_progress="hidden")
    return page


def _make(hub: Hub, model: Any, suits: Suits, decoders: Decoders) -> tuple[Form, Any]:
    """Build the form and the live view. model: the chooser. suits: of the one chosen first."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=5, min_width=320):
            form = Form(suits)
        with gr.Column(scale=5, min_width=320, elem_classes="beside"):
            drawn = now()

    seed_at = form.fields.index(form.seed)

    async def submit(
        keep: bool, used: str | None, model: str, by: gr.Request, *values: Any
    ) -> tuple[Any, ...]:
        """Submit a job. Returns its id, its seed (twice: shown and remembered), problem and status.

        used: the seed of the last job. Unless `keep`, it is replaced by a new one; any other seed
        in the field was chosen by the user.
        """
        given = list(values)
        if not keep and given[seed_at] == used:
            given[seed_at] = str(draw_seed())
        try:
            suits = await suits_of(hub, model)
            async with easel.turn(given, decoders, asker(by).name, form.editors):
                given = await easel.read_easels(
                    given, decoders, asker(by).name, suits, form.editors
                )
                request = await asyncio.to_thread(entries.request, *given, suits=suits)
                owner = asker(by).owner
                job = await hub.submit(request, client="studio", owner=owner, model=model)
        except SafelightError as error:
            return gr.skip(), gr.skip(), gr.skip(), str(error), ""
        example = request.prompt == EXAMPLE and entries.empty(given[0])
        told = f"The prompt is empty, so this draws the example: “{EXAMPLE}”."
        return job.id, str(request.seed), str(request.seed), "", told if example else ""

    async def level(fast: Any, model: Any) -> list[Any]:
        """Show the sampler, the steps and where guidance begins that a level stands for."""
        try:
            return ["", *form.level_of(await suits_of(hub, model), fast)]
        except SafelightError as error:
            return [str(error), *[gr.skip()] * len(form.levelled)]

    form.fast.input(
        level,
        [form.fast, model],
        [form.problem, *form.levelled],
        show_progress="hidden",
        trigger_mode="always_last",
    )
    used = gr.State(form.seed.value)  # every page begins with this one, which nobody chose
    for event in (form.draw.click, form.prompt.submit):
        event(
            submit,
            [form.keep, used, model, *form.fields],
            [drawn, form.seed, used, form.problem, form.status],
            show_progress="hidden",
            concurrency_limit=None,
        )
    return form, drawn


def _find() -> tuple[Any, Any, Any]:
    """Build the gallery, the field for a dropped picture, and the line for problems."""
    with gr.Row(equal_height=False, elem_id="finding"):
        with gr.Column(scale=7, min_width=320):
            found = gallery()
        with gr.Column(scale=3, min_width=260):
            dropped = gr.File(
                label="Drop a picture to read its settings",
                file_types=["image"],
                type="filepath",
                height=160,
                elem_id="recipe",
            )
            told = problem("find")
    return found, dropped, told


async def _stored(decoders: Decoders, by: gr.Request, read: Callable[..., Any], *given: Any) -> Any:
    """Return what a function reads from the storage, which may be silent for long.

    Clients have turns at it, so that none takes all threads. The page shows what is wrong.
    """
    try:
        async with decoders.handling.turn(asker(by).name):
            return await asyncio.to_thread(read, *given)
    except SafelightError as error:
        raise gr.Error(str(error), print_exception=False) from None


async def _picture(hub: Hub, event: gr.EventData, by: gr.Request) -> tuple[Any, Any]:
    """Return the job and the picture that an event of the page names."""
    given = event._data
    picture_id = str(given.get("id", "")) if isinstance(given, dict) else ""
    job = await hub.job_of(picture_id, owner=asker(by).sees)
    if job is None:
        raise gr.Error(DELETED, print_exception=False)
    return job, next(picture for picture in job.pictures if picture.id == picture_id)
