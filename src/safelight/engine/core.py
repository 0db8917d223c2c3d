"""The one step loop: pictures that join at any step and leave when they are done.

Pictures of different samplers, step counts, guidance and tasks share a call of the network while
their states have one shape.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from safelight.adapters.embeddings import key_of
from safelight.engine.capacity import Capacity, free_memory, out_of_memory, probe, too_large
from safelight.engine.conditionings import Conditionings
from safelight.engine.job import Job, NotFiniteError, advance, finish
from safelight.engine.passes import later_of
from safelight.engine.references import latents_read
from safelight.engine.refining import table_of
from safelight.engine.requests import (
    create_job,
    latents_of,
    new_result,
    resolve_request,
    select_loras,
    with_drawn,
)
from safelight.engine.ticket import Ticket, admitted
from safelight.engine.turns import Turns
from safelight.errors import SafelightError
from safelight.families.base import Conditioning
from safelight.hires import first_pass
from safelight.request import Request
from safelight.result import Result

if TYPE_CHECKING:
    from safelight.adapters.select import Selection
    from safelight.model import Model

LISTEN = 0.2
"""Seconds that `Engine.step` waits for a picture to be decoded before it returns."""


class Engine:
    """Draws many pictures, a step at a time.

    Short pictures do not wait for long ones, nor long ones for ever; see `Turns`. Clients add
    requests, call `step` while `busy`, and take the tickets that are finished. They may look at a
    ticket's job between steps, and must not change it.

    exact: each call of the network holds one picture, so that no other picture changes its last
    bits. rows: the most rows of a call, or the Capacity to use. None: 1 if `exact`, else learned.
    background: for a server. Encoding an input picture is a step of its own, and a thread decodes
    pictures beside the steps, one at a time. working: a context for decoding and applying LoRAs.

    Engines of one model in several threads take turns by `Model.lock`, because layers keep packed
    weights and the text of their last call. The decoding thread takes no lock, as only it uses the
    decoder: so a model with a `background` engine has no other engine.
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
        self._conditionings = Conditionings()
        self._decoder = ThreadPoolExecutor(1, "decode") if background else None
        self._undecoded: list[Ticket] = []
        self._turns = Turns()
        self._decoding: dict[Future[Image.Image], Ticket] = {}
        self._in_flight: Future[Image.Image] | None = None

    @property
    def busy(self) -> bool:
        """Whether a picture is unfinished, or a dropped one is still being decoded."""
        return bool(self.tickets or self._undecoded or self._decoding or self.decoding)

    @property
    def decoding(self) -> bool:
        """Whether the thread is decoding a picture now, even one that was dropped."""
        return self._in_flight is not None and not self._in_flight.done()

    @property
    def rows(self) -> int:
        """The most rows of a call, in pictures of the model's own size."""
        return self.capacity.rows

    @property
    def rows_a_second(self) -> float:
        """Rows per second, in pictures of the model's own size, as measured."""
        return 1 / self._seconds_a_row

    def add(
        self, request: Request, tag: Any = None, done: Collection[int] = (), share: Any = None
    ) -> Result:
        """Add the pictures of a request, without those whose index is in `done`.

        They join at the next step. Input pictures are encoded now, or with `background` when their
        turn comes. share: the owner; all owners get the same time. Returns the result of the
        request, without pictures yet.
        Raises SafelightError if the request does not fit the model or the memory.
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
                    one = first_pass(asked := with_drawn(resolved, result, seed))
                    selection = select_loras(model, one, result, seed, self._own)
                    measure = partial(self._size, beside=latents_read(model, one))
                    size = measure(latents_of(model, one))
                    guided = one.guidance_scale > 1 and not model.family.takes_guidance(model)
                    rows = 1 + guided
                    if selection is None:
                        rows = self._conditioning(model, one).evaluations
                    make = partial(self._make, seed=seed, selection=selection)
                    ticket = Ticket(
                        *(table, rows, size, i, seed, model.precision, tag, share),
                        prepare=partial(make, one),
                        later=later_of(model, asked, measure, make, result.upscaler),
                        selection=selection,
                        arrived=arrived,
                    )
                    # Slow preparations wait for their turn: LoRAs, and input pictures in a server.
                    waits = self._decoder is not None and bool(request.pictures)
                    if selection is None and not waits:
                        _ = ticket.job
                    tickets.append(ticket)
        except (MemoryError, RuntimeError) as error:  # from a large input picture
            if not out_of_memory(error):
                raise
            free_memory(model.device)
            raise too_large() from None
        self.tickets += tickets
        return result

    def add_job(self, job: Job, tag: Any = None) -> Ticket:
        """Add a job that was prepared elsewhere, and return its ticket."""
        size, rows = self._size(tuple(job.state.shape)), job.conditioning.evaluations
        ticket = Ticket(job.table, rows, size, 0, 0, dtype=self.model.precision, tag=tag)
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
            cached = partial(self._conditionings.get, None)  # LoRAs and embeddings do not change it
            drawn = request.fitted()
            return model, create_job(model, drawn, conditioning, seed, second, cached)

    def _size(self, shape: tuple[int, ...], beside: int = 0) -> float:
        """Return the size of latents. beside: the numbers of reference pictures' latents."""
        own = self.model.family.latent_shape(self.model, self.model.native_size)
        return max(1.0, (math.prod(shape) + beside) / math.prod(own))

    def close(self) -> None:
        """End the decoding thread after its current picture; nothing can be added afterwards."""
        if self._decoder is not None:
            self._decoder.shutdown(wait=False)

    def drop(self, tag: Any) -> None:
        """Remove the pictures with this tag."""
        self.tickets = [ticket for ticket in self.tickets if ticket.tag != tag]
        self._undecoded = [ticket for ticket in self._undecoded if ticket.tag != tag]
        self._decoding = {f: t for f, t in self._decoding.items() if t.tag != tag}

    def step(self, listen: float = LISTEN) -> tuple[list[Ticket], list[Ticket]]:
        """Take a step of the pictures whose turn it is, or encode or decode a picture.

        listen: seconds to wait for a picture to be decoded when there is nothing else to do.
        Returns the tickets that took a step, and those that are finished, with image or error.
        """
        stepped: list[Ticket] = []
        finished: list[Ticket] = []
        self._go_on()
        self._begin_decoding()
        if self._decoder is None and self._decoding:
            pass  # decoding was the step
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
        """Return the ticket whose turn it is, and those that share its call.

        No other share gets more of the call than the share whose turn it is. Otherwise a share with
        one picture would wait for the many pictures of another, as more rows make a call longer.
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
        """Take a step of these tickets, and note the time of each share."""
        with self.model.lock:
            began, loads = time.monotonic(), [(ticket.share, ticket.load) for ticket in tickets]
            outcome = self._advance(tickets) if tickets[0].prepared else self._prepare(tickets[0])
            self._turns.note(loads, time.monotonic() - began)
        return outcome

    def _prepare(self, ticket: Ticket) -> tuple[list[Ticket], list[Ticket]]:
        try:
            if not ticket.enlarge():
                _ = ticket.job
        except SafelightError as error:
            return [], self._fail([ticket], error)
        except (MemoryError, RuntimeError) as error:  # from a large input picture
            if not out_of_memory(error):
                raise
            free_memory(self.model.device)
            return [], self._fail([ticket], too_large())
        return [], []

    def _advance(self, tickets: list[Ticket]) -> tuple[list[Ticket], list[Ticket]]:
        began, first = time.monotonic(), tickets[0].job  # of a call, all are alike
        counts = first.plan(tickets[0].model).full and not first.asked.control
        load = sum(ticket.load for ticket in tickets)  # the next step's may be another
        try:
            with torch.inference_mode():
                advance(tickets[0].model, [ticket.job for ticket in tickets])
        except NotFiniteError as error:
            lost = [t for t in tickets if any(t.job is job for job in error.jobs)]
            return [t for t in tickets if t not in lost], self._fail(lost, error)
        except SafelightError as error:  # for example, the file of weights was overwritten
            return [], self._fail(tickets, error)
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            free_memory(self.model.device)
            if len(tickets) == 1:
                return [], self._fail(tickets, too_large())
            # No job has advanced: retry with half of them, and keep later calls as small.
            self.capacity.set(max(1, sum(ticket.rows for ticket in tickets) // 2))
            return self._advance(tickets[: len(tickets) // 2])
        seconds = time.monotonic() - began
        self._seconds_a_row += 0.1 * (seconds / load - self._seconds_a_row)
        if counts:
            self.capacity.note(load, seconds)
        return tickets, []

    def _fail(self, tickets: list[Ticket], error: Exception) -> list[Ticket]:
        for ticket in tickets:
            ticket.error = error
            self.tickets.remove(ticket)
        return tickets

    def _go_on(self) -> None:
        """Let the pictures whose first pass is decoded take the steps of their second."""
        for future in self._done(first=True):
            ticket = self._decoding.pop(future)
            ticket.go_on(future.result())
            self.tickets.append(ticket)

    def _done(self, *, first: bool) -> list[Future[Image.Image]]:
        """Return what is decoded: the pictures of first passes that go on, or the others."""
        done = [(future, ticket) for future, ticket in self._decoding.items() if future.done()]
        return [f for f, t in done if (t.later is not None and f.exception() is None) is first]

    def _begin_decoding(self) -> None:
        """Start decoding the smallest picture in the thread, or decode it here if there is none.

        Among equal sizes, the one whose share had the least time is first. Only one picture is
        decoded at a time, as a smaller one may come meanwhile.
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
        for future in self._done(first=False):
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

        model: with its LoRAs. before: where `model` is a refiner, the model whose steps it
        continues; both read the same embeddings.
        """
        chosen = (before or model).embeddings.choose(request)
        # A refiner of the same family has text encoders of its own.
        own = before is None, selection and selection.key, key_of(chosen)
        cached = partial(self._conditionings.get, own)
        return model.family.conditioning(model.embeddings.model(chosen), request, cached)
