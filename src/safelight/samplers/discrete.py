"""Samplers that walk on the trained timesteps themselves: DDIM and DDPM, PNDM, LCM and TCD.

They are written on x = √ᾱ·x̃, the state that the network sees. Some of them land between the
timestep they came from and the one that follows, and go on as if they had landed on the latter
(linspace spacing, or PNDM started part of the way). The pictures that people know were made so;
hence x is handed on unchanged, and x̃ is counted from the level as which the next row treats it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

from safelight.errors import SafelightError
from safelight.levels import alphas_cumprod, spaced
from safelight.samplers.rows import D, Mix, Row, Table, make_row, noise, x
from safelight.schedule import SchedulerConfig

# ᾱ of a level that was trained as pure noise, where these samplers need ᾱ = 0. With it x̃ is
# finite, and what it adds to a step is below float32's grain.
_PURE_NOISE = 1e-20


def _sigma(bar: float) -> float:
    return math.sqrt((1 - bar) / bar)


class _Walk:
    """The timesteps of a table, ᾱ for each, and the level on which the last row lands."""

    def __init__(
        self, config: SchedulerConfig, times: Sequence[int], skip: int, *, ends_clean: bool
    ) -> None:
        self.bars = alphas_cumprod(config, _PURE_NOISE)
        self.final = 1.0 if ends_clean else float(self.bars[0])
        self.times = [int(t) for t in times][skip:]
        if self.times and max(self.times) >= len(self.bars):
            raise SafelightError(
                f"with this spacing and steps_offset {config.steps_offset} the first timestep is "
                f"{max(self.times)} of {len(self.bars)}; ask for fewer steps"
            )
        self.rows: list[Row] = []

    def bar(self, time: int) -> float:
        """ᾱ at a timestep; one before the first is the end of the walk."""
        return float(self.bars[time]) if time >= 0 else self.final

    def state(self, row: int) -> Mix:
        """x, as the network sees it at this row."""
        return math.sqrt(self.bar(self.times[row])) * x(row)

    def add(self, after: Mix, lands: float, c: float | None = None, raw: float = 0.0) -> None:
        """Appends the row whose step takes x to `after`; the last of all lands on ᾱ `lands`."""
        row = len(self.rows)
        last = row == len(self.times) - 1
        next_bar = lands if last else self.bar(self.times[row + 1])
        scale = 1 / math.sqrt(next_bar)
        self.rows.append(
            make_row(
                row,
                _sigma(self.bar(self.times[row])),
                self.times[row],
                _sigma(next_bar),
                after * scale,
                None if c is None else c * scale,
                raw * scale,
            )
        )

    def table(self, config: SchedulerConfig) -> Table:
        start = self.rows[0].sigma if self.rows else 0.0
        scale = math.hypot(1.0, start)
        if config.thresholding:
            kept = (config.dynamic_thresholding_ratio, config.sample_max_value)
            return Table(tuple(self.rows), scale, threshold=kept)
        clip = config.clip_sample_range if config.clip_sample else None
        return Table(tuple(self.rows), scale, clip=clip)


def ddim(config: SchedulerConfig, steps: int, skip: int, eta: float) -> Table:
    """Denoising diffusion implicit models, arXiv 2010.02502, equations 12 and 16."""
    walk = _Walk(config, _whole(spaced(config, steps)), skip, ends_clean=config.set_alpha_to_one)
    stride = config.num_train_timesteps // steps
    for row, time in enumerate(walk.times):
        here, there = walk.bar(time), walk.bar(time - stride)
        spread = eta * math.sqrt((1 - there) / (1 - here) * (1 - here / there))
        direction = math.sqrt(max(1 - there - spread**2, 0.0))
        sigma = _sigma(here)
        walk.add(
            math.sqrt(there) * D(row) + direction * noise(row, sigma),
            there,
            spread if eta > 0 else None,
            # The direction keeps the noise that the network told, not what clipping makes of it.
            direction / sigma if config.clip_sample or config.thresholding else 0.0,
        )
    return walk.table(config)


def ddpm(config: SchedulerConfig, steps: int, skip: int, eta: float) -> Table:
    """The posterior of denoising diffusion, arXiv 2006.11239, equations 6 and 7."""
    walk = _Walk(config, _whole(spaced(config, steps)), skip, ends_clean=True)
    for row, time in enumerate(walk.times):
        here = walk.bar(time)
        there = walk.bar(walk.times[row + 1] if row + 1 < len(walk.times) else -1)
        alpha = here / there
        variance = 1 - alpha
        if config.variance_type != "fixed_large":
            variance = max((1 - there) / (1 - here) * variance, 1e-20)
        clean = math.sqrt(there) * (1 - alpha) / (1 - here)
        kept = math.sqrt(alpha) * (1 - there) / (1 - here)
        c = math.sqrt(variance) if time > 0 else None
        walk.add(clean * D(row) + kept * walk.state(row), there, c)
    return walk.table(config)


def pndm(config: SchedulerConfig, steps: int, skip: int, eta: float) -> Table:
    """Pseudo numerical methods for diffusion, arXiv 2202.09778, algorithm 2 (F-PNDM).

    Four outputs of the network, in whatever it predicts, are combined as Adams and Bashforth
    have it and put into equation 9. With skip_prk_steps (PLMS, as Stable Diffusion has it) the
    first step is improved with a second evaluation; else three Runge–Kutta steps lead in.

    A walk that starts part of the way (strength below 1) still has the second evaluation in its
    plan of timesteps, only elsewhere: from its third row on, the state is one timestep noisier
    than the network is told. The picture stays that of the scheduler everyone uses.
    """
    descending = _whole(spaced(config, steps))
    stride = config.num_train_timesteps // steps
    lead = 0 if config.skip_prk_steps else 12
    if lead:
        if steps < 4:
            raise SafelightError(f"pndm needs at least 4 steps with this model, not {steps}")
        times: list[int] = []
        for high, low in itertools.pairwise(descending[:4]):
            times += [high, low + stride // 2, low + stride // 2, low]
        times += descending[3:]
    else:
        times = descending[:1] + descending[1:2] + descending[1:]
    walk = _Walk(config, times, skip, ends_clean=config.set_alpha_to_one)
    outputs: list[Mix] = []
    start = total = Mix({})
    for row, time in enumerate(walk.times):
        told = _output(walk, row, config.prediction_type)
        source, target, origin = time, time - stride, walk.state(row)
        if row < lead:
            part = row % 4
            source, target = times[row - part], time - (0 if part % 2 else stride // 2)
            if part == 0:
                start, total = origin, Mix({})
                outputs.append(told)
            origin = start
            total = total + told * (1 / 6, 1 / 3, 1 / 3, 1 / 6)[part]
            mean = told if part < 3 else total
        elif row == 1:
            source, target, origin = time + stride, time, walk.state(0)
            mean = (told + outputs[0]) / 2
        else:
            outputs = [*outputs[-3:], told]
            mean = Mix({})
            for weight, output in zip(_ADAMS[len(outputs)], reversed(outputs), strict=True):
                mean = mean + weight * output
        here, there = walk.bar(source), walk.bar(target)
        if config.prediction_type == "v_prediction":
            mean = math.sqrt(here) * mean + math.sqrt(1 - here) * origin
        # Equation 9, which is DDIM's step: in sigma space x̃ + (next sigma − sigma)·ε.
        step = origin / math.sqrt(here) + (_sigma(there) - _sigma(here)) * mean
        walk.add(math.sqrt(there) * step, there)
    return walk.table(config)


_ADAMS = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


def _output(walk: _Walk, row: int, prediction: str) -> Mix:
    """What the network told at a row: v, or the noise."""
    bar = walk.bar(walk.times[row])
    if prediction == "v_prediction":
        return (math.sqrt(bar) * walk.state(row) - D(row)) / math.sqrt(1 - bar)
    return noise(row, _sigma(bar))


def _distilled_times(name: str, config: SchedulerConfig, steps: int) -> list[int]:
    """Timesteps out of those that a consistency model was distilled on."""
    trained = config.original_inference_steps
    if steps > trained:
        raise SafelightError(f"{name} takes at most {trained} steps with this model, not {steps}")
    stride = config.num_train_timesteps // trained
    if stride < 1:
        raise SafelightError(
            f"original_inference_steps is {trained}, more than the model's "
            f"{config.num_train_timesteps} timesteps"
        )
    picked = np.floor(np.linspace(0, trained, steps, endpoint=False)).astype(int)
    return [(trained - int(i)) * stride - 1 for i in picked]


def lcm(config: SchedulerConfig, steps: int, skip: int, eta: float) -> Table:
    """Latent consistency models, arXiv 2310.04378: to the clean estimate, and noise anew.

    The boundary condition (section 4.1, with sigma_data ½) mixes in a little of the state, so the
    weights do not sum to 1.
    """
    walk = _Walk(config, _distilled_times("lcm", config, steps), skip, ends_clean=True)
    for row, time in enumerate(walk.times):
        scaled = time * config.timestep_scaling
        c_skip = 0.25 / (scaled**2 + 0.25)
        c_out = scaled / math.sqrt(scaled**2 + 0.25)
        clean = c_out * D(row) + c_skip * walk.state(row)
        if row + 1 < len(walk.times):
            there = walk.bar(walk.times[row + 1])
            walk.add(math.sqrt(there) * clean, there, math.sqrt(1 - there))
        else:
            walk.add(clean, 1.0)
    return walk.table(config)


def tcd(config: SchedulerConfig, steps: int, skip: int, eta: float) -> Table:
    """Trajectory consistency distillation, arXiv 2402.19159, algorithm 4 (eta is its γ)."""
    walk = _Walk(config, _distilled_times("tcd", config, steps), skip, ends_clean=False)
    for row in range(len(walk.times)):
        last = row + 1 == len(walk.times)
        target = 0 if last else walk.times[row + 1]
        # float32, so that a product just below a whole number is rounded up to it as it was
        middle = walk.bar(int(np.floor(np.float32(1 - eta) * np.float32(target))))
        there = walk.bar(target)
        told = noise(row, _sigma(walk.bar(walk.times[row])))
        after = math.sqrt(middle) * D(row) + math.sqrt(1 - middle) * told
        if eta > 0 and not last:
            walk.add(math.sqrt(there / middle) * after, there, math.sqrt(1 - there / middle))
        else:
            walk.add(after, middle)
    return walk.table(config)


def _whole(times: np.ndarray) -> list[int]:
    return [int(t) for t in times]
