"""How many replicas the load asks for."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .metrics import ReplicaStats

FULL = 0.8
"""Part of a replica's places that are taken when another one is wanted."""
TIGHT = 0.9
"""The same of its KV blocks."""


def desired_replicas(replicas: Sequence[tuple[ReplicaStats, int | None]], homeless: int = 0) -> int:
    """As many as keep `FULL` of the places and `TIGHT` of the KV blocks in use, at least 1.

    replicas: figures and places of each that is there; without a bound on places, KV blocks alone
    decide. homeless: requests that wait for a replica. What waits counts as if it ran.
    """
    count = max(len(replicas), 1)
    open_requests = homeless + sum(stats.running + stats.waiting for stats, _ in replicas)
    places = [bound for _, bound in replicas if bound]
    wanted = 1
    if places:
        wanted = math.ceil(open_requests / (FULL * sum(places) / len(places)))
    blocks = sum(stats.blocks_total for stats, _ in replicas)
    used = blocks - sum(stats.blocks_free for stats, _ in replicas)
    if blocks:
        wanted = max(wanted, math.ceil(used / blocks * count / TIGHT))
    return max(wanted, 1)
