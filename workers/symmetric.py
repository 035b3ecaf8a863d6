"""Sums over the GPUs of one node through memory that all of them see (symmetric memory).

A small message is read by every rank from all others at once; a larger one is summed in parts and
gathered; what does not fit is the process group's. All but the last can be recorded. Every rank
adds in rank order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory
from torch import Tensor

from phalanx.kernels.fused import PeerBuffers

Way = Literal["one-shot", "two-shot", "group"]
MIB = 1 << 20
ONE_SHOT_BYTES = {2: 2 * MIB, 4: MIB // 2, 8: MIB // 4}
"""By number of ranks, the largest message that is better read whole by everybody."""
UNIT = 16
"""Bytes of one access; a message is padded to as many for each rank."""
TYPES = (torch.bfloat16, torch.float32)


def way(size: int, message_bytes: int, capacity: int) -> Way:
    """How `size` ranks sum a message, of which `capacity` bytes fit into the shared memory."""
    if message_bytes > capacity:
        return "group"
    limit = next((most for ranks, most in ONE_SHOT_BYTES.items() if size <= ranks), 0)
    return "one-shot" if message_bytes <= limit else "two-shot"


class SharedSums:
    """The buffers of one rank: one for sums and for gathering, two in turn for fused sums."""

    def __init__(
        self,
        group: dist.ProcessGroup,
        device: torch.device,
        shape: Sequence[int],
        dtype: torch.dtype,
    ) -> None:
        """shape: [rows, n], the largest message. Every rank calls this at the same time; raises
        `RuntimeError` where the devices do not see each other's memory."""
        self._group, self._rank, self._size = group, group.rank(), group.size()
        rows, width = shape
        unit = UNIT * self._size
        self.capacity = -(-rows * width * dtype.itemsize // unit) * unit
        self._bytes = symmetric_memory.empty(self.capacity, dtype=torch.uint8, device=device)
        self._handle = symmetric_memory.rendezvous(self._bytes, group)
        self._turns = [self._peers(shape, dtype, device) for _ in range(2)]

    def _peers(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> PeerBuffers:
        local = symmetric_memory.empty(*shape, dtype=dtype, device=device)
        handle = symmetric_memory.rendezvous(local, self._group)
        return PeerBuffers(
            rank=self._rank,
            local=local,
            addresses=torch.tensor(handle.buffer_ptrs, dtype=torch.int64, device=device),
            signals=torch.tensor(handle.signal_pad_ptrs, dtype=torch.int64, device=device),
        )

    def all_reduce(self, tensor: Tensor) -> bool:
        """Sum in place, where it fits; whether it did."""
        padded = -(-tensor.nbytes // (UNIT * self._size)) * UNIT * self._size
        chosen = way(self._size, padded, self.capacity)
        if chosen == "group" or tensor.dtype not in TYPES or not tensor.is_contiguous():
            return False
        buffer = self._bytes[:padded].view(tensor.dtype)
        buffer[: tensor.numel()].copy_(tensor.view(-1))
        name = self._group.group_name
        if chosen == "one-shot":
            total = torch.ops.symm_mem.one_shot_all_reduce(buffer, "sum", name)
        else:
            total = torch.ops.symm_mem.two_shot_all_reduce_(buffer, "sum", name)
        tensor.view(-1).copy_(total[: tensor.numel()])
        return True

    def all_gather(self, tensor: Tensor) -> Tensor | None:
        """[...] -> [size, ...], where it fits."""
        if tensor.nbytes > self.capacity:
            return None
        tensor = tensor.contiguous()
        self._bytes[: tensor.nbytes].view(tensor.dtype).copy_(tensor.view(-1))
        self._handle.barrier(channel=0)
        parts = [
            self._handle.get_buffer(rank, tensor.shape, tensor.dtype) for rank in range(self._size)
        ]
        stacked = torch.stack(parts)
        self._handle.barrier(channel=1)  # nobody writes while somebody reads
        return stacked

    def filled(self, partial: Tensor) -> PeerBuffers | None:
        """The next buffer in turn, holding this rank's part [rows, n] of a sum; None where it
        does not fit. Every step begins with a sum of another kind, at which all ranks meet."""
        peers = self._turns[0]
        rows, width = peers.local.shape
        fits = partial.dim() == 2 and len(partial) <= rows and partial.shape[1] == width
        if not fits or partial.dtype is not peers.local.dtype:
            return None
        self._turns.reverse()
        peers.local[: len(partial)].copy_(partial)
        return peers
