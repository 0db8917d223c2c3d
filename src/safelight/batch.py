"""Many pictures at once, batched by the step.

A picture joins at any step and leaves when it is done; pictures of different samplers, step
counts, guidance and tasks share a call of the network while their latents have one shape.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from safelight.denoiser import Condition
from safelight.engine import admit, begun, condition, settle
from safelight.errors import SafelightError
from safelight.job import Job, NotFiniteError, advance, finish
from safelight.model import Model
from safelight.nets.unet import UNet2DConditionModel
from safelight.request import Request
from safelight.result import Result

AGEING = 0.5
"""Rows of credit for each row's time of waiting: what is long comes to its turn, too."""

TOO_LARGE = "out of memory: ask for a smaller picture"
MEASURE_SECONDS = 1.5
TEXTS = 64
"""Prompts whose encoding is kept."""


@dataclass(eq=False)
class Ticket:
    """One picture in the making. image or error: what became of it.

    tag: whatever its owner knows it by; index: which picture of the request.
    """

    job: Job
    index: int
    seed: int
    tag: Any = None
    arrived: float = field(default_factory=time.monotonic)
    image: Image.Image | None = None
    error: Exception | None = None

    @property
    def rows(self) -> int:
        """Of the network's call, at each step."""
        return self.job.condition.evaluations

    @property
    def left(self) -> int:
        return (len(self.job.table.rows) - self.job.cursor) * self.rows

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.job.state.shape)


class Engine:
    """Steps the pictures that were added, the shortest way to go first, with ageing.

    rows: most of a call of the network; None measures how many this machine takes at once with
    profit. exact: one picture a call, so that neighbours cannot change a last bit.
    """

    def __init__(self, model: Model, *, rows: int | None = None, exact: bool = False) -> None:
        self.model, self.exact = model, exact
        self.rows = rows or (1 if exact else worthwhile_rows(model))
        self.tickets: list[Ticket] = []
        self._pace = 0.01  # seconds a row, measured as it goes
        self._texts: OrderedDict[Any, tuple[Condition, list[str]]] = OrderedDict()
        self._decoder = ThreadPoolExecutor(1, thread_name_prefix="decode")
        self._decoding: dict[Future[Image.Image], Ticket] = {}

    @property
    def busy(self) -> bool:
        return bool(self.tickets or self._decoding)

    @property
    def rows_a_second(self) -> float:
        return 1 / self._pace

    def add(self, request: Request, tag: Any = None, done: Collection[int] = ()) -> Result:
        """Take the pictures of a request in, but for those done; they join at the next step.

        Returns the result that their pictures belong to, yet without pictures. Raises
        SafelightError if the request does not fit the model.
        """
        model = self.model
        try:
            with torch.inference_mode():
                settled = settle(model, request)
                conditioned, warnings = self._condition(settled)
                result = begun(model, request, settled, warnings)
                self.tickets += [
                    Ticket(admit(model, settled, conditioned, seed), i, seed, tag)
                    for i, seed in enumerate(result.seeds)
                    if i not in done
                ]
        except (MemoryError, RuntimeError) as error:  # of a large picture to start from
            if not out_of_memory(error):
                raise
            _free(model.device)
            raise SafelightError(TOO_LARGE) from None
        return result

    def drop(self, tag: Any) -> None:
        """Forget the pictures of this tag: cancelled."""
        self.tickets = [ticket for ticket in self.tickets if ticket.tag != tag]
        self._decoding = {f: t for f, t in self._decoding.items() if t.tag != tag}

    def step(self) -> tuple[list[Ticket], list[Ticket]]:
        """Take those that are first in turn a step further.

        Returns the tickets that took a step, and those that are finished, with image or error.
        """
        stepped: list[Ticket] = []
        finished: list[Ticket] = []
        if self.tickets:
            stepped, finished = self._advance(self._turn())
            for ticket in stepped:
                if ticket.job.done:
                    self.tickets.remove(ticket)
                    self._decoding[self._decoder.submit(self._finish, ticket.job)] = ticket
        elif self._decoding:
            next(iter(self._decoding)).exception()  # waits
        return stepped, finished + list(self._decoded())

    def check(self) -> bool:
        """Whether the network answers with numbers."""
        with torch.inference_mode():
            return bool(_probe(self.model, 1).isfinite().all())

    def _turn(self) -> list[Ticket]:
        """The first in turn, and who fits beside it."""
        now = time.monotonic()

        def urgency(ticket: Ticket) -> float:
            return ticket.left - AGEING * (now - ticket.arrived) / self._pace

        order = sorted(self.tickets, key=urgency)
        chosen, room = [order[0]], self.rows - order[0].rows
        for ticket in order[1:] if not self.exact else ():
            if ticket.shape == order[0].shape and ticket.rows <= room:
                chosen.append(ticket)
                room -= ticket.rows
        return chosen

    def _advance(self, tickets: list[Ticket]) -> tuple[list[Ticket], list[Ticket]]:
        began = time.monotonic()
        try:
            with torch.inference_mode():
                advance(self.model, [ticket.job for ticket in tickets])
        except NotFiniteError as error:
            lost = [t for t in tickets if any(t.job is job for job in error.jobs)]
            return [t for t in tickets if t not in lost], self._fail(lost, error)
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            _free(self.model.device)
            if len(tickets) == 1:
                return [], self._fail(tickets, SafelightError(TOO_LARGE))
            # None has moved: half of them now, and no more at once from here on.
            self.rows = max(1, sum(ticket.rows for ticket in tickets) // 2)
            return self._advance(tickets[: len(tickets) // 2])
        pace = (time.monotonic() - began) / sum(ticket.rows for ticket in tickets)
        self._pace += 0.1 * (pace - self._pace)
        return tickets, []

    def _fail(self, tickets: list[Ticket], error: Exception) -> list[Ticket]:
        for ticket in tickets:
            ticket.error = error
            self.tickets.remove(ticket)
        return tickets

    def _finish(self, job: Job) -> Image.Image:
        with torch.inference_mode():
            return finish(self.model, job)

    def _decoded(self) -> Iterator[Ticket]:
        for future in [future for future in self._decoding if future.done()]:
            ticket = self._decoding.pop(future)
            error = future.exception()
            if error is None:
                ticket.image = future.result()
            elif isinstance(error, SafelightError):
                ticket.error = error
            elif out_of_memory(error):
                _free(self.model.device)
                ticket.error = SafelightError(TOO_LARGE)
            else:
                raise error
            yield ticket

    def _condition(self, settled: Request) -> tuple[Condition, list[str]]:
        """Of a prompt that came before, the same tensor as then."""
        key = (
            settled.prompt,
            settled.negative_prompt,
            settled.guidance_scale,
            settled.width,
            settled.height,
        )
        if key not in self._texts:
            made = condition(self.model, settled)
            if made[0].context is not None and not made[0].context.isfinite().all():
                return made  # what went wrong once may go well the next time
            self._texts[key] = made
            while len(self._texts) > TEXTS:
                self._texts.popitem(last=False)
        self._texts.move_to_end(key)
        return self._texts[key]


def out_of_memory(error: BaseException) -> bool:
    # On the CPU torch says so in words alone.
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "t allocate memory" in str(error)
    )


def _free(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


@torch.inference_mode()
def worthwhile_rows(model: Model, most: int = 64) -> int:
    """How many rows of the model's own size are worth one call of the network: doubled while each
    row costs at most 0.95 times as much as before, for a second or two.
    """

    def seconds(rows: int) -> float:
        began = time.monotonic()
        float(_probe(model, rows).sum())  # waits for a GPU, too
        return time.monotonic() - began

    began = time.monotonic()
    seconds(2)  # packs weights
    rows, cost = 2, seconds(2) / 2
    while rows < most and time.monotonic() - began < MEASURE_SECONDS:
        wider = min(seconds(2 * rows), seconds(2 * rows)) / (2 * rows)
        if wider > 0.95 * cost:
            break
        rows, cost = 2 * rows, wider
    return rows


def _probe(model: Model, rows: int) -> Tensor:
    """What the network says of noise of the model's own size."""
    config, (width, height) = model.unet.config, model.native_size
    factor = 1 if model.vae is None else model.vae.config.factor
    shape = (rows, config.in_channels, height // factor, width // factor)
    x = torch.ones(shape, device=model.device, dtype=model.dtype)
    times = torch.ones(rows, device=model.device)
    if not isinstance(model.unet, UNet2DConditionModel):
        return model.unet(x, times)
    width_of_text = model.unet.config.cross_attention_dim
    length = model.tokenizer.max_length if model.tokenizer is not None else 77
    text = torch.ones(rows, length, width_of_text, device=model.device, dtype=model.dtype)
    return model.unet(x, times, text)
