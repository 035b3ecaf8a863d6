"""Group commit: what the event loop brings in one of its turns is written by one transaction.

A thread of its own writes; the next batch gathers while it does. What waits for a batch is told on
the event loop, in order, once the batch is durable.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from phalanx.controller.scheduling.request import TokenEvent
from phalanx.protos.errors import JournalLost

from .file import JournalFile
from .records import Entry, Header, Kept, encode_events, encode_header

RETRY_S = 10.0
RETRY_EVERY_S = 0.25
PRUNE_EVERY_S = 5.0

OnCommit = Callable[[float, int], None]
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Work:
    number: int
    header: Header | None = None
    events: Sequence[TokenEvent] = ()
    over: bool = False
    then: Callable[[], None] | None = None

    def entry(self) -> Entry:
        return Entry(
            self.number,
            b"" if self.header is None else encode_header(self.header),
            [encode_events(self.events)] if self.events else [],
            self.over,
        )


class DurableJournal:
    """A journal on disk. Create and use it on one running event loop.

    keep_s and keep_bytes: for how long, and up to which size, finished requests are kept.
    on_commit: told, on the event loop, the seconds that a commit took and the bytes now kept.
    """

    durable = True

    def __init__(
        self,
        file: JournalFile,
        *,
        keep_s: float,
        keep_bytes: int,
        on_commit: OnCommit = lambda seconds, size: None,
    ) -> None:
        self._file, self._keep_s, self._keep_bytes = file, keep_s, keep_bytes
        self._loop = asyncio.get_running_loop()
        self._next_number = file.next_number
        self._pending: list[_Work] = []
        self._queue: queue.SimpleQueue[list[_Work] | None] = queue.SimpleQueue()
        self._on_commit = on_commit
        self.on_lost: Callable[[JournalLost], None] = lambda error: None
        """Called once, on the event loop, when nothing more can be written."""
        self._lost: asyncio.Future[None] = self._loop.create_future()
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)
        self._thread.start()

    def adopt(self, model: str) -> None:
        """See `JournalFile.adopt`; before anything is written."""
        self._file.adopt(model)

    @property
    def unfinished(self) -> list[Kept]:
        """What an earlier controller had accepted and not ended; to be read once, at the start."""
        return self._file.unfinished

    def begin(self, header: Header) -> int:
        """A request is accepted. Returns its number; what comes of it is durable after it."""
        number, self._next_number = self._next_number, self._next_number + 1
        self._put(_Work(number, header))
        return number

    def append(
        self,
        number: int,
        events: Sequence[TokenEvent],
        *,
        over: bool,
        then: Callable[[], None],
    ) -> None:
        """Events of a request, the last ones if it is `over`. `then` is called when durable."""
        self._put(_Work(number, None, events, over, then))

    def forget(self, number: int) -> None:
        """The request was refused after all."""
        self._put(_Work(number, over=True))

    def find(self, tenant: str, request_id: str) -> Kept | None:
        """A finished request that is still kept."""
        return self._file.find(tenant, request_id)

    async def watch(self) -> None:
        """Return never; raises `JournalLost` when nothing more can be written."""
        await asyncio.shield(self._lost)

    async def close(self) -> None:
        """Write what waits and give the journal back."""
        self._flush()
        self._queue.put(None)
        await asyncio.to_thread(self._thread.join)
        self._file.close()
        if self._lost.done():
            self._lost.exception()  # seen
        else:
            self._lost.cancel()

    def _put(self, work: _Work) -> None:
        if not self._pending:
            # after all tasks that this step has woken have had their turn
            self._loop.call_soon(self._flush)
        self._pending.append(work)

    def _flush(self) -> None:
        if self._pending:
            batch, self._pending = self._pending, []
            self._queue.put(batch)

    # --- the thread ---

    def _run(self) -> None:
        pruned = 0.0
        over = False
        while not over:
            over, batch = self._next()
            if not batch:
                continue
            began = time.perf_counter()
            try:
                self._write([work.entry() for work in batch])
            except Exception as error:  # noqa: BLE001  whatever it is, nothing was written
                self._fail(error)
                return
            seconds = time.perf_counter() - began
            self._call(self._done, batch, seconds, self._file.size)
            if time.monotonic() > pruned + PRUNE_EVERY_S:
                pruned = time.monotonic()
                self._prune()

    def _next(self) -> tuple[bool, list[_Work]]:
        """All batches that wait, at least one; and whether they are the last."""
        batch: list[_Work] = []
        more = self._queue.get()
        while more is not None:
            batch += more
            try:
                more = self._queue.get_nowait()
            except queue.Empty:
                return False, batch
        return True, batch

    def _write(self, entries: list[Entry]) -> None:
        """A disk may be full, or busy, for a while: streams wait meanwhile."""
        deadline = time.monotonic() + RETRY_S
        while True:
            try:
                return self._file.write(entries, time.time())
            except sqlite3.OperationalError as error:
                if time.monotonic() > deadline:
                    raise
                _log.warning("the journal waits for its disk: %s", error)
                time.sleep(RETRY_EVERY_S)

    def _prune(self) -> None:
        try:
            self._file.prune(time.time() - self._keep_s, self._keep_bytes)
        except sqlite3.Error as error:
            _log.warning("finished requests could not be dropped from the journal: %s", error)

    def _fail(self, error: Exception) -> None:
        if not isinstance(error, JournalLost):
            _log.error("the journal cannot be written: %s", error)
            error = JournalLost("the journal cannot be written")
        self._call(self._lose, error)

    def _call(self, function: Callable[..., None], *arguments: object) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *arguments)

    # --- back on the event loop ---

    def _done(self, batch: list[_Work], seconds: float, size: int) -> None:
        self._on_commit(seconds, size)
        for work in batch:
            if work.then is not None:
                work.then()

    def _lose(self, error: JournalLost) -> None:
        if not self._lost.done():
            self._lost.set_exception(error)
            self.on_lost(error)
