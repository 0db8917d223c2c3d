"""Compare: a labelled grid over two settings, drawn by jobs of the server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import gradio as gr

from safelight.compare import SETTINGS, Axis, Grid, requests, shown_scale, shrunk
from safelight.errors import SafelightError
from safelight.picture import open_picture
from safelight.result import Result
from safelight.server.decoding import Decoders
from safelight.server.hub import Hub
from safelight.server.jobs import Job, Status
from safelight.server.store import new_id
from safelight.studio import easel, entries
from safelight.studio.form import Form
from safelight.studio.parts import asker, kept, problem, progress, status
from safelight.studio.paths import folder_of
from safelight.studio.suits import suits_of

NOTHING = "nothing"


def compare(hub: Hub, form: Form, model: Any, decoders: Decoders) -> None:
    """Build the tab. form: the settings that all cells share. model: the chooser."""
    gr.HTML(
        "<p>Every cell starts from the same noise and uses the prompt and settings of Make. "
        "Separate values by commas, prompts by |.</p>"
    )
    with gr.Row():
        x = gr.Dropdown(list(SETTINGS), value="sampler", label="Columns")
        across = gr.Textbox("ddim, euler_a, dpmpp_2m", label="Values of the columns", scale=2)
    with gr.Row():
        y = gr.Dropdown([NOTHING, *SETTINGS], value="steps", label="Rows")
        down = gr.Textbox("5, 10, 20", label="Values of the rows", scale=2)
    with gr.Row():
        start = gr.Button("Compare", variant="primary", elem_id="compare")
        stop = gr.Button("Stop")
    told, doing, bar = problem("compare"), status("compare"), progress("compare")
    sheet = kept("compare", "The grid")
    running = gr.State([])

    async def draw(
        x: str, across: str, y: str, down: str, model: str, by: gr.Request, *values: Any
    ) -> AsyncIterator[tuple[Any, ...]]:
        """Yield problem, status, bar, sheet and the ids of the jobs."""
        jobs: list[Job] = []
        try:
            axes = [Axis.parse(f"{x}={across}")]
            if y != NOTHING:
                axes.append(Axis.parse(f"{y}={down}"))
            suits = await suits_of(hub, model)
            async with easel.turn(values, decoders, asker(by).name, form.editors):
                given = await easel.read_easels(
                    values, decoders, asker(by).name, suits, form.editors
                )
                asked = await asyncio.to_thread(entries.request, *given, suits=suits)
                base = asked.replace(count=1)
                prompt = base.prompt
                cells = [request for row in requests(base, *axes) for request in row]
                del given, asked, base  # pictures are not held while the cells are drawn
                while cells:
                    request = cells.pop(0)
                    how = {"client": "compare", "owner": asker(by).owner, "model": model}
                    jobs.append(await hub.submit(request, **how))
                    del request
        except SafelightError as error:
            for job in jobs:  # the whole grid, or nothing
                await hub.cancel(job.id)
            yield str(error), "", "", gr.skip(), []
            return
        prompts = "several prompts" if "prompt" in (x, y) else f"“{_short(prompt)}”"
        ids = [job.id for job in jobs]
        waits = [asyncio.ensure_future(hub.wait(job_id)) for job_id in ids]
        pending = set(waits)
        while pending:
            done = len(waits) - len(pending)
            doing_now = f"Drawing {prompts}: {done} of {len(waits)} cells are done."
            yield "", doing_now, done / len(waits) or 0.001, gr.skip(), ids
            _, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        try:
            made = [wait.result() for wait in waits]
            async with decoders.handling.turn(asker(by).name):
                folder = folder_of(asker(by))
                grid, warnings = await asyncio.to_thread(_sheet, hub, made, axes, folder)
        except SafelightError as error:
            yield str(error), "", "", gr.skip(), []
            return
        notes = f" Note: {'; '.join(warnings)}." if warnings else ""
        yield "", f"Done: {prompts}, {len(waits)} cells.{notes}", "", grid, []

    async def cancel(ids: list[str], by: gr.Request) -> None:
        for job_id in ids:
            await hub.cancel(job_id, owner=asker(by).sees)

    start.click(
        draw,
        [x, across, y, down, model, *form.fields],
        [told, doing, bar, sheet, running],
        show_progress="hidden",
        concurrency_limit=None,  # another browser need not wait
    )
    stop.click(cancel, running, show_progress="hidden")


def _short(prompt: str) -> str:
    return prompt if len(prompt) <= 80 else f"{prompt[:80]}…"


def _sheet(hub: Hub, jobs: list[Job], axes: list[Axis], owner: str) -> tuple[str, list[str]]:
    """Write the grid into the owner's folder of the data folder. Return its path there and its
    warnings.

    Raises SafelightError if a cell was not drawn.
    """
    for job in jobs:
        if job.status != Status.SUCCEEDED:
            why = job.error or "it was cancelled"
            raise SafelightError(f"a cell of the grid was not drawn: {why}")
    columns = len(axes[0].values)
    # Shrunk one by one: whole photos, as those around a mask are, would take much memory.
    sizes = [(job.pictures[0].width, job.pictures[0].height) for job in jobs]
    scale = shown_scale(sizes)
    results = [_result(hub, job, scale) for job in jobs]
    rows = [results[i : i + columns] for i in range(0, len(results), columns)]
    folder = hub.root / "grids" / owner
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{new_id()}.png"
    grid = Grid(axes[0], axes[1] if len(axes) > 1 else None, rows, sizes[0])
    grid.save(path)
    return f"grids/{owner}/{path.name}", grid.warnings


def _result(hub: Hub, job: Job, scale: float) -> Result:
    """Return the result of a cell's job. scale: its picture is shrunk to it."""
    picture = job.pictures[0]
    data = hub.picture_bytes(picture.id)
    if data is None:
        raise SafelightError("a cell of the grid was deleted before the last was drawn")
    recipe = picture.recipe
    return Result(
        images=[shrunk(open_picture(data), scale)],
        seeds=[picture.seed],
        settings=recipe["settings"],
        model=recipe["model"]["name"],
        sha256=recipe["model"]["sha256"],
        device=recipe["device"],
        dtype=recipe["dtype"],
        warnings=recipe["warnings"],
    )
