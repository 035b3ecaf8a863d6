"""Ends a call whose reader takes nothing for too long."""

from __future__ import annotations

import asyncio
from types import TracebackType


class StallWatch:
    """Around the writes of one task: one timer for all of them, as most take microseconds.

    with watch:
        watch.begin(); await write(...); watch.done()

    Raises `TimeoutError` from the block when a write has lasted `max_s` seconds.
    """

    def __init__(self, max_s: float) -> None:
        self._max_s = max_s
        self._since: float | None = None
        self._stalled = False

    def begin(self) -> None:
        """A write begins."""
        self._since = self._loop.time()

    def done(self) -> None:
        """The write has ended."""
        self._since = None

    def __enter__(self) -> None:
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("a stall watch needs a task")
        self._task, self._loop = task, asyncio.get_running_loop()
        self._arm(self._loop.time())

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._timer.cancel()
        # somebody else may have cancelled the task as well, and then it ends for that
        if self._stalled and self._task.uncancel() == 0 and kind is asyncio.CancelledError:
            raise TimeoutError from error

    def _arm(self, since: float) -> None:
        self._timer = self._loop.call_at(since + self._max_s, self._check)

    def _check(self) -> None:
        now = self._loop.time()
        if self._since is not None and now >= self._since + self._max_s:
            self._stalled = True
            self._task.cancel()
        else:
            self._arm(now if self._since is None else self._since)
