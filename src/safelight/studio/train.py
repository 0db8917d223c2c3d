"""Train: the digits example, with its loss and its samples while it runs."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import gradio as gr

from safelight.server.hub import Hub
from safelight.studio.parts import asker, kept, plain, problem, progress, status
from safelight.studio.run import Command

_STEP = re.compile(r"step (\d+)/(\d+)\s+loss ([0-9.]+)(?:.*?([0-9.]+) min left)?")
MAX_STEPS = 3000


class Train:
    """Builds the tab. The training continues when the page is closed, stops with the server, and
    resumes when it is started again.
    """

    def __init__(self, hub: Hub) -> None:
        folder = hub.root / "training"
        earlier = sorted(folder.glob("digits-*"), key=lambda path: path.stat().st_mtime)
        self._out = earlier[-1] if earlier else folder
        self._command: Command | None = None
        self._starting = asyncio.Lock()
        self._owner = ""
        gr.HTML(
            "<p>Trains a small model that draws digits, on the 1,797 handwritten digits of "
            "scikit-learn. Noise is added to them, and the network learns to predict it. 800 steps "
            "take 5 minutes on an idle core and up to 20 on a busy one. The first figures appear "
            "after a twentieth of the steps. You can stop at any time; started again with the same "
            "number of steps, the training resumes.</p>"
        )
        with gr.Row():
            steps = gr.Slider(1, MAX_STEPS, 800, step=1, label="Training steps", scale=3)
            start = gr.Button("Start", variant="primary", elem_id="train-start")
            stop = gr.Button("Stop", elem_id="train-stop")
        plain(steps)
        told, bar = problem("train"), progress("train")
        doing = status("train")
        with gr.Row():
            plot = gr.HTML("", elem_id="loss", js_on_load=None)
            samples = kept("train", "Samples of the model as it is now")
        timer = gr.Timer(2.0, active=False)
        outputs = [told, doing, bar, plot, samples, timer]

        async def begin(steps: Any, by: gr.Request) -> tuple[Any, ...]:
            if not isinstance(steps, int) or not 1 <= steps <= MAX_STEPS:
                return f"Training steps must be 1 to {MAX_STEPS}.", *self._look()[1:]
            async with self._starting:  # so that a second Start sees the first's
                if self._command is not None and self._command.stopped:
                    await self._command.ended()  # it saves its state
                if self._command is None or not self._command.running:
                    self._owner = asker(by).owner
                    # Another number of steps is another training: it cannot resume from this state.
                    self._out = folder / f"digits-{steps}"
                    self._out.mkdir(parents=True, exist_ok=True)
                    self._command = await Command.start(
                        "train",
                        "unconditional",
                        "digits",
                        f"--out={self._out}",
                        f"--steps={steps}",
                    )
            return self._look()

        def end(by: gr.Request) -> tuple[Any, ...]:
            if asker(by).sees not in (None, self._owner):
                return "Another client's training can be stopped by that client.", *self._look()[1:]
            if self._command is not None:
                self._command.stop()
            return self._look()

        start.click(begin, steps, outputs, show_progress="hidden")
        stop.click(end, None, outputs, show_progress="hidden")
        timer.tick(self._look, None, outputs, show_progress="hidden")
        self.outputs, self.look = outputs, self._look

    def _look(self) -> tuple[Any, ...]:
        """Return problem, status, bar, plot, samples, and whether to look again."""
        command = self._command
        if command is None:
            sheet = _samples(self._out)
            doing = (
                "From an earlier training. Start it with the same steps to resume." if sheet else ""
            )
            return "", doing, "", "", sheet, gr.Timer(active=False)
        lines = [match for line in command.lines if (match := _STEP.search(line))]
        found = [(int(match[1]), int(match[2]), float(match[3])) for match in lines]
        told, doing = (
            "",
            _progress(lines[-1]) if lines else "Starting. The first figures take a while.",
        )
        if not command.running:
            last = command.lines[-1] if command.lines else ""
            told, doing = (command.last, "") if command.failed else ("", f"Ended. {last}")
        share = found[-1][0] / found[-1][1] if found else 0.001
        return (
            told,
            doing,
            share if command.running else "",
            curve([(step, loss) for step, _, loss in found]) if found else "",
            _samples(self._out),
            gr.Timer(active=command.running),
        )


def _progress(line: re.Match[str]) -> str:
    """Return a sentence of a line of the log: step, loss and the time left at the pace so far."""
    left = float(line[4] or 0)
    about = f"about {left:.0f} minutes" if left >= 1.5 else "about a minute" if left > 0.6 else ""
    rest = about or "less than a minute"
    return f"Step {line[1]} of {line[2]}, loss {float(line[3]):.3f}, {rest} left."


def curve(points: list[tuple[int, float]]) -> str:
    """Return the loss over training steps as SVG. The marks of Gradio's LinePlot have no accessible
    names.
    """
    width, height, left = 480, 240, 44
    last, most = max(points[-1][0], 1), max(loss for _, loss in points) or 1.0
    path = " ".join(
        f"{'L' if i else 'M'}{left + (width - left) * step / last:.1f},"
        f"{height - 20 - (height - 30) * loss / most:.1f}"
        for i, (step, loss) in enumerate(points)
    )
    x, y = path.rpartition(" ")[2].lstrip("ML").split(",")
    title = f"Loss: {points[0][1]:.3f} at step {points[0][0]}, {points[-1][1]:.3f} at step {last}"
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{title}">'
        f'<text x="0" y="16">{most:.3f}</text><text x="0" y="{height - 20}">0</text>'
        f'<text x="{left}" y="{height - 4}">step 0</text>'
        f'<text x="{width}" y="{height - 4}" text-anchor="end">{last}</text>'
        f'<path d="{path}"/><circle cx="{x}" cy="{y}" r="4"/></svg><p>{title}</p>'
    )


def _samples(folder: Path) -> str:
    """Return the path of the newest sheet in the data folder, or an empty string."""
    sheets = sorted(folder.glob("step-*.png"))
    return f"training/{folder.name}/{sheets[-1].name}" if sheets else ""
