"""The one step loop: pictures that join at any step and leave when they are done.

Pictures of different samplers, step counts, guidance and tasks share a call of the network while
their states have one shape.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from safelight.engine.capacity import free_memory, largest_useful_batch, out_of_memory, probe
from safelight.engine.job import Job, NotFiniteError, advance, finish
from safelight.engine.requests import create_job, new_result, resolve_request, with_drawn
from safelight.errors import SafelightError
from safelight.families.base import Conditioning
from safelight.request import Request
from safelight.result import Result

if TYPE_CHECKING:
    from safelight.model import Model

AGEING = 0.5
"""Rows of credit for each row's time of waiting, so that long pictures get their turn too."""

MAX_PROMPTS = 64
"""Prompts whose conditioning is kept."""


def too_large() -> SafelightError:
    """Return the error for a picture that there is no memory for."""
    return SafelightError("out of memory: ask for a smaller picture", code="out_of_memory")


@dataclass(eq=False)
class Ticket:
    """One picture in the making.

    index: which picture of its request; tag: whatever the client knows it by; dtype: the
    precision that it is drawn in. image or error: set when it is finished.
    """

    job: Job
    index: int
    seed: int
    dtype: str
    tag: Any = None
    arrived: float = field(default_factory=time.monotonic)
    image: Image.Image | None = None
    error: Exception | None = None

    @property
    def steps(self) -> int:
        """Rows of its table, those that are taken included."""
        return len(self.job.table.rows)

    @property
    def rows(self) -> int:
        """Rows of the network's call, at each step."""
        return self.job.conditioning.evaluations

    @property
    def rows_left(self) -> int:
        return (self.steps - self.job.cursor) * self.rows

    @property
    def call_key(self) -> tuple[Any, ...]:
        """Equal for two pictures that can share a call of the network."""
        return tuple(self.job.state.shape), self.job.conditioning.call_key


class Engine:
    """Steps pictures, the one with the least left first, with ageing.

    Clients add requests, call `step` while `busy`, and take the tickets that are finished. They
    may look at a ticket's job between steps, and must not change it.

    exact: each call of the network holds one picture, so that no neighbour changes a last bit.
    rows: most rows of a call; None measures the largest batch that pays off. background: decode
    in a thread beside the steps.
    """

    def __init__(
        self,
        model: Model,
        *,
        exact: bool = True,
        rows: int | None = None,
        background: bool = False,
    ) -> None:
        self.model, self.exact = model, exact
        self.rows = rows or (1 if exact else largest_useful_batch(model))
        self.tickets: list[Ticket] = []
        self._seconds_a_row = 0.01  # measured as it goes
        self._prompts: OrderedDict[Any, Conditioning] = OrderedDict()
        self._decoder = ThreadPoolExecutor(1, "decode") if background else None
        self._undecoded: list[Ticket] = []
        self._decoding: dict[Future[Image.Image], Ticket] = {}

    @property
    def busy(self) -> bool:
        """Whether a picture is not finished."""
        return bool(self.tickets or self._undecoded or self._decoding)

    @property
    def rows_a_second(self) -> float:
        return 1 / self._seconds_a_row

    def add(self, request: Request, tag: Any = None, done: Collection[int] = ()) -> Result:
        """Take in the pictures of a request, without those whose index is in `done`.

        They join at the next step. Returns the result that they belong to, without pictures yet.
        Raises SafelightError if the request does not fit the model.
        """
        model = self.model
        try:
            with torch.inference_mode():
                resolved = resolve_request(model, request)
                result = new_result(model, request, resolved, self.exact)
                for i, seed in enumerate(result.seeds):
                    if i not in done:
                        one = with_drawn(resolved, result, seed)
                        job = create_job(model, one, self._conditioning(one), seed)
                        self.add_job(job, tag, index=i, seed=seed)
        except (MemoryError, RuntimeError) as error:  # of a large picture to start from
            if not out_of_memory(error):
                raise
            free_memory(model.device)
            raise too_large() from None
        return result

    def add_job(self, job: Job, tag: Any = None, *, index: int = 0, seed: int = 0) -> Ticket:
        """Take in a job that was prepared elsewhere, and return its ticket."""
        ticket = Ticket(job, index, seed, self.model.precision, tag)
        self.tickets.append(ticket)
        return ticket

    def drop(self, tag: Any) -> None:
        """Forget the pictures of this tag."""
        self.tickets = [ticket for ticket in self.tickets if ticket.tag != tag]
        self._undecoded = [ticket for ticket in self._undecoded if ticket.tag != tag]
        self._decoding = {f: t for f, t in self._decoding.items() if t.tag != tag}

    def step(self) -> tuple[list[Ticket], list[Ticket]]:
        """Take the first in turn a step further, or decode a picture.

        Returns the tickets that took a step, and those that are finished, with image or error.
        """
        stepped: list[Ticket] = []
        finished: list[Ticket] = []
        if self._undecoded:
            self._decode(self._undecoded.pop(0))
        elif self.tickets:
            stepped, finished = self._advance(self._turn())
            for ticket in stepped:
                if ticket.job.done:
                    self.tickets.remove(ticket)
                    if self._decoder is None:
                        self._undecoded.append(ticket)
                    else:
                        self._decode(ticket)
        elif self._decoding:
            next(iter(self._decoding)).exception()  # waits
        return stepped, finished + list(self._decoded())

    def check(self) -> bool:
        """Return whether the network answers with finite numbers."""
        with torch.inference_mode():
            return bool(probe(self.model, 1).isfinite().all())

    def _turn(self) -> list[Ticket]:
        """Return the first in turn, and those that fit beside it."""
        now = time.monotonic()

        def urgency(ticket: Ticket) -> float:
            return ticket.rows_left - AGEING * (now - ticket.arrived) / self._seconds_a_row

        order = sorted(self.tickets, key=urgency)
        chosen, room = [order[0]], self.rows - order[0].rows
        for ticket in order[1:] if not self.exact else ():
            if ticket.call_key == order[0].call_key and ticket.rows <= room:
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
            free_memory(self.model.device)
            if len(tickets) == 1:
                return [], self._fail(tickets, too_large())
            # None has moved: half of them now, and no more at once from here on.
            self.rows = max(1, sum(ticket.rows for ticket in tickets) // 2)
            return self._advance(tickets[: len(tickets) // 2])
        seconds = (time.monotonic() - began) / sum(ticket.rows for ticket in tickets)
        self._seconds_a_row += 0.1 * (seconds - self._seconds_a_row)
        return tickets, []

    def _fail(self, tickets: list[Ticket], error: Exception) -> list[Ticket]:
        for ticket in tickets:
            ticket.error = error
            self.tickets.remove(ticket)
        return tickets

    def _decode(self, ticket: Ticket) -> None:
        """Begin to decode a picture, or decode it here where there is no thread for it."""
        if self._decoder is not None:
            future = self._decoder.submit(self._finish, ticket.job)
        else:
            future = Future()
            try:
                future.set_result(self._finish(ticket.job))
            except Exception as error:
                future.set_exception(error)
        self._decoding[future] = ticket

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
                free_memory(self.model.device)
                ticket.error = too_large()
            else:
                raise error
            yield ticket

    def _conditioning(self, request: Request) -> Conditioning:
        """Return the cached conditioning of a resolved request."""
        family = self.model.family
        key = family.conditioning_key(request)
        if key not in self._prompts:
            made = family.encode(self.model, request)
            if not made.is_finite:
                return made  # what went wrong once may go well the next time
            self._prompts[key] = made
            while len(self._prompts) > MAX_PROMPTS:
                self._prompts.popitem(last=False)
        self._prompts.move_to_end(key)
        return self._prompts[key]
