"""See inside: how one picture came to be, as `safelight explain` shows it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import gradio as gr

from safelight.server.hub import Hub
from safelight.server.store import new_id
from safelight.studio.parts import problem, said
from safelight.studio.run import Command, model_options, options

KEPT = 20
"""Pages that stay; older ones can be made again."""


class Inside:
    """Made within a tab."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._command: Command | None = None
        with gr.Row():
            self.prompt = gr.Textbox(
                "a cat above a pizza", label="Prompt to look into", max_length=16384, scale=4
            )
            self.steps = gr.Slider(1, 50, 20, step=1, label="Steps", scale=2)
            self.look = gr.Button("Look inside", variant="primary", scale=1, elem_id="look")
        gr.HTML(
            "<p>A picture is drawn, and every step of its way is kept. Or open one under Make or "
            "Find, and choose “Look inside” there.</p>"
        )
        self.status = said("inside")
        self.problem = problem("inside")
        self.frame = gr.HTML(
            "",
            html_template='{{#if value}}<iframe src="/studio/kept/inside/{{value}}.html" '
            'title="How the picture came to be" sandbox="allow-scripts"></iframe>{{/if}}',
            js_on_load=None,
            elem_id="inside-frame",
        )
        self.outputs = [self.status, self.problem, self.frame]

        async def of_prompt(prompt: str, steps: int) -> AsyncIterator[tuple[Any, ...]]:
            wanted = {"steps": int(steps), "sampler": "dpmpp_2m", "seed": 0}
            async for update in self.show(prompt, wanted):
                yield update

        for event in (self.look.click, self.prompt.submit):
            event(of_prompt, [self.prompt, self.steps], self.outputs, show_progress="hidden")

    async def show(
        self, prompt: str, settings: dict[str, Any]
    ) -> AsyncIterator[tuple[Any, Any, Any]]:
        """Yields status, problem and frame. settings: of a Request; pictures as paths."""
        if self._command is not None:
            self._command.kill()  # whoever asks anew does not want the old one
        folder = self._hub.files.root / "inside"
        folder.mkdir(exist_ok=True)
        name = new_id()
        yield "It is drawn once more, and every step is kept: some seconds.", "", gr.skip()
        command = self._command = await Command.start(
            "explain",
            f"--out={folder / name}.html",
            *model_options(self._hub.settings),
            *options(settings),
            "--",
            prompt,
        )
        done = await command.ended()
        if self._command is not command:
            return
        if not done:
            yield "", f"It cannot be shown: {command.last}", gr.skip()
            return
        for old in sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime)[:-KEPT]:
            old.unlink(missing_ok=True)
        yield "", "", name
