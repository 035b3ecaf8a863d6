"""The cluster as the page shows it: a snapshot, and its KV blocks folded into cells."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

from phalanx.controller.cluster.snapshot import ClusterSnapshot, ReplicaSnapshot
from phalanx.controller.engine import AsyncEngine

MAX_CELLS = 480


class Cluster(Protocol):
    """Where the page looks."""

    def snapshot(self) -> ClusterSnapshot:
        """The cluster as of the last step."""

    def block_maps(self) -> Mapping[str, bytes]:
        """By replica, a byte for each KV block: 0 free, 1 cached, 2 in use, 3 shared."""

    def ask_block_maps(self) -> None:
        """Have these renewed, which may take a step."""


class EngineCluster:
    """`Cluster` over an engine."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self.snapshot = engine.snapshot

    def block_maps(self) -> Mapping[str, bytes]:
        """See `ReplicaHandle.block_map`."""
        return {handle.replica_id: handle.block_map for handle in self._engine.replicas}

    def ask_block_maps(self) -> None:
        """See `Cluster`."""
        for handle in self._engine.replicas:
            handle.ask_block_map()


def cells(blocks: bytes) -> dict[str, Any]:
    """At most `MAX_CELLS` runs of neighbouring blocks, each with how many are in use, shared among
    these, and cached; the last run may be shorter."""
    size = max(1, -(-len(blocks) // MAX_CELLS))
    runs = [blocks[at : at + size] for at in range(0, len(blocks), size)]
    return {
        "blocks": len(blocks),
        "blocks_per_cell": size,
        "used": [run.count(2) + run.count(3) for run in runs],
        "shared": [run.count(3) for run in runs],
        "cached": [run.count(1) for run in runs],
    }


def cluster_object(cluster: Cluster) -> dict[str, Any]:
    """The cluster as JSON values."""
    snapshot, maps = cluster.snapshot(), cluster.block_maps()
    return {
        "queued": snapshot.queued_requests,
        "replicas": [_replica(item, maps.get(item.replica_id, b"")) for item in snapshot.replicas],
    }


def _replica(item: ReplicaSnapshot, blocks: bytes) -> dict[str, Any]:
    return {
        "id": item.replica_id,
        "state": item.state,
        "running": item.running_requests,
        "waiting": item.waiting_requests,
        "steps": item.steps,
        "preemptions": item.preemptions,
        "prefix_queried_tokens": item.prefix_queried_tokens,
        "prefix_hit_tokens": item.prefix_hit_tokens,
        "kv": {
            "total": item.kv_blocks_total,
            "cached": item.kv_blocks_cached,
            "free": item.kv_blocks_free - item.kv_blocks_cached,
            "used": item.kv_blocks_total - item.kv_blocks_free,
            "block_tokens": item.kv_block_tokens,
            "map": cells(blocks),
        },
        "ranks": [dataclasses.asdict(rank) for rank in item.ranks],
    }
