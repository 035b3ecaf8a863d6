"""What all replicas have to do, as columns: a decision among a thousand costs some microseconds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from phalanx.controller.kvcache.rates import CAUTION

from .index import Lower
from .pace import Pace
from .router import (
    COPY_LEAST_TOKENS,
    COPY_MARGIN,
    COPY_START_S,
    UNMEASURED,
    Candidate,
    Decision,
    Request,
    Work,
    prices,
    waited_s,
)

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


class _Copy:
    """Tokens of a prompt that can be copied from a replica to those that lack them."""

    def __init__(self, source: int, tokens: int, token_s: Vector) -> None:
        """token_s: to copy a token to each replica; 0 where nothing can be."""
        self.source, self._tokens, self._token_s = source, tokens, token_s

    def spare(self, request: Request, own_s: Vector, inverse: Vector) -> tuple[Vector, Vector]:
        """What is left to compute, and what the copies take, in seconds."""
        spared_s = own_s - (request.tokens - self._tokens) * inverse
        copy_s = COPY_START_S + spared_s / np.maximum(inverse, 1e-300) * self._token_s
        worth = (spared_s >= COPY_LEAST_TOKENS * inverse) & (self._token_s > 0.0)
        worth &= copy_s <= COPY_MARGIN * spared_s
        return own_s - worth * spared_s, worth * copy_s

    def of(self, found: Candidate) -> Candidate:
        """The same of one replica."""
        tokens = self._tokens - found.cached_tokens
        token_s = float(self._token_s[found.replica])
        copy_s = COPY_START_S + tokens * token_s
        rate = found.pace.tokens_per_s or 1.0
        if tokens < COPY_LEAST_TOKENS or not token_s or copy_s > COPY_MARGIN * tokens / rate:
            return found
        return found._replace(copied_tokens=tokens, copy_s=copy_s)


class Loads:
    """The work and pace of the replicas that take requests. Belongs to one event loop.

    `router.estimate` is what is computed, here for all replicas at once. A replica that was not
    measured yet counts as the fastest that ever was. Ties go to the lowest index.
    """

    def __init__(self) -> None:
        self._rows: list[_Row | None] = []
        self._count = 0
        self._stale: set[int] = set()
        self._stale_waits: set[int] = set()
        self._unmeasured: set[int] = set()
        self._fastest = Pace()
        self.copy_bytes_per_s: float | None = None
        """Of copies between replicas; None: there are none."""
        # a row each for `router.Prices`
        self._prices = np.zeros((5, 0))
        # streams, free places, a place's wait, kv tokens, free room, a token's wait
        self._waits = np.zeros((6, 0))
        self._token_bytes = np.zeros(0)

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

    def join(
        self,
        index: int,
        places: int | None = None,
        room: int | None = None,
        token_bytes: float = 0.0,
    ) -> None:
        """A replica takes requests from now on; it has nothing to do yet. See `Candidate`.

        token_bytes: that are copied for a token from or to it; 0: nothing can be.
        """
        while len(self._rows) <= index:
            self._rows.append(None)
        self._widen()
        self._count += self._rows[index] is None
        self._rows[index] = _Row(places, room)
        self._token_bytes[index] = token_bytes
        self._unmeasured.add(index)
        self._touch(index)

    def _widen(self) -> None:
        if self._prices.shape[1] < len(self._rows):
            size = 2 * len(self._rows)
            prices, waits = np.zeros((5, size)), np.zeros((6, size))
            prices[0] = np.inf
            prices[:, : self._prices.shape[1]] = self._prices
            waits[:, : self._waits.shape[1]] = self._waits
            self._prices, self._waits = prices, waits
            self._token_bytes = np.append(
                self._token_bytes, np.zeros(size - len(self._token_bytes))
            )

    def _touch(self, index: int) -> None:
        self._stale.add(index)
        self._stale_waits.add(index)

    def leave(self, index: int) -> None:
        """A replica takes no more requests, and what it had to do is forgotten."""
        if index < len(self._rows) and self._rows[index] is not None:
            self._count -= 1
            self._rows[index] = None
            for kept in (self._unmeasured, self._stale, self._stale_waits):
                kept.discard(index)
            self._prices[:, index] = 0.0
            self._prices[0, index] = np.inf
            self._waits[:, index] = 0.0
            self._token_bytes[index] = 0.0

    def charge(self, index: int, before: Work, after: Work) -> None:
        """A request's part of a replica's work is another one now."""
        row = self._rows[index] if index < len(self._rows) else None
        if row is not None:
            row.work = Work(
                *[
                    there + new - old
                    for there, new, old in zip(row.work, after, before, strict=True)
                ]
            )
            self._touch(index)

    def measured(self, index: int, pace: Pace) -> None:
        """A replica's pace. Costs nothing where it is the object that was given last."""
        row = self._rows[index] if index < len(self._rows) else None
        if row is None or row.pace is pace:
            return
        row.pace = pace
        self._touch(index)
        if (fastest := _faster(self._fastest, pace)) != self._fastest:
            self._fastest = fastest
            self._stale |= self._unmeasured
            self._stale_waits |= self._unmeasured
        if None not in (pace.tokens_per_s, pace.step_s, pace.stream_s):
            self._unmeasured.discard(index)

    def choose(
        self,
        request: Request,
        runs: Sequence[tuple[int, int]] = (),
        lower: Mapping[int, Lower] | None = None,
        *,
        copies: bool = True,
    ) -> Decision:
        """The cheapest replica. There must be one.

        runs: (tokens cached, the replicas that have just these, as a bit mask), the fewest first;
        the others have none. lower: how many of these tokens are below the pool, by replica.
        copies: whether tokens may be copied from replica to replica. O(replicas), in some passes
        over vectors. Waits for places and room are computed for all only where the replica that is
        cheapest without them has one.
        """
        self._refresh()
        size = len(self._rows)
        base, answer, inverse, slope, curve = self._prices[:, :size]
        left = np.full(size, float(request.tokens))
        for tokens, holders in runs:
            _give(left, holders & (1 << size) - 1, request.tokens - tokens)
        loads = self._loads(runs, lower) if lower else {}
        for index, (tokens, _) in loads.items():
            left[index] = request.tokens - tokens
        own_s = left * inverse
        copy = self._copy(runs, loads, base) if copies and runs else None
        if copy is not None:
            own_s, copy_s = copy.spare(request, own_s, inverse)
        cost = curve * own_s
        cost += slope
        cost *= own_s
        cost += base
        if request.output_tokens:
            cost += request.output_tokens * answer
        if copy is not None:
            cost += copy_s
        for index, (_, seconds) in loads.items():
            cost[index] += seconds
        first = int(cost.argmin())
        compared = [self._candidate(first, runs, loads, copy)]
        if waited_s(request, compared[0]):
            cost += self._all_waits(request, left)
            first = int(cost.argmin())
            compared = [self._candidate(first, runs, loads, copy)]
        index = first
        for _ in range(min(EXPLAINED, self._count) - 1):
            cost[index] = np.inf
            index = int(cost.argmin())
            compared.append(self._candidate(index, runs, loads, copy))
        source = None if copy is None else copy.source
        return Decision(first, request, tuple(compared), self._count, source)

    def _copy(
        self,
        runs: Sequence[tuple[int, int]],
        loads: Mapping[int, tuple[int, float]],
        base: Vector,
    ) -> _Copy | None:
        """What can be copied from the holder of most that has least to do; None: nothing."""
        if self.copy_bytes_per_s is None:
            return None
        tokens, holders = runs[-1]
        size = len(self._rows)
        token_bytes = self._token_bytes[:size]
        cost = np.full(size, np.inf)
        _give(cost, holders & (1 << size) - 1, 0.0)
        cost[token_bytes == 0.0] = np.inf
        cost += base
        cost[list(loads)] = np.inf  # what is below a pool is not copied
        source = int(cost.argmin())
        if not cost[source] < np.inf:
            return None
        return _Copy(source, tokens, token_bytes / self.copy_bytes_per_s)

    def _loads(
        self, runs: Sequence[tuple[int, int]], lower: Mapping[int, Lower]
    ) -> dict[int, tuple[int, float]]:
        """Of replicas that have tokens below the pool: the cached tokens that count, and seconds to
        bring them back; those that are computed sooner do not count."""
        found: dict[int, tuple[int, float]] = {}
        for index, below in lower.items():
            row = self._rows[index] if index < len(self._rows) else None
            if row is None:
                continue
            rate = self._pace(index, row).tokens_per_s or 1.0
            cached, seconds = _cached(index, runs), 0.0
            for tokens, token_s in zip(below, row.pace.below, strict=True):
                if tokens and token_s is not None and token_s * rate < CAUTION:
                    seconds += tokens * token_s
                else:
                    cached -= tokens
            found[index] = cached, seconds
        return found

    def _candidate(
        self,
        index: int,
        runs: Sequence[tuple[int, int]],
        loads: Mapping[int, tuple[int, float]],
        copy: _Copy | None,
    ) -> Candidate:
        row = self._rows[index]
        if row is None:
            raise LookupError(f"replica {index} takes no requests")
        cached, load_s = loads.get(index) or (_cached(index, runs), 0.0)
        pace = self._pace(index, row)
        found = Candidate(index, cached, row.work, row.places, row.room, pace, load_s)
        return found if copy is None else copy.of(found)

    def _pace(self, index: int, row: _Row) -> Pace:
        pace, fastest = row.pace, self._fastest
        if index not in self._unmeasured:
            return pace
        return pace._replace(
            tokens_per_s=pace.tokens_per_s or fastest.tokens_per_s or UNMEASURED.tokens_per_s,
            step_s=pace.step_s or fastest.step_s or UNMEASURED.step_s,
            stream_s=pace.stream_s or fastest.stream_s or UNMEASURED.stream_s,
        )

    def _refresh(self) -> None:
        """Bring the prices up to date."""
        base, answer, inverse, slope, curve = self._prices
        for at in self._stale:
            row = self._rows[at]
            if row is not None:
                pace = self._pace(at, row)
                base[at], answer[at], inverse[at], slope[at], curve[at] = prices(row.work, pace)
        self._stale.clear()

    def _all_waits(self, request: Request, uncached: Vector) -> Vector:
        """`waited_s` of every replica."""
        for index in self._stale_waits:
            row = self._rows[index]
            if row is not None:
                self._waits[:, index] = self._wait(index, row)
        self._stale_waits.clear()
        streams, places, place_s, held, room, token_s = self._waits[:, : len(self._rows)]
        crowd_s = np.minimum(np.maximum(request.samples - places, 0.0), streams) * place_s
        lacking = np.maximum(uncached + (request.output_tokens - room), 0.0)
        waits: Vector = np.maximum(crowd_s, np.minimum(lacking, held) * token_s)
        return waits

    def _wait(self, index: int, row: _Row) -> tuple[float, ...]:
        """What `waited_s` needs of a replica, with all divisions done."""
        work, pace = row.work, self._pace(index, row)
        left_s = work.output_tokens / max(work.streams, 1) * (pace.step_s or 0.0)
        return (
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


def _cached(index: int, runs: Sequence[tuple[int, int]]) -> int:
    """Tokens that a replica has."""
    for tokens, holders in runs:
        if holders >> index & 1:
            return tokens
    return 0


def _give(vector: Vector, mask: int, value: float) -> None:
    """Set the elements whose bits are in a mask."""
    if mask.bit_count() <= 4:
        while mask:
            low = mask & -mask
            vector[low.bit_length() - 1] = value
            mask ^= low
        return
    packed = np.frombuffer(mask.to_bytes(-(-len(vector) // 8), "little"), np.uint8)
    members = np.unpackbits(packed, count=len(vector), bitorder="little").view(np.bool_)
    np.copyto(vector, value, where=members)
