"""All-reduces between the nodes of a Ray cluster, measured pair by pair."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from phalanx.protos.errors import GroupLost

from .ray_cluster import LOOPBACK, RayCluster
from .ray_fleet import rank_actor

TIMEOUT_S = 120.0

Device = Literal["cpu", "cuda"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A node of the cluster, by Ray's id; `name` and `address` are for people."""

    node_id: str
    name: str
    address: str
    cpus: int
    gpus: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """What one size costs between two nodes, which may be the same one.

    For two ranks an all-reduce moves as many bytes through each direction of the link as the
    tensor has, so `bytes_per_s` is of the tensor and of the link.
    """

    first: str
    second: str
    collectives: str
    bytes: int
    seconds: float
    """Median of a call, of the slower end."""

    @property
    def bytes_per_s(self) -> float:
        """Bandwidth."""
        return self.bytes / self.seconds


def nodes() -> list[Node]:
    """The nodes that are there, the first one first; needs a connection."""
    found = [node for node in ray.nodes() if node["Alive"]]
    found.sort(key=lambda node: str(node["NodeManagerAddress"]))
    return [
        Node(
            node_id=node["NodeID"],
            name=str(node["NodeManagerHostname"]),
            address=str(node["NodeManagerAddress"]),
            cpus=int(node["Resources"].get("CPU", 0)),
            gpus=int(node["Resources"].get("GPU", 0)),
        )
        for node in found
    ]


def measure_links(
    address: str | None,
    device: str,
    sizes: Sequence[int],
    progress: Callable[[int, int, str], None],
) -> tuple[list[Node], list[Link]]:
    """Every pair of nodes, and within each node. Connects to Ray and disconnects again.

    device: "auto", "cpu" or "cuda". progress: told pairs done, pairs in all, and which is next.
    Raises `ConfigError` without a cluster at `address`, `GroupLost` when an end dies.
    """
    cluster = RayCluster(address, 2)
    try:
        found = nodes()
        where = cluster.device(device, 2)
        each = 2 if where == "cuda" else 0
        pairs = [(node, node) for node in found if node.gpus >= each]
        pairs += itertools.combinations(found, 2)
        links: list[Link] = []
        for done, (first, second) in enumerate(pairs):
            progress(done, len(pairs), f"{first.address} - {second.address}")
            links += _measure(first, second, where, sizes)
        progress(len(pairs), len(pairs), "")
        return found, links
    finally:
        cluster.close()


def _measure(first: Node, second: Node, device: Device, sizes: Sequence[int]) -> list[Link]:
    gpus = 1 if device == "cuda" else 0
    places = [NodeAffinitySchedulingStrategy(node.node_id, soft=False) for node in (first, second)]
    ends = [rank_actor(end, place, num_cpus=0, num_gpus=gpus) for end, place in enumerate(places)]
    try:
        facts = _get([end.facts.remote() for end in ends])
        same = first.node_id == second.node_id
        shared = same and all(item.shared_memory for item in facts)
        collectives = "nccl" if gpus else "shm" if shared else "gloo"
        host = LOOPBACK if same else facts[0].address
        [port] = _get([ends[0].open_store.remote(host)])
        meeting = (host, port, collectives, list(sizes), TIMEOUT_S)
        times = _get([end.measure.remote(*meeting) for end in ends])
    finally:
        for end in ends:
            with contextlib.suppress(RayError):
                ray.kill(end)
    return [
        Link(
            first=first.address,
            second=second.address,
            collectives=collectives,
            bytes=size,
            seconds=max(pair),
        )
        for size, *pair in zip(sizes, *times, strict=True)
    ]


def _get(references: list[Any]) -> list[Any]:
    try:
        return list(ray.get(references, timeout=TIMEOUT_S))
    except RayError as error:
        words = " ".join(str(error).split())[:300]
        raise GroupLost(f"an end of a link failed: {type(error).__name__}: {words}") from error
