"""What one task waits for, over and over."""

from __future__ import annotations

import asyncio


class Bell:
    """An `asyncio.Event` for one waiting task at a time, at a third of the cost.

    Belongs to one event loop.
    """

    __slots__ = ("_loop", "_muted", "_rung", "_urgent", "_waiter")

    def __init__(self) -> None:
        self._rung = self._urgent = False
        self._muted: asyncio.TimerHandle | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiter: asyncio.Future[None] | None = None

    def ring(self, *, urgent: bool = False) -> None:
        """Let who waits go on, or who waits next; while it is muted, only if it is urgent."""
        self._rung = True
        self._urgent = self._urgent or urgent
        if self._muted is None or self._urgent:
            self._wake()

    def hush(self) -> None:
        """What it rang for is known."""
        self._rung = self._urgent = False

    def mute(self, seconds: float) -> None:
        """Keep for so long to itself what is not urgent. Precondition: a loop runs."""
        self.unmute()
        self._muted = asyncio.get_running_loop().call_later(seconds, self._end_silence)

    def unmute(self) -> None:
        """Ring as ever."""
        if self._muted is not None:
            self._muted.cancel()
        self._muted = None

    def _end_silence(self) -> None:
        self._muted = None
        if self._rung:
            self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def wait(self) -> None:
        """Return once it has rung since the last time."""
        if not (self._urgent if self._muted else self._rung):
            if self._loop is None:
                self._loop = asyncio.get_running_loop()
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        self._rung = self._urgent = False
