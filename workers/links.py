"""What an all-reduce between two ranks costs, by size: the link that tensor parallelism would use."""

from __future__ import annotations

import socket
import statistics
import time
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore

from .group import DistributedRank
from .parallel import TensorParallel
from .shared_memory import SharedMemoryRank

RANKS = 2
WARM_CALLS = 3
MAX_CALLS = 200
MIN_CALLS = 5
MOVED_BYTES = 2**26
"""About as much is moved for one size."""


def time_all_reduces(
    rank: int,
    host: str,
    port: int,
    collectives: str,
    sizes: Sequence[int],
    listener: socket.socket | None,
    timeout_s: float,
) -> list[float]:
    """Meet the other rank at `host`:`port` and sum float32 tensors of `sizes` bytes with it.

    collectives: "shm", "gloo" or "nccl". Returns the median seconds of a call for each size, as
    this rank saw it; call it in a process of its own.
    """
    timeout = timedelta(seconds=timeout_s)
    store = TCPStore(
        host,
        port,
        RANKS,
        is_master=rank == 0,
        timeout=timeout,
        master_listen_fd=None if listener is None else listener.detach(),
    )
    device = torch.device("cuda" if collectives == "nccl" else "cpu")
    torch.set_num_threads(1)
    if collectives == "shm":
        group: TensorParallel = _shared_memory(rank, store, max(sizes), timeout)
    else:
        dist.init_process_group(
            collectives, store=store, rank=rank, world_size=RANKS, timeout=timeout
        )
        if dist.group.WORLD is None:
            raise RuntimeError("torch.distributed formed no group")
        group = DistributedRank(dist.group.WORLD)
    try:
        return [_time(group, size, device) for size in sizes]
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _shared_memory(
    rank: int, store: TCPStore, slot_bytes: int, timeout: timedelta
) -> SharedMemoryRank:
    own = PrefixStore("links", store)

    def exchange(value: bytes) -> bytes:
        if rank == 0:
            own.set("segment", value.decode())
        return bytes(own.get("segment"))

    def barrier() -> None:
        if own.add("opened", 1) == RANKS:
            own.set("all-open", "1")
        own.wait(["all-open"])

    return SharedMemoryRank.join(rank, RANKS, slot_bytes, exchange, barrier, timeout)


def _time(group: TensorParallel, size: int, device: torch.device) -> float:
    """Median seconds of one call; both ranks make the same number of calls."""
    tensor = torch.ones(max(size // 4, 1), device=device)
    times = []
    for call in range(WARM_CALLS + min(max(MOVED_BYTES // size, MIN_CALLS), MAX_CALLS)):
        began = time.perf_counter()
        group.all_reduce(tensor)
        if device.type == "cuda":
            torch.cuda.synchronize()
        if call >= WARM_CALLS:
            times.append(time.perf_counter() - began)
        tensor.fill_(1.0)
    return statistics.median(times)
