"""The pictures of one request, made one after the other."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from safelight.engine.core import Engine
from safelight.engine.job import cut, decode
from safelight.engine.passes import check_same
from safelight.engine.preview import decode_tiny
from safelight.errors import SafelightError
from safelight.request import Request
from safelight.result import Result

if TYPE_CHECKING:
    from safelight.model import Model


@dataclass(frozen=True)
class Step:
    """One step of one picture, just taken.

    image_index: which picture of the request. step: from 1 to steps, of all passes. clean: the
    network's estimate of the clean latents, float32 [1, channels, h, w]. size: width and height of
    the picture, in this pass; None: all that the latents cover.
    """

    image_index: int
    step: int
    steps: int
    clean: Tensor
    model: Model
    size: tuple[int, int] | None = None

    def preview(self) -> Image.Image:
        """Return the clean estimate as a picture.

        It is decoded by the tiny autoencoder if one was loaded for previews (`preview_vae`).
        """
        with self.model.lock, torch.inference_mode():
            decoded = decode if self.model.preview_vae is None else decode_tiny
            return cut(self.model, decoded(self.model, self.clean), self.clean, self.size)


class Run:
    """Draws a request's pictures: iterate over the steps, then read `result`.

    Each step is taken once; a second iteration continues after the last step taken.
    made: the result so far. It has a picture by the time the next one takes its first step.
    """

    def __init__(self, model: Model, request: Request) -> None:
        self._model, self._request = model, request
        self._steps = self._draw()
        self.made: Result | None = None

    @property
    def result(self) -> Result:
        """The finished result. Reading it takes the remaining steps.

        Raises SafelightError if an earlier step ended the run with an error.
        """
        for _ in self:
            pass
        if self.made is None or len(self.made.images) < self._request.count:
            raise SafelightError("the run ended with an error: generate the pictures again")
        return self.made

    def __iter__(self) -> Iterator[Step]:
        return self._steps

    def _draw(self) -> Iterator[Step]:
        engine = Engine(self._model)
        timings = {"text": 0.0, "denoise": 0.0, "decode": 0.0}
        count = self._request.count
        for i in range(count):
            # One at a time, so that the first picture does not wait until all are prepared.
            began = time.perf_counter()
            others = [other for other in range(count) if other != i]
            result = engine.add(self._request, done=others)
            if self.made is None:
                self.made, result.timings = result, timings
            else:  # each result has only the LoRAs of its own picture
                check_same(self.made.upscaler, result.upscaler)
                self.made.loras |= result.loras
                self.made.warnings[:] = dict.fromkeys((*self.made.warnings, *result.warnings))
            timings["text"] += time.perf_counter() - began
            while engine.busy:
                began, part = time.perf_counter(), "text" if engine.tickets else "decode"
                stepped, finished = engine.step()
                part = "denoise" if stepped else part
                timings[part] += time.perf_counter() - began
                for ticket in finished:
                    if ticket.image is None:
                        assert ticket.error is not None
                        raise ticket.error
                    self.made.images.append(ticket.image)
                # The time that the caller spends on a step does not count.
                for ticket in stepped:
                    job = ticket.job
                    assert job.clean is not None
                    yield Step(i, ticket.taken, ticket.steps, job.clean, self._model, job.size)
        timings["total"] = sum(timings.values())
