"""What all replicas have to do, as columns: a decision among a thousand costs some microseconds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from phalanx.controller.kvcache.rates import CAUTION

from .index import Lower
from .pace import Pace
from .router import DISTURBANCE, SUCCESSORS, UNMEASURED, Candidate, Decision, Request, Work

EXPLAINED = 4
"""Estimates that a decision keeps."""
UNBOUNDED = 1e15

Vector = npt.NDArray[np.float64]


class _Row:
    """A replica as it is; its columns follow when a decision is asked for."""

    __slots__ = ("pace", "places", "room", "work")

    def __init__(self, places: int | None, room: int | None) -> None:
        self.places, self.room = places, room
        self.work, self.pace = Work(), Pace()


class Loads:
    """The work and pace of the replicas that take requests. Belongs to one event loop.

    `router.estimate` is what is computed, here for all replicas at once. A replica that was not
    measured yet counts as the fastest that ever was. Ties go to the lowest index.
    """

    def __init__(self) -> None:
        self._rows: list[_Row | None] = []
        self._count = 0
        self._stale: set[int] = set()
        self._unmeasured: set[int] = set()
        self._fastest = Pace()
        # base, per uncached token, streams, free places, a place's wait, kv tokens, free room,
        # a token's wait
        self._columns = np.zeros((8, 0))

    def __len__(self) -> int:
        """Replicas that take requests."""
        return self._count

    @property
    def only(self) -> int:
        """The replica that takes requests, where there is one only."""
        return next(index for index, row in enumerate(self._rows) if row is not None)

    def has(self, index: int) -> bool:
        """Whether this replica takes requests."""
        return index < len(self._rows) and self._rows[index] is not None

    def join(self, index: int, places: int | None = None, room: int | None = None) -> None:
        """A replica takes requests from now on; it has nothing to do yet. See `Candidate`."""
        while len(self._rows) <= index:
            self._rows.append(None)
        if self._columns.shape[1] < len(self._rows):
            wider = np.zeros((8, 2 * len(self._rows)))
            wider[0] = np.inf
            wider[:, : self._columns.shape[1]] = self._columns
            self._columns = wider
        self._count += self._rows[index] is None
        self._rows[index] = _Row(places, room)
        self._unmeasured.add(index)
        self._stale.add(index)

    def leave(self, index: int) -> None:
        """A replica takes no more requests, and what it had to do is forgotten."""
        if index < len(self._rows) and self._rows[index] is not None:
            self._count -= 1
            self._rows[index] = None
            self._unmeasured.discard(index)
            self._stale.discard(index)
            self._columns[:, index] = 0.0
            self._columns[0, index] = np.inf

    def charge(self, index: int, before: Work, after: Work) -> None:
        """A request's part of a replica's work is another one now."""
        row = self._rows[index] if index < len(self._rows) else None
        if row is not None:
            (a, b, c, d), (e, f, g, h), (i, j, k, m) = row.work, after, before
            row.work = Work(a + e - i, b + f - j, c + g - k, d + h - m)
            self._stale.add(index)

    def measured(self, index: int, pace: Pace) -> None:
        """A replica's pace. Costs nothing where it is the object that was given last."""
        row = self._rows[index] if index < len(self._rows) else None
        if row is None or row.pace is pace:
            return
        row.pace = pace
        self._stale.add(index)
        if (fastest := _faster(self._fastest, pace)) != self._fastest:
            self._fastest = fastest
            self._stale |= self._unmeasured
        if None not in (pace.tokens_per_s, pace.step_s, pace.stream_s):
            self._unmeasured.discard(index)

    def choose(
        self,
        request: Request,
        runs: Sequence[tuple[int, int]] = (),
        lower: Mapping[int, Lower] | None = None,
    ) -> Decision:
        """The cheapest replica. There must be one.

        runs: (tokens cached, the replicas that have just these, as a bit mask); the others have
        none. lower: how many of these tokens are below the pool, by replica. O(replicas), in a
        dozen passes over vectors.
        """
        self._refresh()
        size = len(self._rows)
        cached = np.zeros(size)
        for tokens, holders in runs:
            cached[_members(holders & (1 << size) - 1, size)] = tokens
        base, each, streams, places, place_s, held, room, token_s = self._columns[:, :size]
        load_s = self._load(cached, lower) if lower else {}
        uncached = request.tokens - cached
        crowd_s = np.minimum(np.maximum(request.samples - places, 0.0), streams) * place_s
        lacking = np.maximum(uncached + (request.output_tokens - room), 0.0)
        cost = base + uncached * each
        cost += np.maximum(crowd_s, np.minimum(lacking, held) * token_s)
        for index, seconds in load_s.items():
            cost[index] += seconds
        first = int(cost.argmin())
        few = range(size) if size <= EXPLAINED else cost.argpartition(EXPLAINED)[:EXPLAINED]
        others = sorted((float(cost[i]), int(i)) for i in few if i != first and cost[i] < np.inf)
        chosen = [first, *(index for _, index in others)][:EXPLAINED]
        compared = tuple(
            self._candidate(index, int(cached[index]), load_s.get(index, 0.0)) for index in chosen
        )
        return Decision(first, request, compared, self._count)

    def _load(self, cached: Vector, lower: Mapping[int, Lower]) -> dict[int, float]:
        """Seconds to bring tokens back into the pools; where computing them is faster, they are
        taken out of `cached`."""
        seconds: dict[int, float] = {}
        for index, below in lower.items():
            row = self._rows[index] if index < len(self._rows) else None
            if row is None:
                continue
            each_s = self._pace(index, row).tokens_per_s
            for tokens, token_s in zip(below, row.pace.below, strict=True):
                if tokens and token_s is not None and token_s * (each_s or 1.0) < CAUTION:
                    seconds[index] = seconds.get(index, 0.0) + tokens * token_s
                else:
                    cached[index] -= tokens
        return seconds

    def _candidate(self, index: int, cached_tokens: int, load_s: float) -> Candidate:
        row = self._rows[index]
        if row is None:
            raise LookupError(f"replica {index} takes no requests")
        return Candidate(
            index,
            cached_tokens,
            row.work,
            row.places,
            row.room,
            self._pace(index, row),
            load_s,
        )

    def _pace(self, index: int, row: _Row) -> Pace:
        pace, fastest = row.pace, self._fastest
        if index not in self._unmeasured:
            return pace
        return Pace(
            pace.tokens_per_s or fastest.tokens_per_s or UNMEASURED.tokens_per_s,
            pace.step_s or fastest.step_s or UNMEASURED.step_s,
            pace.stream_s or fastest.stream_s or UNMEASURED.stream_s,
        )

    def _refresh(self) -> None:
        """Bring the columns up to date."""
        for index in self._stale:
            row = self._rows[index]
            if row is not None:
                self._columns[:, index] = self._column(index, row)
        self._stale.clear()

    def _column(self, index: int, row: _Row) -> tuple[float, ...]:
        """What `estimate` needs of a replica, with all divisions done."""
        work, pace = row.work, self._pace(index, row)
        rate = pace.tokens_per_s or 1.0
        left_s = work.output_tokens / max(work.streams, 1) * (pace.step_s or 0.0)
        return (
            work.queue_tokens / rate + work.streams * (pace.stream_s or 0.0),
            (1.0 + SUCCESSORS + DISTURBANCE * work.streams) / rate,
            work.streams,
            row.places - work.streams if row.places else UNBOUNDED,
            left_s / row.places if row.places else 0.0,
            work.kv_tokens,
            row.room - work.kv_tokens if row.room else UNBOUNDED,
            left_s / max(work.kv_tokens, 1) if row.room else 0.0,
        )


def _faster(one: Pace, other: Pace) -> Pace:
    """The better of each."""
    return Pace(
        _best(max, one.tokens_per_s, other.tokens_per_s),
        _best(min, one.step_s, other.step_s),
        _best(min, one.stream_s, other.stream_s),
    )


def _best(
    better: Callable[[float, float], float], one: float | None, other: float | None
) -> float | None:
    return other if one is None else one if other is None else better(one, other)


def _members(mask: int, size: int) -> npt.NDArray[np.bool_] | list[int]:
    """What selects these replicas in a vector of `size`."""
    if mask.bit_count() <= 4:
        found = []
        while mask:
            low = mask & -mask
            found.append(low.bit_length() - 1)
            mask ^= low
        return found
    packed = np.frombuffer(mask.to_bytes(-(-size // 8), "little"), np.uint8)
    return np.unpackbits(packed, count=size, bitorder="little").view(np.bool_)
