"""How fast blocks are copied and how fast they are computed, learned from what was done."""

from __future__ import annotations

from collections.abc import Sequence

from phalanx.protos.moves import MoveKind

from .changes import Tier

KEEP = 0.9
"""What a further measurement leaves of the weight of those before it."""
FIRST_BYTES_PER_S = {Tier.HOST: 2e9, Tier.DISK: 2e8}
FIRST_STORE_BYTES_PER_S = 2e9
FIRST_TOKENS_PER_S = 1000.0
FIRST_OVERHEAD_S = 0.005
"""These stand in until something was measured."""
CAUTION = 0.8
"""A load is worth it if it is predicted to take no more than this part of a recompute."""
RELENT = 0.99
"""Each decision for a recompute makes loads seem so much faster, lest one slow moment, at which a
disk was busy, be believed for ever."""
STORE_SHARE = 0.1
"""Of a step's time, for copying blocks out; at least one block is."""
IDLE_STORE_S = 0.005
"""The same where nobody waits for the step but who comes meanwhile."""
MOST_STORES = 64


class MoveRates:
    """Means of what ranks measured. Times of moves are those of the slowest rank."""

    def __init__(self, block_size: int, block_bytes: int) -> None:
        """block_bytes: of the widest rank's part of a block."""
        self._block_size = block_size
        self._block_s = {tier: block_bytes / speed for tier, speed in FIRST_BYTES_PER_S.items()}
        self._store_s = block_bytes / FIRST_STORE_BYTES_PER_S
        self._overhead_s = FIRST_OVERHEAD_S
        self._tokens = self._tokens_s = 0.0
        self._step_s = 0.0

    @property
    def tokens_per_s(self) -> float:
        """Prompt tokens computed in a second."""
        return self._tokens / self._tokens_s if self._tokens_s else FIRST_TOKENS_PER_S

    def block_s(self, tier: Tier) -> float:
        """Seconds to bring a block up from a tier below the pool."""
        return self._block_s[tier]

    def token_s(self, tier: Tier) -> float:
        """The same for a token."""
        return self._block_s[tier] / self._block_size

    def on_step(self, rows: int, tokens: int, seconds: float) -> None:
        """Ranks executed a step. One of at least two tokens a row counts as prompt work."""
        if not rows or seconds <= 0.0:
            return
        self._step_s = _mean(self._step_s or seconds, seconds)
        if tokens >= 2 * rows:
            # sums: a short chunk must not count as much as a full one
            self._tokens = KEEP * self._tokens + tokens
            self._tokens_s = KEEP * self._tokens_s + seconds

    def on_moved(self, kind: MoveKind, seconds: float) -> None:
        """A block was moved."""
        if kind is MoveKind.STORE:
            self._store_s = _mean(self._store_s, seconds)
        elif kind in (MoveKind.LOAD, MoveKind.READ):
            tier = Tier.HOST if kind is MoveKind.LOAD else Tier.DISK
            self._block_s[tier] = _mean(self._block_s[tier], seconds)

    def on_loaded(self, wall_s: float, copying_s: float) -> None:
        """A load took so long from the order to the last answer, and ranks copied for so long."""
        self._overhead_s = _mean(self._overhead_s, max(wall_s - copying_s, 0.0))

    def stores(self, *, busy: bool) -> int:
        """Blocks that the next plan may copy out."""
        room_s = STORE_SHARE * self._step_s if busy else IDLE_STORE_S
        return min(max(int(room_s / max(self._store_s, 1e-9)), 1), MOST_STORES)

    def worthwhile(self, tiers: Sequence[Tier], ahead_s: float = 0.0) -> int:
        """How many of these consecutive blocks to load; the others are computed.

        The first `count` blocks are worth it where

            overhead + ahead + sum(block_s) <= CAUTION * count * block_size / tokens_per_s

        and of such counts the one that spares most is taken. ahead_s: loads that go before.
        """
        compute_s = self._block_size / self.tokens_per_s
        spent_s = self._overhead_s + ahead_s
        best, spared_s = 0, 0.0
        for count, tier in enumerate(tiers, start=1):
            spent_s += self._block_s[tier]
            gain_s = CAUTION * count * compute_s - spent_s
            if gain_s > spared_s:
                best, spared_s = count, gain_s
        if tiers and not best:
            self._relent()
        return best

    def _relent(self) -> None:
        self._overhead_s *= RELENT
        for tier in self._block_s:
            self._block_s[tier] *= RELENT


def _mean(before: float, value: float) -> float:
    return KEEP * before + (1.0 - KEEP) * value
