"""Draw composed pictures again with the denoiser, so that a decoder learns from its errors."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from recipes.embedded.pool import Pool
from recipes.embedded.principal import Principal
from safelight.engine import Engine
from safelight.engine.job import Job, prepare
from safelight.errors import SafelightError
from safelight.model import Model
from safelight.request import Request
from safelight.sampling import table
from safelight.train.autoencoder import to_pixels
from safelight.train.loop import progress

STEPS, GUIDANCE = 10, 4.0
"""Steps and guidance scale with which a picture is drawn again."""

LAST = (2, 5)
"""How many of the steps are taken, at least and at most; with more the picture becomes another."""

AT_ONCE = 64
"""Pictures drawn side by side."""


@torch.inference_mode()
def redraw(model: Model, principal: Principal, pool: Pool, count: int) -> Tensor:
    """Return latents of the pool's first pictures, each noised and drawn again with its caption.

    They are float16 [count, channels, h, w].
    """
    engine = Engine(model, exact=False, rows=2 * AT_ONCE)
    rng, made = np.random.default_rng(6), {}
    walks = [
        table("dpmpp_2m", model.scheduler, STEPS, strength=last / STEPS)
        for last in range(LAST[0], LAST[1] + 1)
    ]
    for first in range(0, count, AT_ONCE):
        some = range(first, min(count, first + AT_ONCE))
        pixels = to_pixels(pool.pictures[first : some.stop])
        latents = principal.encode(F.avg_pool2d(pixels, 2)).to(model.device)
        for i in some:
            walk = walks[rng.integers(len(walks))]
            request = Request(prompt=pool.scenes[i].said, guidance_scale=GUIDANCE, steps=STEPS)
            words = model.family.encode(model, request)
            job = prepare(model, walk, words, i, model.native_size)
            clean = latents[i - first : i - first + 1]
            job.state = walk.rows[0].level.mix(clean, job.state / walk.noise_scale)
            engine.add_job(job, i)
        jobs: dict[int, Job] = {ticket.tag: ticket.job for ticket in engine.tickets}
        while engine.tickets:
            stepped, failed = engine.step()
            for ticket in failed:
                raise SafelightError(f"{pool.scenes[ticket.tag].said}: {ticket.error}")
            for ticket in stepped:
                if ticket.job.done:
                    engine.drop(ticket.tag)
        made |= {i: job.view.half().cpu() for i, job in jobs.items()}
        if first % (16 * AT_ONCE) == 0:
            progress(f"drawn again: {some.stop}/{count}")
    return torch.cat([made[i] for i in range(count)])
