"""Train: the unconditional example, with its loss and its samples as they come."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gradio as gr

from safelight.server.hub import Hub
from safelight.studio.parts import kept, plain, problem, progress, said
from safelight.studio.run import Command

_STEP = re.compile(r"step (\d+)/(\d+)\s+loss ([0-9.]+)")
MOST_STEPS = 3000


class Train:
    """Made within a tab. The training goes on when the page is closed, and ends with the server;
    started again, it goes on where it was.
    """

    def __init__(self, hub: Hub) -> None:
        folder = hub.files.root / "training"
        earlier = sorted(folder.glob("digits-*"), key=lambda path: path.stat().st_mtime)
        self._out = earlier[-1] if earlier else folder
        self._command: Command | None = None
        gr.HTML(
            "<p>A small model learns to draw digits from noise alone, on the 1,797 pictures of "
            "handwritten digits that scikit-learn brings: noise is added to them, and the network "
            "learns to tell it. It takes some minutes. Stop it when you like: started again with "
            "as many steps, it goes on from there.</p>"
        )
        with gr.Row():
            steps = gr.Slider(20, MOST_STEPS, 800, step=20, label="Training steps", scale=3)
            start = gr.Button("Start", variant="primary", elem_id="train-start")
            stop = gr.Button("Stop", elem_id="train-stop")
        plain(steps)
        told, bar = problem("train"), progress("train")
        status = said("train")
        with gr.Row():
            plot = gr.HTML("", elem_id="loss", js_on_load=None)
            samples = kept("train", "Samples of the model as it is now")
        timer = gr.Timer(2.0, active=False)
        outputs = [told, status, bar, plot, samples, timer]

        async def begin(steps: Any) -> tuple[Any, ...]:
            if not isinstance(steps, int) or not 1 <= steps <= MOST_STEPS:
                return f"Training steps must be 1 to {MOST_STEPS}.", *self._look()[1:]
            if self._command is not None and self._command.stopped:
                await self._command.ended()  # it saves what it has
            if self._command is None or not self._command.running:
                # A plan of other steps is another training: it cannot go on from this one's state.
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

        def end() -> tuple[Any, ...]:
            if self._command is not None:
                self._command.stop()
            return self._look()

        start.click(begin, steps, outputs, show_progress="hidden")
        stop.click(end, None, outputs, show_progress="hidden")
        timer.tick(self._look, None, outputs, show_progress="hidden")
        self.outputs, self.look = outputs, self._look

    def _look(self) -> tuple[Any, ...]:
        """Problem, status, bar, plot, samples, and whether to look again."""
        command = self._command
        if command is None:
            sheet = _samples(self._out)
            status = "Of an earlier training: with as many steps it goes on." if sheet else ""
            return "", status, "", "", sheet, gr.Timer(active=False)
        found = [
            (int(match[1]), int(match[2]), float(match[3]))
            for line in command.lines
            if (match := _STEP.search(line))
        ]
        told, status = "", command.lines[-1] if command.lines else "Starting: some seconds."
        if not command.running:
            told, status = (command.last, "") if command.failed else ("", f"Ended. {status}")
        share = found[-1][0] / found[-1][1] if found else 0.001
        return (
            told,
            status,
            share if command.running else "",
            curve([(step, loss) for step, _, loss in found]) if found else "",
            _samples(self._out),
            gr.Timer(active=command.running),
        )


def curve(points: list[tuple[int, float]]) -> str:
    """Loss over training steps as SVG. Gradio's LinePlot draws marks that have no name, which
    readers of the screen stumble over.
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
    """The newest sheet, in the data folder."""
    sheets = sorted(folder.glob("step-*.png"))
    return f"training/{folder.name}/{sheets[-1].name}" if sheets else ""
