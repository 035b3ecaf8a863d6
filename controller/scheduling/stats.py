"""What a scheduler says of itself."""

from __future__ import annotations

from dataclasses import dataclass

from phalanx.controller.kvcache.tiers import TierStats


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerStats:
    """Figures of one scheduler. Blocks and samples are as of now, the rest counts from birth."""

    running: int
    waiting: int
    blocks_total: int
    blocks_free: int
    """Blocks that can be handed out, idle cached ones included."""
    blocks_cached: int
    """Idle blocks whose content is kept."""
    prefix_queried: int
    """Prompt tokens looked up in the prefix cache."""
    prefix_hit: int
    """Prompt tokens found there."""
    preemptions: int
    steps: int
    """Plans answered."""
    tiers: TierStats | None = None
    """Of the blocks below the pool; None where there are no tiers."""
