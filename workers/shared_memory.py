"""All-reduce through shared memory, for CPU ranks on one node.

A gloo all-reduce of a few kilobytes costs more than a millisecond between two local processes,
which is more than a layer costs. Here every rank writes its tensor into its own slot, raises
its counter, waits for the others' counters and adds all slots in rank order, so that the sum is
bit-equal everywhere. Two slots a rank, used in turn, let a fast rank write its next tensor while
a slow one still reads: nobody can be two calls ahead, since each call waits for everyone.

The counters are plain 8-byte stores after the data; x86 keeps stores in order, other machines
need not, so groups there use gloo.
"""

from __future__ import annotations

import mmap
import os
import platform
import time
from collections.abc import Callable
from datetime import timedelta

import numpy as np
import torch
from torch import Tensor

from phalanx.kernels.fused import SharedSegment
from phalanx.protos.errors import ConfigError, GroupLost

LINE = 64  # bytes between counters, so that ranks do not share a cache line
FOLDER = "/dev/shm"
SPINS_BEFORE_YIELD = 64


def supported() -> bool:
    """Whether this machine orders stores as the counters need, and has shared memory."""
    return platform.machine() in ("x86_64", "AMD64") and os.path.isdir(FOLDER)


def _create(length: int) -> int:
    """A new file of `length` bytes, all of them reserved; returns its descriptor. It has no name,
    so nothing stays behind however its users end."""
    handle = os.open(FOLDER, os.O_TMPFILE | os.O_RDWR, 0o600)
    try:
        os.posix_fallocate(handle, 0, length)
    except OSError as error:
        os.close(handle)
        raise ConfigError(
            f"{FOLDER} has no room for the {length} bytes that the ranks share "
            f"({error.strerror}); give it more, or choose fewer max_tokens_per_step"
        ) from None
    return handle


class SharedMemoryRank:
    """`TensorParallel` over one memory segment; tensors beyond `slot_bytes` go in pieces."""

    rendezvous: object = None
    """What must live as long as the group does."""

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

        `exchange` broadcasts rank 0's bytes (others' argument is ignored): where the file is among
        rank 0's open ones, which has it open until all have. Raises `ConfigError` where shared
        memory has no room for the segment.
        """
        slot_bytes = -(-slot_bytes // LINE) * LINE
        length = size * LINE + 2 * size * slot_bytes
        handle = _create(length) if rank == 0 else -1
        path = f"/proc/{os.getpid()}/fd/{handle}"
        try:
            told = exchange(path.encode() if rank == 0 else b"").decode()
            if rank != 0:
                handle = os.open(told, os.O_RDWR)
            segment = mmap.mmap(handle, length)
            barrier()
        finally:
            if handle >= 0:
                os.close(handle)
        return cls(rank, size, segment, slot_bytes, timeout)

    @property
    def rank(self) -> int:
        """This rank."""
        return self._rank

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self._size

    @property
    def segment(self) -> SharedSegment:
        """The memory, for kernels that follow the protocol themselves between our calls."""
        address = self._counters.__array_interface__["data"][0]
        return SharedSegment(address, self._rank, self._size, self._slot_bytes, self._timeout)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum in rank order: 16-bit types are added in float32 and rounded once."""
        most = self._slot_bytes // tensor.element_size()
        if tensor.numel() <= most:
            return self._sum(tensor)
        pieces = [self._sum(piece) for piece in torch.split(tensor.reshape(-1), most)]
        return torch.cat(pieces).view(tensor.shape)

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Stack the tensors of all ranks."""
        most = self._slot_bytes // tensor.element_size()
        if tensor.numel() <= most:
            return torch.stack(self._share(tensor))
        pieces = [
            torch.stack(self._share(piece)) for piece in torch.split(tensor.reshape(-1), most)
        ]
        return torch.cat(pieces, dim=1).view(self._size, *tensor.shape)

    def _sum(self, tensor: Tensor) -> Tensor:
        views = self._share(tensor)
        if self._size == 2 or tensor.dtype in (torch.float32, torch.float64, torch.int64):
            total = views[0].clone() if self._size == 1 else torch.add(views[0], views[1])
            for view in views[2:]:
                total += view
            return total
        wide = views[0].float()
        for view in views[1:]:
            wide += view
        return wide.to(tensor.dtype)

    def _share(self, tensor: Tensor) -> list[Tensor]:
        """Everyone's tensor of this call, valid until the call after the next."""
        size = tensor.numel() * tensor.element_size()
        # kernels may have made calls since ours: the own counter in the segment knows
        self._call = int(self._counters[self._rank]) + 1
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
