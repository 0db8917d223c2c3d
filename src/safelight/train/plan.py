"""The plan of a training: its steps, its batch, its learning rate."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Plan:
    """The settings of a run.

    A checkpoint is resumed only by the same plan. With `cooldown`, its steps may change as long as
    the learning rate has not begun to fall.

    recipe: a digest of the task and its data: another data set is another run.
    seconds: how long to train, in place of `steps`, which is 0 until the first steps have shown the
    pace. The steps are then kept beside the checkpoint, so that a run that goes on has the same.
    """

    steps: int
    batch: int
    learning_rate: float
    warmup: int = 200
    cooldown: int | None = None
    weight_decay: float = 0.01
    ema: float = 0.999
    seed: int = 0
    recipe: str = ""
    seconds: float | None = None

    def rate(self, step: int) -> float:
        """Return the learning rate: a linear warm-up, then half a cosine down to zero.

        With `cooldown` it is constant, and then linear down to zero over that many steps, so that a
        run may be made longer or shorter on the way (arXiv:2405.18392).
        """
        rise = min(1.0, (step + 1) / self.warmup)
        if not self.steps:
            return self.learning_rate * rise
        if self.cooldown is None:
            return self.learning_rate * rise * 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return self.learning_rate * min(rise, (self.steps - step) / self.cooldown)

    def with_batch(self, batch: int) -> Plan:
        """Return the plan for another batch; the learning rate grows with the batch's root."""
        rate = self.learning_rate * math.sqrt(batch / self.batch)
        return replace(self, batch=batch, learning_rate=rate)

    def agrees(self, other: Plan, step: int) -> bool:
        """Return whether a run of `other` has done, by this step, what this plan would have."""
        if self.seconds is not None and not other.steps:
            # It was stopped before its pace was known.
            return replace(other, steps=self.steps, cooldown=self.cooldown) == self
        if replace(other, steps=self.steps) != self:
            return False
        if self.steps == other.steps:
            return True
        return self.cooldown is not None and step <= min(self.steps, other.steps) - self.cooldown

    def paced(self, steps: int) -> Plan:
        """Return a plan of seconds with the number of steps that they turned out to be."""
        # The learning rate must not fall before that is known, or a run that goes on would differ.
        fall = min(round(steps * COOLDOWN), steps - 2 * PACE[1])
        return replace(self, steps=steps, cooldown=max(1, fall))


PACE = (10, 40)
"""Steps of a plan of seconds between which its pace is measured: the first ones are slow."""

COOLDOWN = 0.5
"""Share of the steps of such a plan in which the learning rate falls."""
