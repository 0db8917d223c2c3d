"""Ask a worker for a real step, to see whether it draws."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Steps:
    """Those who wait for a step of the worker. For the event loop."""

    def __init__(self) -> None:
        self._waiting: list[asyncio.Future[bool]] = []

    async def taken(self, ask: Callable[[], None], seconds: float) -> bool | None:
        """Return whether a step could be taken; None if none came to its end within `seconds`.

        ask: asks the worker. One step answers all who wait for it.
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
        """Tell all who wait."""
        for future in self._waiting:
            if not future.done():
                future.set_result(well)
        self._waiting.clear()
