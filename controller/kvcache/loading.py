"""Bringing blocks back up into the pool, for samples that wait for them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from phalanx.protos.moves import Moved

from .blocks import require
from .changes import Tier
from .prefix import DigestChain, PrefixIndex
from .rates import MoveRates
from .tiers import Ended, LowerTiers


class Pool(Protocol):
    """What a load asks of the blocks' owner."""

    @property
    def num_free(self) -> int:
        """Blocks that can be handed out."""

    def take(self, count: int) -> list[int]:
        """Blocks, referenced once."""

    def share(self, block: int) -> None:
        """One more reference to an indexed block."""

    def let_go(self, block: int) -> None:
        """One reference less; the block is idle or free if it was the last."""


PATIENCE, LEAST_PATIENCE_S = 3.0, 1.0
"""Who waits for a load computes after so many times of what was predicted, and so many seconds."""


@dataclass(slots=True)
class _Load:
    began: float
    overdue: float
    blocks: list[int]
    """Referenced until the load ends: those found in the pool, then those that are filled."""
    missing: dict[int, Tier] = field(default_factory=dict)
    """Moves without an answer, and where from."""
    arrived: list[tuple[bytes, int]] = field(default_factory=list)
    unwanted: set[bytes] = field(default_factory=set)
    copying_s: float = 0.0


class BlockLoads:
    """Loads that are under way. Times are `time.monotonic()` of the step loop.

    A load refers to the blocks that it fills, as a sequence does, and to those that were found in
    the pool before them. What has come is indexed and idle then, the most recently used. Whoever
    waits for a load is admitted afterwards, as if all had always been in the pool; what has failed
    is computed.
    """

    def __init__(
        self,
        tiers: LowerTiers,
        rates: MoveRates,
        index: PrefixIndex,
        pool: Pool,
        block_size: int,
    ) -> None:
        self.tiers, self.rates = tiers, rates
        self._index, self._pool, self._block_size = index, pool, block_size
        self._loads: dict[int, _Load] = {}
        self._load_of: dict[int, int] = {}
        """Of each open move."""
        self._coming: dict[bytes, int] = {}
        """Digest -> load."""
        self._next = 0

    def overdue(self, now: float) -> list[int]:
        """Loads that nobody should wait for any more: some disk hangs. Their blocks stay taken."""
        return [number for number, load in self._loads.items() if load.overdue <= now]

    @property
    def references(self) -> Counter[int]:
        """Blocks of all loads, for audits."""
        return Counter(block for load in self._loads.values() for block in load.blocks)

    @property
    def active(self) -> frozenset[int]:
        """Loads that have not ended."""
        return frozenset(self._loads)

    def begin(
        self, chain: DigestChain, cached: Sequence[int], num_tokens: int, most: int, now: float
    ) -> int | None:
        """The load that goes on where `cached`, found in the pool, ends: a new one, or one under
        way; None where it is better, or the only way, to compute.

        num_tokens: of the sample, the last of which is computed in any case. most: blocks that may
        be taken.
        """
        digests = chain.digests[len(cached) : max(num_tokens - 1, 0) // self._block_size]
        if digests and digests[0] in self._coming:
            return self._coming[digests[0]]
        found: list[Tier] = []
        for digest in digests[:most]:
            tier = self.tiers.tier(digest)
            if tier is Tier.NONE or digest in self._coming or self._index.find(digest) is not None:
                break
            found.append(tier)
        if not found:
            return None
        count = self.rates.worthwhile(found, self._ahead_s)
        self.tiers.decline(len(found) - count)
        return self._begin(digests[:count], cached, found, now) if count else None

    @property
    def _ahead_s(self) -> float:
        ahead = Counter(tier for load in self._loads.values() for tier in load.missing.values())
        return sum(count * self.rates.block_s(tier) for tier, count in ahead.items())

    def _begin(
        self, digests: Sequence[bytes], cached: Sequence[int], found: Sequence[Tier], now: float
    ) -> int:
        number, self._next = self._next, self._next + 1
        predicted_s = self._ahead_s + sum(map(self.rates.block_s, found[: len(digests)]))
        for block in cached:
            self._pool.share(block)
        # before blocks are taken: those that give way may be stored, and want slots
        slots = [self.tiers.claim(digest) for digest in digests]
        fresh = self._pool.take(len(digests))
        patience_s = LEAST_PATIENCE_S + PATIENCE * predicted_s
        load = self._loads[number] = _Load(now, now + patience_s, [*cached, *fresh])
        for digest, block, slot, tier in zip(digests, fresh, slots, found, strict=False):
            move = self.tiers.load(digest, block, slot)
            load.missing[move] = tier
            self._load_of[move], self._coming[digest] = number, number
        return number

    def settle(self, moved: Moved, now: float) -> int | None:
        """One rank's answer to any move. The load that has ended with it, if one has."""
        ended = self.tiers.settle(moved)
        if ended is None:
            return None
        if not ended.error:
            self.rates.on_moved(ended.move.kind, ended.seconds)
        number = self._load_of.pop(ended.move.number, None)
        return None if number is None else self._arrive(number, ended, now)

    def _arrive(self, number: int, ended: Ended, now: float) -> int | None:
        load, digest = self._loads[number], ended.move.digest
        del load.missing[ended.move.number]
        load.copying_s += ended.seconds
        if not ended.error:
            load.arrived.append((digest, ended.move.block))
        if load.missing:
            return None
        del self._loads[number]
        self._coming = {held: by for held, by in self._coming.items() if by != number}
        for held, block in load.arrived:
            if held not in load.unwanted:
                self._index.insert(held, block)
        # last block first, as when a sequence ends
        for block in reversed(load.blocks):
            self._pool.let_go(block)
        self.rates.on_loaded(now - load.began, load.copying_s)
        return number

    def forget(self, digest: bytes) -> None:
        """The content is broken: it is not indexed when it comes."""
        if digest in self._coming:
            self._loads[self._coming[digest]].unwanted.add(digest)

    def check_integrity(self) -> None:
        """Raise `IntegrityError` unless loads, moves and tiers agree."""
        self.tiers.check_integrity()
        moves = {move for load in self._loads.values() for move in load.missing}
        require(moves == self._load_of.keys(), "loads and their moves disagree")
        require(set(self._coming.values()) <= self._loads.keys(), "an ended load is waited for")
        for load in self._loads.values():
            require(bool(load.missing), "a load has nothing to wait for")
