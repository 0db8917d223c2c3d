"""What a training does: its steps, its batch, its learning rate."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Plan:
    """What a run does. A checkpoint is resumed only by the same plan; its steps may change as
    long as the learning rate has not begun to fall.

    recipe: what is learned from what, by digest: another data set is another run.
    seconds: how long, in place of `steps`, which is then 0 until the first steps have told the
    pace. It is kept beside the checkpoint, so that a run that goes on has the same steps.
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
        """Learning rate: linear warm-up, then half a cosine down to zero; or, with `cooldown`,
        constant and then linear down to zero over that many steps, so that a run may be made
        longer or shorter on the way (arXiv:2405.18392).
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
        """Whether a run of `other` has done, by this step, what this plan would have."""
        if self.seconds is not None and not other.steps:
            # It was stopped before its pace was known.
            return replace(other, steps=self.steps, cooldown=self.cooldown) == self
        if replace(other, steps=self.steps) != self:
            return False
        if self.steps == other.steps:
            return True
        return self.cooldown is not None and step <= min(self.steps, other.steps) - self.cooldown

    def paced(self, steps: int) -> Plan:
        """A plan of seconds, now that it is known how many steps they are."""
        # It must not begin to fall before that is known, or a run that goes on would differ.
        fall = min(round(steps * COOLDOWN), steps - 2 * PACE[1])
        return replace(self, steps=steps, cooldown=max(1, fall))


PACE = (10, 40)
"""Steps of a plan of seconds between which its pace is taken: the first ones are slow."""

COOLDOWN = 0.5
"""Share of the steps of such a plan in which the learning rate falls."""
