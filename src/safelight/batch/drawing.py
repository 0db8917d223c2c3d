"""Draw rows with the engine: as many at once as pay off, or one at a time in exact mode."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from safelight.batch.check import Row
from safelight.batch.output import Outcome
from safelight.engine import Engine
from safelight.errors import SafelightError
from safelight.picture import SUFFIXES, encode
from safelight.recipe import png_texts
from safelight.weights import load_model

if TYPE_CHECKING:
    from safelight.batch.run import How
    from safelight.engine import Ticket
    from safelight.model import Model
    from safelight.result import Result

MAX_FAULTS = 5
"""The number of rows in succession that may fail by a fault of the program before the run ends."""


@dataclass
class _Held:
    """A row in the making: its pictures by their index, each with its recipe."""

    row: Row
    result: Result
    left: int
    pictures: dict[int, tuple[bytes, dict[str, Any]]] = field(default_factory=dict)


class Drawer:
    """Draws rows of one model."""

    def __init__(
        self,
        model: str,
        how: How,
        *,
        load: Callable[..., Model] = load_model,
        tell: Callable[[str], object] = lambda text: None,
    ) -> None:
        if how.threads is not None:
            torch.set_num_threads(how.threads)
        self._how, self._tell, self._faults = how, tell, 0
        self.model = load(model, **how.loading)
        self._engine = Engine(self.model, exact=how.exact)

    @property
    def at_once(self) -> int:
        """Rows that are taken in at once: more than fill a call of the network.

        So the calls stay full while some rows are decoded.
        """
        return 1 if self._how.exact else max(2, self._engine.rows)

    def draw(self, rows: Iterable[Row]) -> Iterator[Outcome]:
        """Yield the outcome of each row, in the order in which they finish."""
        waiting, held = iter(rows), dict[int, _Held]()
        while True:
            while len(held) < self.at_once and (row := next(waiting, None)) is not None:
                try:
                    held[row.number] = self._begin(row)
                except SafelightError as error:
                    yield failed(row, error)
                except Exception as error:
                    yield self._fault(row, error)
            if not held:
                return
            try:
                yield from self._step(held)
            except (SafelightError, GeneratorExit):
                raise
            except Exception as error:
                # Drawing each row alone shows which one is at fault.
                suspects = [one.row for one in held.values()]
                held.clear()
                self._engine = Engine(self.model, exact=self._how.exact, rows=self._engine.capacity)
                if len(suspects) == 1:
                    yield self._fault(suspects[0], error)
                else:
                    for row in suspects:
                        yield from self.draw([row])

    def _begin(self, row: Row) -> _Held:
        request = row.request()
        result = self._engine.add(request, row.number)
        return _Held(row, result, request.count)

    def _step(self, held: dict[int, _Held]) -> Iterator[Outcome]:
        """Take a step, and yield the rows that it finished."""
        _, finished = self._engine.step()
        for ticket in finished:
            one = held.get(ticket.tag)
            if one is None:  # the error of another picture ended it
                continue
            if ticket.error is not None:
                self._engine.drop(ticket.tag)
                outcome = failed(one.row, ticket.error)
            else:
                self._keep(one, ticket)
                if one.left:
                    continue
                outcome = _finished(one)
            del held[ticket.tag]
            self._faults = 0
            yield outcome

    def _keep(self, held: _Held, ticket: Ticket) -> None:
        assert ticket.image is not None
        made = replace(held.result, images=[ticket.image], seeds=[ticket.seed], dtype=ticket.dtype)
        recipe = made.recipe(0)
        data = encode(ticket.image, SUFFIXES[f".{self._how.ending}"], png_texts(recipe))
        held.pictures[ticket.index] = data, recipe
        held.left -= 1

    def _fault(self, row: Row, error: Exception) -> Outcome:
        """Return the outcome of a row at which the program failed; raise after several of them."""
        self._faults += 1
        if self._faults >= MAX_FAULTS:
            raise error
        self._tell("".join(traceback.format_exception(error)))
        told = SafelightError(f"a fault of Safelight: {type(error).__name__}", code="internal")
        return failed(row, told)


def failed(row: Row, error: Exception) -> Outcome:
    """Return the outcome of a row that cannot be drawn.

    Raises the error instead if every other row would fail by it, too.
    """
    code = getattr(error, "code", "internal")
    if code == "weights_changed":
        raise error
    return Outcome(row.id, row.name, {"line": row.line}, error=(code, str(error)))


def _finished(held: _Held) -> Outcome:
    row, result = held.row, held.result
    pictures = [held.pictures[i] for i in sorted(held.pictures)]
    recipes = [recipe for _, recipe in pictures]
    record = {
        "id": row.id,
        "line": row.line,
        "model": row.model,
        "seeds": [recipe["settings"]["seed"] for recipe in recipes],
        "width": recipes[0]["size"][0],
        "height": recipes[0]["size"][1],
        "warnings": result.warnings,
        "request": row.digest,
    }
    return Outcome(row.id, row.name, record, [data for data, _ in pictures], recipes)
