"""The one step loop: pictures that join at any step and leave when they are done.

Pictures of different samplers, step counts, guidance and tasks share a call of the network while
their states have one shape.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from safelight.adapters.embeddings import key_of
from safelight.engine.capacity import Capacity, free_memory, out_of_memory, probe
from safelight.engine.job import Job, NotFiniteError, advance, finish
from safelight.engine.refining import table_of
from safelight.engine.requests import (
    create_job,
    new_result,
    resolve_request,
    select_loras,
    with_drawn,
)
from safelight.engine.ticket import Ticket, admitted
from safelight.engine.turns import Turns
from safelight.errors import SafelightError
from safelight.families.base import Conditioning
from safelight.request import Request
from safelight.result import Result

if TYPE_CHECKING:
    from safelight.adapters.select import Selection
    from safelight.model import Model

LISTEN = 0.2
"""Seconds after which one who waits for a picture to be decoded may do something else."""

MAX_PROMPTS = 64
"""Prompts whose conditioning is kept."""


def too_large() -> SafelightError:
    """Return the error for a picture that there is no memory for."""
    return SafelightError("out of memory: ask for a smaller picture", code="out_of_memory")


class Engine:
    """Steps pictures in turn, so that short ones do not wait for long ones, nor these for ever; see
    `Turns`.

    Clients add requests, call `step` while `busy`, and take the tickets that are finished. They
    may look at a ticket's job between steps, and must not change it.

    exact: each call of the network holds one picture, so that no neighbour changes a last bit.
    rows: most rows of a call, or what learns how many pay off; None learns it anew.
    background: for a server. To encode a picture to start from is a step of its own, and pictures
    are decoded in a thread beside the steps, one at a time, each within `working()`.

    Engines of one model, each in a thread of its own, take turns by `Model.lock`: layers keep what
    they packed, and the text of their last call. A thread that decodes needs no turn, as what it
    computes with belongs to it alone; so a model has one engine with `background`, and no other.
    """

    def __init__(
        self,
        model: Model,
        *,
        exact: bool = True,
        rows: int | Capacity | None = None,
        background: bool = False,
        working: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.model, self.exact = model.base or model, exact
        self._own = model.selection
        self._working = working
        if not isinstance(rows, Capacity):
            rows = Capacity(rows or (1 if exact else None))
        self.capacity = rows
        self.tickets: list[Ticket] = []
        self._seconds_a_row = 0.01  # measured as it goes
        self._prompts: OrderedDict[Any, Conditioning] = OrderedDict()
        self._decoder = ThreadPoolExecutor(1, "decode") if background else None
        self._undecoded: list[Ticket] = []
        self._turns = Turns()
        self._decoding: dict[Future[Image.Image], Ticket] = {}
        self._in_flight: Future[Image.Image] | None = None

    @property
    def busy(self) -> bool:
        """Whether a picture is not finished, or one that was dropped is still being decoded."""
        return bool(self.tickets or self._undecoded or self._decoding or self.decoding)

    @property
    def decoding(self) -> bool:
        """Whether the thread decodes a picture now, be it one that was dropped."""
        return self._in_flight is not None and not self._in_flight.done()

    @property
    def rows(self) -> int:
        """The most rows of a call, of pictures of the model's own size."""
        return self.capacity.rows

    @property
    def rows_a_second(self) -> float:
        """Rows of the model's own size."""
        return 1 / self._seconds_a_row

    def add(
        self, request: Request, tag: Any = None, done: Collection[int] = (), share: Any = None
    ) -> Result:
        """Take in the pictures of a request, without those whose index is in `done`.

        They join at the next step. Pictures to start from are encoded now, or in a server when
        their turn comes. share: whose they are; shares have the same time. Returns the result that
        they belong to, without pictures yet.
        Raises SafelightError if the request does not fit the model.
        """
        model = self.model
        tickets: list[Ticket] = []
        try:
            with model.lock, torch.inference_mode():
                resolved = resolve_request(model, request)
                result = new_result(model, request, resolved, self.exact)
                (table, _), arrived = table_of(model, resolved), time.monotonic()
                for i, seed in enumerate(result.seeds):
                    if i in done:
                        continue
                    one = with_drawn(resolved, result, seed)
                    selection = select_loras(model, one, result, seed, self._own)
                    size = self._size(_latents(model, one))
                    rows = 1 + (one.guidance_scale > 1)
                    if selection is None:
                        rows = self._conditioning(model, one).evaluations
                    ticket = Ticket(
                        *(table, rows, size, i, seed, model.precision, tag, share),
                        prepare=partial(self._make, one, seed, selection),
                        selection=selection,
                        arrived=arrived,
                    )
                    # What takes long waits for its turn: LoRAs, and in a server pictures.
                    waits = self._decoder is not None and request.image is not None
                    if selection is None and not waits:
                        _ = ticket.job
                    tickets.append(ticket)
        except (MemoryError, RuntimeError) as error:  # of a large picture to start from
            if not out_of_memory(error):
                raise
            free_memory(model.device)
            raise too_large() from None
        self.tickets += tickets
        return result

    def add_job(self, job: Job, tag: Any = None, *, index: int = 0, seed: int = 0) -> Ticket:
        """Take in a job that was prepared elsewhere, and return its ticket."""
        size, rows = self._size(tuple(job.state.shape)), job.conditioning.evaluations
        ticket = Ticket(job.table, rows, size, index, seed, self.model.precision, tag)
        ticket.prepare = lambda: (self.model, job)
        _ = ticket.job
        self.tickets.append(ticket)
        return ticket

    def _make(self, request: Request, seed: int, selection: Selection | None) -> tuple[Model, Job]:
        """Return the job of one picture, and the model that draws it."""
        model = self.model
        with torch.inference_mode():
            if selection is not None:
                with self._working():
                    model = model.adapters.adapted(selection)
            conditioning = self._conditioning(model, request, selection)
            second = None
            if model.refiner is not None:
                second = self._conditioning(model.refiner, request, before=model)
            return model, create_job(model, request, conditioning, seed, second)

    def _size(self, shape: tuple[int, ...]) -> float:
        own = self.model.family.latent_shape(self.model, self.model.native_size)
        return max(1.0, math.prod(shape) / math.prod(own))

    def close(self) -> None:
        """End the thread that decodes, after the picture that it is at; nothing can be added."""
        if self._decoder is not None:
            self._decoder.shutdown(wait=False)

    def drop(self, tag: Any) -> None:
        """Forget the pictures of this tag."""
        self.tickets = [ticket for ticket in self.tickets if ticket.tag != tag]
        self._undecoded = [ticket for ticket in self._undecoded if ticket.tag != tag]
        self._decoding = {f: t for f, t in self._decoding.items() if t.tag != tag}

    def step(self, listen: float = LISTEN) -> tuple[list[Ticket], list[Ticket]]:
        """Take the first in turn a step further, or encode or decode a picture.

        listen: the seconds to wait where pictures are decoded and there is nothing else to do.
        Returns the tickets that took a step, and those that are finished, with image or error.
        """
        stepped: list[Ticket] = []
        finished: list[Ticket] = []
        self._begin_decoding()
        if self._decoder is None and self._decoding:
            pass  # that was the step
        elif self.tickets:
            stepped, finished = self._serve(self._turn())
            for ticket in stepped:
                if ticket.job.done:
                    self.tickets.remove(ticket)
                    self._undecoded.append(ticket)
            if self._decoder is not None:
                self._begin_decoding()
        elif self._in_flight is not None:
            wait([self._in_flight], listen)
        finished += list(self._decoded())
        return stepped, finished

    def check(self) -> bool:
        """Return whether the network answers with finite numbers."""
        with torch.inference_mode():
            return bool(probe(self.model, 1).isfinite().all())

    def _turn(self) -> list[Ticket]:
        """Return the first in turn, and those that fit beside it.

        No other share has more of the call than the share whose turn it is: more rows make a call
        longer, and one picture would wait for many of a share that has more.
        """
        tickets = self.tickets
        if any(ticket.selection for ticket in tickets):
            tickets = admitted(tickets, self.model.adapters.fits)
        first = self._turns.first(tickets)
        if not first.prepared or self.exact:
            return [first]
        key = first.call_key
        beside = [t for t in tickets if t.prepared and t.call_key == key]
        most = sum(ticket.load for ticket in beside if ticket.share == first.share)
        chosen, loads = [first], {first.share: first.load}
        for ticket in sorted(beside, key=lambda ticket: ticket.work_left):
            load = loads.get(ticket.share, 0.0) + ticket.load
            fits = sum(loads.values()) + ticket.load <= self.rows
            if ticket is not first and fits and load <= most:
                chosen.append(ticket)
                loads[ticket.share] = load
        return chosen

    def _serve(self, tickets: list[Ticket]) -> tuple[list[Ticket], list[Ticket]]:
        """Let these take a step, and note who had the time."""
        with self.model.lock:
            began = time.monotonic()
            outcome = self._advance(tickets) if tickets[0].prepared else self._prepare(tickets[0])
            self._turns.note(tickets, time.monotonic() - began)
        return outcome

    def _prepare(self, ticket: Ticket) -> tuple[list[Ticket], list[Ticket]]:
        try:
            _ = ticket.job
        except SafelightError as error:
            return [], self._fail([ticket], error)
        except (MemoryError, RuntimeError) as error:  # of a large picture to start from
            if not out_of_memory(error):
                raise
            free_memory(self.model.device)
            return [], self._fail([ticket], too_large())
        return [], []

    def _advance(self, tickets: list[Ticket]) -> tuple[list[Ticket], list[Ticket]]:
        began, full = time.monotonic(), tickets[0].job.plan(tickets[0].model).full
        try:
            with torch.inference_mode():
                advance(tickets[0].model, [ticket.job for ticket in tickets])
        except NotFiniteError as error:
            lost = [t for t in tickets if any(t.job is job for job in error.jobs)]
            return [t for t in tickets if t not in lost], self._fail(lost, error)
        except SafelightError as error:  # as of weights that were overwritten
            return [], self._fail(tickets, error)
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            free_memory(self.model.device)
            if len(tickets) == 1:
                return [], self._fail(tickets, too_large())
            # None has moved: half of them now, and no more at once from here on.
            self.capacity.set(max(1, sum(ticket.rows for ticket in tickets) // 2))
            return self._advance(tickets[: len(tickets) // 2])
        seconds, load = time.monotonic() - began, sum(ticket.load for ticket in tickets)
        self._seconds_a_row += 0.1 * (seconds / load - self._seconds_a_row)
        if full:
            self.capacity.note(load, seconds)
        return tickets, []

    def _fail(self, tickets: list[Ticket], error: Exception) -> list[Ticket]:
        for ticket in tickets:
            ticket.error = error
            self.tickets.remove(ticket)
        return tickets

    def _begin_decoding(self) -> None:
        """Begin to decode the smallest picture, or decode it here where there is no thread for it.

        Of two of one size, it is the one whose share had less time. None is begun beside another:
        what comes later may be smaller.
        """
        if not self._undecoded or self.decoding:
            return
        had = self._turns.had
        ticket = min(self._undecoded, key=lambda ticket: (ticket.size, had(ticket.share)))
        self._undecoded.remove(ticket)
        if self._decoder is not None:
            future = self._decoder.submit(self._finish, ticket.job)
        else:
            future = Future()
            try:
                with self.model.lock:
                    future.set_result(self._finish(ticket.job))
            except Exception as error:
                future.set_exception(error)
        self._decoding[future] = ticket
        self._in_flight = future if self._decoder is not None else None

    def _finish(self, job: Job) -> Image.Image:
        with self._working(), torch.inference_mode():
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

    def _conditioning(
        self,
        model: Model,
        request: Request,
        selection: Selection | None = None,
        before: Model | None = None,
    ) -> Conditioning:
        """Return the cached conditioning of a resolved request.

        model: with its LoRAs. before: the model whose steps a refiner goes on from; both read the
        same embeddings.
        """
        family, chosen = model.family, (before or model).embeddings.choose(request)
        key = (
            before is None,  # a refiner of the same family has text encoders of its own
            selection and selection.key,
            key_of(chosen),
            family.conditioning_key(request),
        )
        if key not in self._prompts:
            made = family.encode(model.embeddings.model(chosen), request)
            if not made.is_finite:
                return made  # what went wrong once may go well the next time
            self._prompts[key] = made
            while len(self._prompts) > MAX_PROMPTS:
                self._prompts.popitem(last=False)
        self._prompts.move_to_end(key)
        return self._prompts[key]


def _latents(model: Model, request: Request) -> tuple[int, ...]:
    """Return the shape of the latents of a resolved request."""
    width, height = request.width, request.height
    size = model.native_size if width is None or height is None else (width, height)
    return model.family.latent_shape(model, size)
