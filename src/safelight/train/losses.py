"""The losses of the steps since the last line of the log."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from safelight.train.plan import Plan


class Losses:
    """Sums up losses, without those that are not finite.

    The sums stay on the device, because reading a number from a GPU waits for the GPU. state: the
    `state` to go on from. steps: how many losses were added since the last line.
    """

    def __init__(self, device: torch.device, state: tuple[int, int, float] = (0, 0, 0.0)) -> None:
        self._total = torch.zeros((), device=device)
        self._finite = torch.zeros((), dtype=torch.int64, device=device)
        self._in_a_row = torch.zeros_like(self._finite)
        self.steps, finite, total = state
        self._finite += finite
        self._total += total

    @property
    def state(self) -> tuple[int, int, float]:
        """The steps, those whose loss was finite, and the sum of their losses."""
        return self.steps, int(self._finite), float(self._total)

    @torch.no_grad()
    def add(self, loss: Tensor) -> None:
        """Add the loss of a step."""
        finite = torch.isfinite(loss)
        self._total += torch.where(finite, loss, 0)
        self._finite += finite
        self._in_a_row = torch.where(finite, 0, self._in_a_row + 1)
        self.steps += 1

    def diverged(self, most: int) -> bool:
        """Return whether the last `most` losses, or more, were all not finite."""
        return int(self._in_a_row) >= most

    def wait(self) -> None:
        """Wait for the device to have done all steps."""
        float(self._total)

    def report(
        self,
        plan: Plan,
        step: int,
        pace: float,
        log: Callable[[str], None],
        board: Any,
        processes: int = 1,
    ) -> None:
        """Log a line, also to TensorBoard, and begin the next one.

        pace: seconds per step. processes: how many take a batch each step.
        """
        left = pace * (plan.steps - step) / 60
        steps, finite, total = self.state
        mean = total / max(1, finite)
        log(
            f"step {step}/{plan.steps}  loss {mean:.4f}  "
            f"{processes * plan.batch / pace:.0f} samples/s  {left:.1f} min left"
            + (f"  {steps - finite} steps left out: not finite" if finite < steps else "")
        )
        board.add_scalar("loss", mean, step)
        board.add_scalar("learning rate", plan.rate(step - 1), step)
        self.steps = 0
        self._total, self._finite = torch.zeros_like(self._total), torch.zeros_like(self._finite)
