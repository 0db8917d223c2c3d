"""The training loop: one for the autoencoder and for both denoisers.

A step's data and noise depend on the seed and the step's number alone, so a run that was killed
and goes on from its last checkpoint sees what an undisturbed run sees.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from safelight.errors import SafelightError


@dataclass(frozen=True)
class Plan:
    """What a run does. A checkpoint is resumed only by the same plan; its steps may change as
    long as the learning rate has not begun to fall.
    """

    steps: int
    batch: int
    learning_rate: float
    warmup: int = 200
    cooldown: int | None = None
    weight_decay: float = 0.01
    ema: float = 0.999
    seed: int = 0

    def rate(self, step: int) -> float:
        """Learning rate: linear warm-up, then half a cosine down to zero; or, with `cooldown`,
        constant and then linear down to zero over that many steps, so that a run may be made
        longer or shorter on the way (arXiv:2405.18392).
        """
        rise = min(1.0, (step + 1) / self.warmup)
        if self.cooldown is None:
            return self.learning_rate * rise * 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return self.learning_rate * min(rise, (self.steps - step) / self.cooldown)

    def agrees(self, other: Plan, step: int) -> bool:
        """Whether a run of `other` has done, by this step, what this plan would have."""
        if replace(other, steps=self.steps) != self:
            return False
        if self.steps == other.steps:
            return True
        return self.cooldown is not None and step <= min(self.steps, other.steps) - self.cooldown


@dataclass
class Draw:
    """The randomness of one step: numpy's for the data, torch's for the noise."""

    data: np.random.Generator
    noise: torch.Generator

    @classmethod
    def of(cls, seed: int, step: int) -> Draw:
        torch_seed = int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0] >> 1)
        return cls(np.random.default_rng([seed, step]), torch.Generator().manual_seed(torch_seed))


def fit(
    net: nn.Module,
    loss_of: Callable[[Draw], Tensor],
    plan: Plan,
    folder: Path,
    *,
    every: int = 500,
    log: Callable[[str], None] = print,
    on_checkpoint: Callable[[nn.Module, int], None] | None = None,
) -> dict[str, Tensor]:
    """Train `net` and return its averaged (EMA) weights.

    loss_of runs the network on data that it draws itself and returns a scalar. Every `every`
    steps the state goes to folder/checkpoint.pt, by a rename, and on_checkpoint(net holding the
    averaged weights, step) may draw samples. Raises SafelightError when the folder holds the
    checkpoint of another plan, or when the loss is no longer finite.
    """
    folder.mkdir(parents=True, exist_ok=True)
    params = list(net.parameters())
    average = [p.detach().clone() for p in params]
    optimizer = torch.optim.AdamW(
        params,
        lr=plan.learning_rate,
        betas=(0.9, 0.99),
        weight_decay=plan.weight_decay,
        fused=True,
    )
    path = folder / "checkpoint.pt"
    start = _resume(path, plan, params, average, optimizer) if path.exists() else 0
    began, seen, total = time.monotonic(), 0, 0.0
    for step in range(start, plan.steps):
        for group in optimizer.param_groups:
            group["lr"] = plan.rate(step)
        loss = loss_of(Draw.of(plan.seed, step))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        # Early on the average follows closely, or it would keep the random start for long.
        keep = min(plan.ema, (1 + step) / (10 + step))
        with torch.no_grad():
            for held, p in zip(average, params, strict=True):
                held.lerp_(p, 1 - keep)
        total, seen = total + float(loss.detach()), seen + 1
        if not math.isfinite(total):
            raise SafelightError(
                f"the loss is not finite at step {step}: a lower learning rate than "
                f"{plan.learning_rate:g} would help; the last checkpoint is {path}"
            )
        if (step + 1) % 100 == 0 or step + 1 == plan.steps:
            pace = (time.monotonic() - began) / (step + 1 - start)
            left = pace * (plan.steps - step - 1) / 60
            log(
                f"step {step + 1}/{plan.steps}  loss {total / seen:.4f}  "
                f"{plan.batch / pace:.0f} samples/s  {left:.1f} min left"
            )
            seen, total = 0, 0.0
        if (step + 1) % every == 0 or step + 1 == plan.steps:
            _save(path, plan, step + 1, params, average, optimizer)
            if on_checkpoint is not None:
                with _averaged(params, average):
                    on_checkpoint(net, step + 1)
    names = [name for name, _ in net.named_parameters()]
    return dict(zip(names, average, strict=True))


@contextmanager
def _averaged(params: list[nn.Parameter], average: list[Tensor]) -> Iterator[None]:
    """Within it, the parameters hold their averages."""
    held = [p.detach().clone() for p in params]
    _copy(average, params)
    yield
    _copy(held, params)


@torch.no_grad()
def _copy(values: Iterable[Tensor], into: Iterable[Tensor]) -> None:
    for target, value in zip(into, values, strict=True):
        target.copy_(value)


def _save(
    path: Path,
    plan: Plan,
    step: int,
    params: list[nn.Parameter],
    average: list[Tensor],
    optimizer: torch.optim.Optimizer,
) -> None:
    state = {
        "plan": json.dumps(asdict(plan)),
        "step": step,
        "params": [p.detach() for p in params],
        "average": average,
        "optimizer": optimizer.state_dict(),
    }
    beside = path.with_suffix(".part")
    with beside.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def _resume(
    path: Path,
    plan: Plan,
    params: list[nn.Parameter],
    average: list[Tensor],
    optimizer: torch.optim.Optimizer,
) -> int:
    state: dict[str, Any] = torch.load(path, weights_only=True)
    step = int(state["step"])
    if not plan.agrees(Plan(**json.loads(state["plan"])), step):
        raise SafelightError(
            f"{path} was made by another plan ({state['plan']}): give another folder, "
            "or the same settings to go on"
        )
    _copy(state["params"], params)
    _copy(state["average"], average)
    optimizer.load_state_dict(state["optimizer"])
    return step
