"""Groups of ranks that stand by, to take a lost one's place.

A spare has its places, its processes, torch and the checkpoint in the system's cache. It has no
epoch, no peers and no weights before it is taken; then it is a group like any other.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Protocol, TypeVar

from phalanx.protos.errors import PhalanxError

_log = logging.getLogger(__name__)


class Spare(Protocol):
    """A fleet that has not started. `RayFleet` is one."""

    def reserve(self) -> object:
        """Take the places and start the processes."""

    def warm(self, checkpoint: str) -> None:
        """Do what can be done before there is a group. Raises `GroupLost`."""

    def stands(self) -> bool:
        """Whether all its processes still answer."""

    @property
    def places(self) -> tuple[str, ...]:
        """The node of each rank, as `room.Free` names it."""

    def stop(self, *, at_once: bool = False) -> None:
        """End every rank and free what it holds."""


AnySpare = TypeVar("AnySpare", bound=Spare)


class SparePool:
    """The spares of all replicas. Any thread may call it; `add` and `take` wait for processes."""

    def __init__(self, make: Callable[[], Spare], checkpoint: str) -> None:
        """make: a fleet of the desired shape."""
        self._make, self._checkpoint = make, checkpoint
        self._lock = threading.Lock()
        self._spares: list[Spare] = []
        self._closed = False

    def __len__(self) -> int:
        return len(self._spares)

    @property
    def places(self) -> list[str]:
        """The node of each rank of each spare."""
        with self._lock:
            return [place for spare in self._spares for place in spare.places]

    def add(self) -> None:
        """Start one more. Raises a `PhalanxError`, leaving nothing behind."""
        spare = self._make()
        try:
            spare.reserve()
            spare.warm(self._checkpoint)
        except BaseException:
            spare.stop(at_once=True)
            raise
        with self._lock:
            if not self._closed:
                self._spares.append(spare)
                return
        spare.stop(at_once=True)

    def take(self, kind: type[AnySpare]) -> AnySpare | None:
        """One that stands, if there is one; whoever takes it stops it."""
        while True:
            with self._lock:
                spare = self._spares.pop(0) if self._spares else None
            if spare is None:
                return None
            if isinstance(spare, kind) and spare.stands():
                return spare
            spare.stop(at_once=True)

    def prune(self) -> None:
        """Let go of those whose processes have died."""
        with self._lock:
            spares = list(self._spares)
        for spare in spares:
            if spare.stands():
                continue
            _log.warning("a spare group has died")
            with self._lock:
                if spare not in self._spares:
                    continue  # it was taken
                self._spares.remove(spare)
            spare.stop(at_once=True)

    def clear(self) -> None:
        """Give all places back."""
        with self._lock:
            spares, self._spares = self._spares, []
        for spare in spares:
            try:
                spare.stop(at_once=True)
            except PhalanxError as error:
                _log.warning("a spare did not end: %s", error)

    def close(self) -> None:
        """Give all places back, those of a spare that is starting as well, for good."""
        with self._lock:
            self._closed = True
        self.clear()
