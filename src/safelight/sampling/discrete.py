"""Samplers on the trained timesteps: DDIM, DDPM, PNDM, LCM and TCD.

They are written for √ᾱ·x, the state as the network sees it. With linspace spacing, or when PNDM
starts part of the way, a step can land between two timesteps, and the next row treats its result as
if it were at the later one. The network's view is passed on unchanged there, so `Row.lands` is the
level that the next row assumes.

Each function adds rows to a Walk and returns them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from safelight.sampling.levels import alphas_cumprod
from safelight.sampling.rows import D, Level, Mix, Row, make_row, noise, x
from safelight.sampling.schedule import SchedulerConfig

# Stands for ᾱ = 0, the level of pure noise. It keeps the state finite, and its effect on a step is
# below the precision of float32.
_PURE_NOISE = 1e-20


def _sigma(bar: float) -> float:
    return math.sqrt((1 - bar) / bar)


class Walk:
    """Timesteps to visit, ᾱ of each, and the rows made so far.

    ends_clean: the walk ends at ᾱ = 1; else at ᾱ of timestep 0.
    """

    def __init__(self, config: SchedulerConfig, times: Sequence[int], *, ends_clean: bool) -> None:
        self.bars = alphas_cumprod(config, _PURE_NOISE)
        self.final = 1.0 if ends_clean else float(self.bars[0])
        self.times = list(times)
        self.rows: list[Row] = []

    def bar(self, time: int) -> float:
        """Return ᾱ at a timestep; a negative one is the end of the walk."""
        return float(self.bars[time]) if time >= 0 else self.final

    def view(self, row: int) -> Mix:
        """Return the state as the network sees it at this row."""
        return math.sqrt(self.bar(self.times[row])) * x(row)

    def noise(self, row: int) -> Mix:
        """Return the noise in the state at this row."""
        return noise(row, Level.exploding(_sigma(self.bar(self.times[row]))))

    def add(self, after: Mix, lands: float, c: float | None = None, kept: float = 0.0) -> None:
        """Append the row whose step takes the network's view to `after`.

        lands: ᾱ that it lands on, if it is the last row. c, kept: `Row.c` and
        `Row.clip_correction`, in the network's view.
        """
        row = len(self.rows)
        last = row == len(self.times) - 1
        next_bar = lands if last else self.bar(self.times[row + 1])
        scale = 1 / math.sqrt(next_bar)
        self.rows.append(
            make_row(
                row,
                Level.exploding(_sigma(self.bar(self.times[row]))),
                self.times[row],
                Level.exploding(_sigma(next_bar)),
                after * scale,
                None if c is None else c * scale,
                kept * scale,
            )
        )


def ddim(walk: Walk, *, stride: int, eta: float = 0.0, keep_noise: bool = False) -> list[Row]:
    """Denoising diffusion implicit models, arXiv:2010.02502, equations 12 and 16.

    stride: timesteps per step. eta: from 0 (no fresh noise) to 1 (that of DDPM). keep_noise: the
    direction uses the noise predicted before D was clipped.
    """
    for row, time in enumerate(walk.times):
        here, there = walk.bar(time), walk.bar(time - stride)
        spread = eta * math.sqrt((1 - there) / (1 - here) * (1 - here / there))
        direction = math.sqrt(max(1 - there - spread**2, 0.0))
        walk.add(
            math.sqrt(there) * D(row) + direction * walk.noise(row),
            there,
            spread if eta > 0 else None,
            direction / _sigma(here) if keep_noise else 0.0,
        )
    return walk.rows


def ddpm(walk: Walk, *, large_variance: bool = False) -> list[Row]:
    """Denoising diffusion probabilistic models, arXiv:2006.11239: the posterior, equations 6 and 7.

    large_variance: fresh noise has variance β instead of the posterior's.
    """
    for row, time in enumerate(walk.times):
        here = walk.bar(time)
        there = walk.bar(walk.times[row + 1] if row + 1 < len(walk.times) else -1)
        alpha = here / there
        variance = 1 - alpha
        if not large_variance:
            variance = max((1 - there) / (1 - here) * variance, 1e-20)
        clean = math.sqrt(there) * (1 - alpha) / (1 - here)
        kept = math.sqrt(alpha) * (1 - there) / (1 - here)
        c = math.sqrt(variance) if time > 0 else None
        walk.add(clean * D(row) + kept * walk.view(row), there, c)
    return walk.rows


def pndm(
    walk: Walk, *, stride: int, plan: Sequence[int], runge_kutta: bool, velocity: bool
) -> list[Row]:
    """Pseudo numerical methods for diffusion, arXiv:2202.09778, algorithm 2 (F-PNDM).

    Up to four outputs of the network (noise or v) are combined with Adams-Bashforth weights and
    put into equation 9.

    stride: timesteps per step. plan: the timesteps of the walk before any are skipped.
    runge_kutta: the first three steps are Runge-Kutta steps; else (PLMS) a second evaluation
    improves the first step. velocity: the network predicts v, not noise.
    """
    lead = 12 if runge_kutta else 0
    outputs: list[Mix] = []
    start = total = Mix({})
    for row, time in enumerate(walk.times):
        output = _output(walk, row, velocity)
        source, target, origin = time, time - stride, walk.view(row)
        if row < lead:
            part = row % 4
            source, target = plan[row - part], time - (0 if part % 2 else stride // 2)
            if part == 0:
                start, total = origin, Mix({})
                outputs.append(output)
            origin = start
            total = total + output * (1 / 6, 1 / 3, 1 / 3, 1 / 6)[part]
            mean = output if part < 3 else total
        elif row == 1:
            source, target, origin = time + stride, time, walk.view(0)
            mean = (output + outputs[0]) / 2
        else:
            outputs = [*outputs[-3:], output]
            mean = Mix({})
            for weight, past in zip(_ADAMS[len(outputs)], reversed(outputs), strict=True):
                mean = mean + weight * past
        here, there = walk.bar(source), walk.bar(target)
        if velocity:
            mean = math.sqrt(here) * mean + math.sqrt(1 - here) * origin
        # Equation 9 is DDIM's step: x + (next sigma − sigma)·ε.
        step = origin / math.sqrt(here) + (_sigma(there) - _sigma(here)) * mean
        walk.add(math.sqrt(there) * step, there)
    return walk.rows


_ADAMS = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


def _output(walk: Walk, row: int, velocity: bool) -> Mix:
    """Return what the network predicted at a row: v, or the noise."""
    if not velocity:
        return walk.noise(row)
    bar = walk.bar(walk.times[row])
    return (math.sqrt(bar) * walk.view(row) - D(row)) / math.sqrt(1 - bar)


def lcm(walk: Walk, *, scaling: float = 10.0) -> list[Row]:
    """Latent consistency models, arXiv:2310.04378: the clean estimate, with fresh noise added.

    The boundary condition (section 4.1, sigma_data ½) mixes in a little of the state, so the
    weights do not sum to 1. scaling: the factor of the timestep in that condition.
    """
    for row, time in enumerate(walk.times):
        scaled = time * scaling
        c_skip = 0.25 / (scaled**2 + 0.25)
        c_out = scaled / math.sqrt(scaled**2 + 0.25)
        clean = c_out * D(row) + c_skip * walk.view(row)
        if row + 1 < len(walk.times):
            there = walk.bar(walk.times[row + 1])
            walk.add(math.sqrt(there) * clean, there, math.sqrt(1 - there))
        else:
            walk.add(clean, 1.0)
    return walk.rows


def tcd(walk: Walk, *, eta: float = 0.0) -> list[Row]:
    """Trajectory consistency distillation, arXiv:2402.19159, algorithm 4 (eta is its γ)."""
    for row in range(len(walk.times)):
        last = row + 1 == len(walk.times)
        target = 0 if last else walk.times[row + 1]
        # In float32 a product just below a whole number is rounded up to it, as in the original.
        middle = walk.bar(int(np.floor(np.float32(1 - eta) * np.float32(target))))
        there = walk.bar(target)
        after = math.sqrt(middle) * D(row) + math.sqrt(1 - middle) * walk.noise(row)
        if eta > 0 and not last:
            walk.add(math.sqrt(there / middle) * after, there, math.sqrt(1 - there / middle))
        else:
            walk.add(after, middle)
    return walk.rows
