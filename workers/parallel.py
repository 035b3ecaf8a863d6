"""Talking between the ranks of one tensor-parallel group.

`TensorParallel` is all that layers and sampler know of their peers. It is handed to their
constructors, so several ranks may live in one process, on threads, without process globals.
"""

from __future__ import annotations

import threading
from datetime import timedelta
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from phalanx.kernels.fused import PeerBuffers
from phalanx.protos.errors import GroupLost


class TensorParallel(Protocol):
    """A rank's view of its group. Every rank makes the same calls in the same order."""

    @property
    def rank(self) -> int:
        """This rank, in [0, size)."""

    @property
    def size(self) -> int:
        """Number of ranks."""

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, bit-equal on each; may reuse `tensor`'s memory for the result."""

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Stack equal-shaped tensors of all ranks: [...] -> [size, ...], in rank order."""


@runtime_checkable
class PeerMemory(TensorParallel, Protocol):
    """A group whose ranks see each other's memory."""

    def filled(self, partial: Tensor) -> PeerBuffers | None:
        """Buffers that hold all ranks' parts [rows, n] of a sum, once all have called this; None
        where it does not fit, on every rank alike."""


class SingleRank:
    """A group of one: nothing to exchange."""

    rank = 0
    size = 1

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Return `tensor` itself."""
        return tensor

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Add the leading rank dimension."""
        return tensor.unsqueeze(0)


class _Board:
    """What the threads of one group share."""

    def __init__(self, size: int, timeout: timedelta) -> None:
        self.barrier = threading.Barrier(size, timeout=timeout.total_seconds())
        self.slots: list[Tensor | None] = [None] * size


class ThreadRank:
    """A rank that is a thread of this process, for tests and small local runs."""

    def __init__(self, board: _Board, rank: int, size: int) -> None:
        self._board, self._rank, self._size = board, rank, size

    @classmethod
    def group(cls, size: int, timeout: timedelta = timedelta(seconds=60)) -> list[ThreadRank]:
        """One object for each of `size` threads."""
        board = _Board(size, timeout)
        return [cls(board, rank, size) for rank in range(size)]

    @property
    def rank(self) -> int:
        """This rank."""
        return self._rank

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self._size

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum in rank order, so that the result is bit-equal on every rank."""
        stacked = self.all_gather(tensor)
        total = stacked[0].clone()
        for rank in range(1, self._size):
            total += stacked[rank]
        return total

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Stack the tensors of all threads."""
        board = self._board
        board.slots[self._rank] = tensor
        try:
            board.barrier.wait()
            stacked = torch.stack([slot for slot in board.slots if slot is not None])
            board.barrier.wait()  # nobody overwrites a slot that is still being read
        except threading.BrokenBarrierError:
            raise GroupLost(f"rank {self._rank}: a peer did not come to a collective") from None
        return stacked
