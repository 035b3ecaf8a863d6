"""The cluster at one instant, as plain values; field by field the messages of types.proto."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from phalanx.controller.kvcache.tiers import TierStats

ReplicaPhase = Literal["starting", "ready", "draining", "lost", "degraded"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RankSnapshot:
    """One rank of a replica; it holds the query heads [head_start, head_stop), or as many heads or
    channels of a model that has state spaces alone, of the layers [layer_start, layer_stop), those
    of its stage. `kv_bytes` counts states as well."""

    rank: int
    node: str
    device: str
    weight_bytes: int
    kv_bytes: int
    head_start: int
    head_stop: int
    stage: int
    layer_start: int
    layer_stop: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaSnapshot:
    """One replica. `kv_blocks_free` counts the `kv_blocks_cached`, which have no user. `tp_desired` is
    the TP size that it is meant to have, `condition` why it is not as desired; empty: it is.
    `outdated`: a rolling restart has yet to replace it."""

    replica_id: str
    state: ReplicaPhase
    ranks: tuple[RankSnapshot, ...] = ()
    running_requests: int = 0
    waiting_requests: int = 0
    kv_blocks_total: int = 0
    kv_blocks_free: int = 0
    kv_blocks_cached: int = 0
    kv_block_tokens: int = 0
    prefix_queried_tokens: int = 0
    prefix_hit_tokens: int = 0
    preemptions: int = 0
    steps: int = 0
    tp: int = 0
    tp_desired: int = 0
    condition: str = ""
    outdated: bool = False
    tiers: TierStats | None = None
    """Below the KV pool; None where there are none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterSnapshot:
    """All replicas, and the requests that wait for any of them."""

    replicas: tuple[ReplicaSnapshot, ...] = ()
    queued_requests: int = 0
