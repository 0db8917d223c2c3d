"""A ticket for each picture that the engine draws."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from PIL import Image

from safelight.engine.job import Job
from safelight.sampling import Table

if TYPE_CHECKING:
    from safelight.adapters.select import Selection
    from safelight.model import Model


@dataclass(frozen=True)
class Later:
    """The second pass of a picture whose first is being drawn; see `safelight.hires`.

    table, size: of its job, as in `Ticket`. begin: makes that job, and the model that draws it, of
    the first pass's picture. enlarge: enlarges that picture before, if a network does it: yields
    None after each tile, and then the enlarged picture.
    """

    table: Table
    size: float
    begin: Callable[[Image.Image], tuple[Model, Job]]
    enlarge: Callable[[Image.Image], Iterator[Image.Image | None]] | None = None


@dataclass(eq=False)
class Ticket:
    """One picture that is being drawn or waits for it.

    table: of its job. size: of its latents, as a multiple of the model's own size, at least 1.
    index: which picture of its request. tag: the client's key. share: the owner, see `Turns`.
    dtype: the precision that it is drawn in. evaluations: rows in a call of the network at each
    step, an estimate until it is prepared. prepare: makes the job, and the model that draws it,
    when its turn comes. later: the second pass, if one is still to come. selection: its LoRAs, or
    None. arrived: `time.monotonic` in seconds. image or error: set when it is finished.
    """

    table: Table
    evaluations: int
    size: float
    index: int
    seed: int
    dtype: str
    tag: Any = None
    share: Any = None
    prepare: Callable[[], tuple[Model, Job]] | None = None
    later: Later | None = None
    selection: Selection | None = None
    arrived: float = field(default_factory=time.monotonic)
    image: Image.Image | None = None
    error: Exception | None = None
    _made: tuple[Model, Job] | None = None
    _before: int = 0
    _tiles: tuple[Later, Iterator[Image.Image | None]] | None = None

    def go_on(self, picture: Image.Image) -> None:
        """Begin the second pass from the picture of the first; its job is made at its turn."""
        assert self.later is not None
        later, self.later = self.later, None
        self._before += len(self.table.rows)
        self.table, self.size = later.table, later.size
        self.prepare, self._made = partial(later.begin, picture), None
        if later.enlarge is not None:
            self._tiles = later, later.enlarge(picture)

    def enlarge(self) -> bool:
        """Make a tile of the picture between the passes. Return False if there is none to make."""
        if self._tiles is None:
            return False
        later, tiles = self._tiles
        if (picture := next(tiles)) is not None:
            self.prepare, self._tiles = partial(later.begin, picture), None
        return True

    @property
    def job(self) -> Job:
        """Its job; made now if it was not prepared yet."""
        return self._ready[1]

    @property
    def model(self) -> Model:
        """The model that takes its next step; made now if it was not prepared yet."""
        model, job = self._ready
        return job.model_at(job.cursor, model)

    @property
    def _ready(self) -> tuple[Model, Job]:
        if self._made is None:
            assert self.prepare is not None
            self._made, self.prepare = self.prepare(), None
        return self._made

    @property
    def prepared(self) -> bool:
        return self._made is not None

    @property
    def steps(self) -> int:
        """Rows of the tables of all its passes, including those already taken."""
        rest = 0 if self.later is None else len(self.later.table.rows)
        return self._before + len(self.table.rows) + rest

    @property
    def taken(self) -> int:
        """How many of its `steps` are taken."""
        return self._before + (self.job.cursor if self.prepared else 0)

    @property
    def rows(self) -> int:
        """Rows that its next step has in a call of the network."""
        return self.job.evaluations if self.prepared else self.evaluations

    @property
    def load(self) -> float:
        """Cost of a step, in rows of the model's own size."""
        return self.rows * self.size

    @property
    def work_left(self) -> float:
        """Cost of its remaining steps, in rows of the model's own size."""
        taken = self.job.cursor if self.prepared else -1  # preparing counts as a step
        left = (len(self.table.rows) - taken) * self.load
        if self.later is not None:
            left += (len(self.later.table.rows) + 1) * self.evaluations * self.later.size
        return left

    @property
    def call_key(self) -> tuple[Any, ...]:
        """Equal for two pictures that can share a call of the network."""
        model, job = self.model, self.job
        return id(model), tuple(job.state.shape), job.asked.call_key, job.plan(model)

    @property
    def set_key(self) -> tuple[Any, ...]:
        """Equal for two pictures with the same LoRAs; empty without."""
        return () if self.selection is None else self.selection.key


def admitted(tickets: list[Ticket], fits: Callable[[list[int]], bool]) -> list[Ticket]:
    """Return the tickets that may be served now.

    Each set of LoRAs takes the memory of the weights that it changes. A picture whose set does not
    fit beside those in use waits until they end. While the oldest picture waits for this, no other
    picture with LoRAs is begun, so that the oldest gets its turn.

    fits: whether sets of these sizes in bytes may be in memory at once.
    """
    live = {t.set_key: t.selection.size for t in tickets if t.prepared and t.selection}

    def may(ticket: Ticket) -> bool:
        if ticket.prepared or ticket.selection is None or ticket.set_key in live:
            return True
        return fits([*live.values(), ticket.selection.size])

    oldest = min(tickets, key=lambda ticket: ticket.arrived)
    if may(oldest):
        return [ticket for ticket in tickets if may(ticket)]
    return [ticket for ticket in tickets if ticket.prepared or ticket.selection is None]
