"""What one task waits for, over and over."""

from __future__ import annotations

import asyncio


class Bell:
    """An `asyncio.Event` for one waiting task at a time, at a third of the cost.

    Belongs to one event loop.
    """

    __slots__ = ("_loop", "_rung", "_waiter")

    def __init__(self) -> None:
        self._rung = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiter: asyncio.Future[None] | None = None

    def ring(self) -> None:
        """Let who waits go on, or who waits next."""
        self._rung = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def hush(self) -> None:
        """What it rang for is known."""
        self._rung = False

    async def wait(self) -> None:
        """Return once it has rung since the last time."""
        if not self._rung:
            if self._loop is None:
                self._loop = asyncio.get_running_loop()
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        self._rung = False
