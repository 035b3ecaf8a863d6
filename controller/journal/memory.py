"""The journal that is off: what runs, and what has ended not long ago, in this process's memory."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from phalanx.controller.scheduling.request import TokenEvent
from phalanx.protos.errors import JournalLost

from .records import Header, Kept, decode_kept, encode_events, encode_header

KEEP_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True)
class _Finished:
    number: int
    at: float
    header: bytes
    events: bytes

    @property
    def size(self) -> int:
        return len(self.header) + len(self.events)


class MemoryJournal:
    """Serves callers who lost their connection; nothing outlives the process."""

    durable = False

    def __init__(self, *, keep_s: float = 600.0, keep_bytes: int = KEEP_BYTES) -> None:
        self._keep_s, self._keep_bytes = keep_s, min(keep_bytes, KEEP_BYTES)
        self._numbers = 0
        self._live: dict[int, tuple[Header, list[TokenEvent]]] = {}
        self._finished: OrderedDict[tuple[str, str], _Finished] = OrderedDict()
        self._bytes = 0
        self.on_lost: Callable[[JournalLost], None] = lambda error: None
        """Never called."""

    @property
    def unfinished(self) -> list[Kept]:
        """Nothing comes from an earlier life."""
        return []

    def begin(self, header: Header) -> int:
        """See `DurableJournal.begin`."""
        self._numbers += 1
        self._live[self._numbers] = (header, [])
        return self._numbers

    def append(
        self,
        number: int,
        events: Sequence[TokenEvent],
        *,
        over: bool,
        then: Callable[[], None],
    ) -> None:
        """See `DurableJournal.append`; `then` is called at once."""
        self._live[number][1].extend(events)
        if over:
            self._keep(number, *self._live.pop(number))
        then()

    def forget(self, number: int) -> None:
        """See `DurableJournal.forget`."""
        self._live.pop(number, None)

    def find(self, tenant: str, request_id: str) -> Kept | None:
        """See `DurableJournal.find`."""
        self._prune()
        found = self._finished.get((tenant, request_id))
        if found is None:
            return None
        return decode_kept(found.number, found.header, [found.events])

    async def watch(self) -> None:
        """Return at once: nothing can be lost."""

    async def close(self) -> None:
        """Nothing to do."""

    def _keep(self, number: int, header: Header, events: list[TokenEvent]) -> None:
        record = _Finished(number, time.monotonic(), encode_header(header), encode_events(events))
        self._bytes += record.size
        self._drop((header.tenant, header.request_id))
        self._finished[header.tenant, header.request_id] = record
        self._prune()

    def _prune(self) -> None:
        oldest = time.monotonic() - self._keep_s
        while self._finished:
            key, record = next(iter(self._finished.items()))
            if record.at >= oldest and self._bytes <= self._keep_bytes:
                return
            self._drop(key)

    def _drop(self, key: tuple[str, str]) -> None:
        if record := self._finished.pop(key, None):
            self._bytes -= record.size
