"""All-reduce through shared memory, for CPU ranks on one node.

A gloo all-reduce of a few kilobytes costs more than a millisecond between two local processes,
which is more than a layer costs. Here every rank writes its tensor into its own slot, raises
its counter, waits for the others' counters and adds all slots in rank order, so that the sum is
bit-equal everywhere. Two slots a rank, used in turn, let a fast rank write its next tensor while
a slow one still reads: nobody can be two calls ahead, since each call waits for everyone.

The counters are plain 8-byte stores after the data; x86 keeps stores in order, other machines
need not, so `supported()` says no there.
"""

from __future__ import annotations

import mmap
import os
import platform
import secrets
import time
from collections.abc import Callable
from datetime import timedelta

import numpy as np
import torch
from torch import Tensor

from phalanx.protos.errors import GroupLost

LINE = 64  # bytes between counters, so that ranks do not share a cache line
FOLDER = "/dev/shm"
SPINS_BEFORE_YIELD = 64


def supported() -> bool:
    """Whether this machine orders stores as the counters need, and has shared memory."""
    return platform.machine() in ("x86_64", "AMD64") and os.path.isdir(FOLDER)


class SharedMemoryRank:
    """`TensorParallel` over one memory segment; tensors up to `slot_bytes`."""

    def __init__(
        self, rank: int, size: int, segment: mmap.mmap, slot_bytes: int, timeout: timedelta
    ) -> None:
        self._rank, self._size, self._slot_bytes = rank, size, slot_bytes
        self._timeout = timeout.total_seconds()
        self._segment = segment
        raw = np.frombuffer(segment, dtype=np.uint8)
        self._counters = raw[: size * LINE].view(np.int64)[:: LINE // 8]
        self._slots = torch.from_numpy(raw[size * LINE :]).view(2, size, slot_bytes)
        self._others = [other for other in range(size) if other != rank]
        self._call = 0

    @classmethod
    def join(
        cls,
        rank: int,
        size: int,
        slot_bytes: int,
        exchange: Callable[[bytes], bytes],
        barrier: Callable[[], None],
        timeout: timedelta,
    ) -> SharedMemoryRank:
        """Open the group's segment.

        `exchange` broadcasts rank 0's bytes (others' argument is ignored). The file is unlinked
        as soon as all have it open, so that nothing stays behind however the ranks end.
        """
        slot_bytes = -(-slot_bytes // LINE) * LINE
        length = size * LINE + 2 * size * slot_bytes
        path = f"{FOLDER}/phalanx-{secrets.token_hex(8)}" if rank == 0 else ""
        if rank == 0:
            handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
            os.posix_fallocate(handle, 0, length)
        path = exchange(path.encode()).decode()
        if rank != 0:
            handle = os.open(path, os.O_RDWR)
        segment = mmap.mmap(handle, length)
        os.close(handle)
        barrier()
        if rank == 0:
            os.unlink(path)
        return cls(rank, size, segment, slot_bytes, timeout)

    @property
    def rank(self) -> int:
        """This rank."""
        return self._rank

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self._size

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum in rank order: 16-bit types are added in float32 and rounded once."""
        views = self._share(tensor)
        if self._size == 2 or tensor.dtype in (torch.float32, torch.float64, torch.int64):
            total = torch.add(views[0], views[1])
            for view in views[2:]:
                total += view
            return total
        wide = views[0].float()
        for view in views[1:]:
            wide += view
        return wide.to(tensor.dtype)

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Stack the tensors of all ranks."""
        return torch.stack(self._share(tensor))

    def _share(self, tensor: Tensor) -> list[Tensor]:
        """Everyone's tensor of this call, valid until the call after the next."""
        size = tensor.numel() * tensor.element_size()
        if size > self._slot_bytes:
            raise ValueError(f"{size} bytes do not fit a slot of {self._slot_bytes}")
        self._call += 1
        slots = self._slots[self._call & 1]
        views = [
            slots[rank, :size].view(tensor.dtype).view(tensor.shape) for rank in range(self._size)
        ]
        views[self._rank].copy_(tensor)
        self._counters[self._rank] = self._call
        for other in self._others:
            self._wait(other)
        return views

    def _wait(self, other: int) -> None:
        counters, call, spins = self._counters, self._call, 0
        deadline = 0.0
        while counters[other] < call:
            spins += 1
            if spins < SPINS_BEFORE_YIELD:
                continue
            os.sched_yield()
            if spins & 1023 == 0:  # the clock only tells a dead peer from a slow one
                now = time.monotonic()
                deadline = deadline or now + self._timeout
                if now > deadline:
                    raise GroupLost(f"rank {other} did not come to collective {call}")
