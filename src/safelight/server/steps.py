"""Ask a worker for a real step, to see whether it can draw."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Steps:
    """Calls that wait for a step of the worker. For use in the event loop."""

    def __init__(self) -> None:
        self._waiting: list[asyncio.Future[bool]] = []

    async def taken(self, ask: Callable[[], None], seconds: float) -> bool | None:
        """Return whether a step could be taken; None if no step ended within `seconds`.

        ask: asks the worker. One step answers all calls that wait for it.
        """
        future = asyncio.get_running_loop().create_future()
        if not self._waiting:
            ask()
        self._waiting.append(future)
        try:
            async with asyncio.timeout(seconds):
                return await future
        except TimeoutError:
            return None
        finally:
            if future in self._waiting:
                self._waiting.remove(future)

    def answer(self, well: bool) -> None:
        """Answer all calls that wait. well: whether the step could be taken."""
        for future in self._waiting:
            if not future.done():
                future.set_result(well)
        self._waiting.clear()
