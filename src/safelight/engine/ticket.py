"""One picture in the making, as the engine keeps it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from PIL import Image

from safelight.engine.job import Job
from safelight.sampling import Table

if TYPE_CHECKING:
    from safelight.adapters.select import Selection
    from safelight.model import Model


@dataclass(eq=False)
class Ticket:
    """One picture in the making.

    table: of its job. size: its latents' numbers, as a multiple of those of the model's own size.
    index: which picture of its request. tag: whatever the client knows it by. share: whose it is,
    as `Turns` has it. dtype: the precision that it is drawn in. evaluations: rows of the network's
    call, at each step; about so many before it is prepared. prepare: makes the job, and the model
    that draws it, when its turn comes. selection: its LoRAs, None without. image or error: set when
    it is finished.
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
    selection: Selection | None = None
    arrived: float = field(default_factory=time.monotonic)
    image: Image.Image | None = None
    error: Exception | None = None
    _made: tuple[Model, Job] | None = None

    @property
    def job(self) -> Job:
        """Its state; made now if its turn has not come yet."""
        return self._ready[1]

    @property
    def model(self) -> Model:
        """The model that takes its next step; made now if its turn has not come yet."""
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
        """Rows of its table, those that are taken included."""
        return len(self.table.rows)

    @property
    def rows(self) -> int:
        """Rows of the network's call, at each step."""
        return self.job.asked.evaluations if self.prepared else self.evaluations

    @property
    def load(self) -> float:
        """Rows of the model's own size that take as long as a step."""
        return self.rows * self.size

    @property
    def work_left(self) -> float:
        """Rows of the model's own size that take as long as all of its steps to come."""
        taken = self.job.cursor if self.prepared else -1  # to prepare is a step, too
        return (self.steps - taken) * self.load

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
    fit beside those in the making waits for their end. While the oldest waits so, no other picture
    with LoRAs is begun: its turn comes.

    fits: whether sets of so many bytes may be there at once.
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
