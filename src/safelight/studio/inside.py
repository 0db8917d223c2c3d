"""Inside: every step of one picture, as `safelight explain` shows it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import gradio as gr

from safelight.errors import SafelightError
from safelight.request import MAX_PROMPT, Request
from safelight.request_pictures import PICTURES
from safelight.server.hub import Hub
from safelight.server.store import new_id
from safelight.server.wording import public
from safelight.studio.parts import asker, plain, problem, status
from safelight.studio.paths import KEPT_AT, folder_of
from safelight.studio.run import Command, model_options, options
from safelight.studio.suits import Suits, suits_of
from safelight.weights.find import Source

KEPT = 20
"""Number of pages that are kept; older ones can be drawn again."""

MAX_WAITING = 8
"""Pages that may wait for the one that looks inside."""

STEPS = 20
"""Steps of a picture that is looked into, if the model does not say."""


def steps_of(suits: Suits) -> int:
    """Return the steps that a picture of a model is looked into with."""
    return suits.defaults.get("steps") or STEPS


class Inside:
    """Builds the tab."""

    def __init__(self, hub: Hub, model: Any, suits: Suits) -> None:
        """model: the chooser. suits: of the model that is chosen first."""
        self._hub = hub
        self._turn = asyncio.Lock()
        self._waiting = 0
        self._mine: tuple[str | None, Command] | None = None
        with gr.Row():
            self.prompt = gr.Textbox(
                "a red apple",
                label="Prompt to look into",
                max_length=MAX_PROMPT,
                scale=4,
            )
            self.steps = gr.Slider(
                1, 50, steps_of(suits), step=1, label="Steps", scale=2, elem_id="inside-steps"
            )
            self.look = gr.Button("Look inside", variant="primary", scale=1, elem_id="look")
        plain(self.prompt, self.steps)
        gr.HTML(
            "<p>Draws a picture and records every step. To record a picture that you have, open it "
            "under Make or Find and choose “Look inside”.</p>"
        )
        self.status = status("inside")
        self.problem = problem("inside")
        self.frame = gr.HTML(
            "",
            html_template='{{#if value}}<iframe src="' + KEPT_AT + 'inside/{{value}}.html" '
            'title="How the picture developed" sandbox="allow-scripts"></iframe>{{/if}}',
            js_on_load=None,
            elem_id="inside-frame",
        )
        self.outputs: list[Any] = [self.status, self.problem, self.frame]

        async def of_prompt(
            prompt: str, steps: int, model: str, by: gr.Request
        ) -> AsyncIterator[tuple[Any, ...]]:
            try:
                suits = await suits_of(hub, model)
            except SafelightError as error:
                yield "", str(error), gr.skip()
                return
            wanted = {"sampler": "dpmpp_2m", **suits.defaults, "steps": steps, "seed": 0}
            if not suits.uses_prompt:
                wanted["unconditional"] = True
            async for update in self.show(prompt, wanted, model, by):
                yield update

        for event in (self.look.click, self.prompt.submit):
            event(
                of_prompt,
                [self.prompt, self.steps, model],
                self.outputs,
                show_progress="hidden",
                concurrency_limit=None,
            )

    async def show(
        self, prompt: str, settings: dict[str, Any], model: str | None, by: gr.Request
    ) -> AsyncIterator[tuple[Any, Any, Any]]:
        """Yield status, problem and frame. settings: of a Request, with pictures as paths. model:
        None for the server's own. by: the page that asks.
        """
        try:
            Request(prompt=prompt, **{k: v for k, v in settings.items() if k not in PICTURES})
            served = self._hub.catalogue.served
            source = await asyncio.to_thread(lambda: served.source(served.find(model)))
        except SafelightError as error:
            yield "", str(error), gr.skip()
            return
        if self._turn.locked():
            if self._waiting >= MAX_WAITING:
                yield "", f"{MAX_WAITING} pages wait to look inside: try again later.", gr.skip()
                return
            if self._mine is not None and self._mine[0] == by.session_hash:
                self._mine[1].kill()  # a new request replaces the page's old one
            yield "Another page is looking inside. This one is next.", "", gr.skip()
        self._waiting += 1
        try:
            await self._turn.acquire()  # each loads the model again
        finally:
            self._waiting -= 1
        try:
            async for update in self._explained(prompt, settings, source, by):
                yield update
        finally:
            self._turn.release()

    async def _explained(
        self, prompt: str, settings: dict[str, Any], source: Source | None, by: gr.Request
    ) -> AsyncIterator[tuple[Any, Any, Any]]:
        folder = self._hub.root / "inside" / folder_of(asker(by))
        folder.mkdir(parents=True, exist_ok=True)
        name = new_id()
        yield (
            "Drawing the picture again and recording every step. The model is loaded once more for "
            "this, so a large one takes minutes.",
            "",
            gr.skip(),
        )
        # With this option explain draws choices. A finished picture's choices are already in its
        # prompt.
        drawn = settings.get("dynamic_prompts")
        wildcards = {"wildcards": self._hub.settings.wildcards_dir if drawn else None}
        command = await Command.start(
            "explain",
            f"--out={folder / name}.html",
            *model_options(self._hub.settings, source),
            *options({**wildcards, **settings}),
            "--",
            prompt,
        )
        self._mine = by.session_hash, command
        try:
            done = await command.ended()
        finally:
            command.kill()  # if the page was closed
        if not done:
            yield "", f"This picture cannot be shown: {public(command.last)}", gr.skip()
            return
        for old in sorted(folder.glob("*.html"), key=lambda path: path.stat().st_mtime)[:-KEPT]:
            old.unlink(missing_ok=True)
        yield "", "", f"{folder.name}/{name}"
