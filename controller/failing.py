"""Parts of the controller with failpoints in them; `app.py` takes them where tests ask for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from phalanx.protos.failpoints import Failpoints

from .handle import ReplicaHandle
from .journal.file import JournalFile
from .journal.records import Entry
from .journal.writer import DurableJournal
from .kvcache.blocks import BlockPool
from .kvcache.manager import KVCacheManager
from .scheduling.request import TokenEvent
from .supervisor import StartReplica


class FailingJournal(DurableJournal):
    """Fails before what was sampled is on disk, before an end is, and before it is sent."""

    def __init__(self, points: Failpoints, file: JournalFile, **more: Any) -> None:
        self.points = points
        super().__init__(file, **more)

    def _write(self, entries: list[Entry]) -> None:
        if any(entry.chunks for entry in entries):
            self.points.hit("sampled")
        if any(entry.over for entry in entries):
            self.points.hit("finishing")
        super()._write(entries)

    def append(
        self,
        number: int,
        events: Sequence[TokenEvent],
        *,
        over: bool,
        then: Callable[[], None],
    ) -> None:
        """See `DurableJournal.append`."""

        def durable() -> None:
            self.points.hit("journalled")
            then()

        super().append(number, events, over=over, then=durable)


class _FailingPool(BlockPool):
    points: Failpoints

    def free(self, block: int) -> None:
        """See `BlockPool.free`."""
        self.points.hit("releasing")
        super().free(block)


class FailingCache(KVCacheManager):
    """Fails while the blocks of a sequence are freed, some of them not yet."""

    def __init__(self, points: Failpoints, num_blocks: int, *arguments: Any, **more: Any) -> None:
        super().__init__(num_blocks, *arguments, **more)
        self._pool = pool = _FailingPool(num_blocks)
        pool.points = points


def failing_start(points: Failpoints, start: StartReplica) -> StartReplica:
    """`start`, failing when the new group is there and nothing knows of it."""

    async def failing(index: int, epoch: int, tp: int | None = None, /) -> ReplicaHandle:
        handle = await start(index, epoch, tp)
        points.hit("epoch")
        return handle

    return failing
