"""Talking between the stages of a pipeline, each of which holds some of the layers.

Hidden states go from a stage to the next one, rank to rank of equal place; sampled tokens go from
the last stage to all others. Nobody waits for what it sends to be taken, so that stages compute at
the same time. Like `TensorParallel`, a `Pipeline` is handed to constructors.
"""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Sequence
from datetime import timedelta
from itertools import groupby
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from phalanx.protos.errors import GroupLost
from phalanx.protos.shards import MAX_CARRIED
from phalanx.protos.steps import Row

MOST_UNHEARD = 2
"""Announcements that a stage has not heard, at most, for each stage of the pipeline."""

_Item = TypeVar("_Item")


class Pipeline(Protocol):
    """A rank's view of the stages before and after its own."""

    @property
    def stage(self) -> int:
        """The stage of this rank, in [0, size)."""

    @property
    def size(self) -> int:
        """Number of stages."""

    def send(self, hidden: Tensor) -> None:
        """Hand hidden states to the next stage; they must not be changed any more."""

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """The oldest hidden states of the stage before that have not been taken."""

    def announce(self, tokens: Sequence[int]) -> None:
        """Tell all other stages what the last one has sampled."""

    def hear(self, count: int) -> list[int]:
        """The `count` tokens of the oldest announcement that has not been heard."""


class SingleStage:
    """A pipeline of one: nothing to pass on."""

    stage = 0
    size = 1

    def send(self, hidden: Tensor) -> None:
        """Nobody follows."""
        raise RuntimeError("there is no stage behind this one")

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Nobody comes before."""
        raise RuntimeError("there is no stage before this one")

    def announce(self, tokens: Sequence[int]) -> None:
        """Nobody listens."""

    def hear(self, count: int) -> list[int]:
        """Nobody speaks."""
        raise RuntimeError("there is no stage behind this one")


class ThreadStage:
    """A stage that is a thread of this process, for tests and small local runs."""

    def __init__(
        self,
        stage: int,
        hidden: list[queue.SimpleQueue[Tensor]],
        tokens: list[queue.SimpleQueue[list[int]]],
        timeout: timedelta,
    ) -> None:
        self._stage, self._hidden, self._tokens = stage, hidden, tokens
        self._timeout = timeout.total_seconds()

    @classmethod
    def pipeline(cls, size: int, timeout: timedelta = timedelta(seconds=60)) -> list[ThreadStage]:
        """One object for each of `size` threads."""
        hidden: list[queue.SimpleQueue[Tensor]] = [queue.SimpleQueue() for _ in range(size)]
        tokens: list[queue.SimpleQueue[list[int]]] = [queue.SimpleQueue() for _ in range(size)]
        return [cls(stage, hidden, tokens, timeout) for stage in range(size)]

    @property
    def stage(self) -> int:
        """This stage."""
        return self._stage

    @property
    def size(self) -> int:
        """Number of stages."""
        return len(self._hidden)

    def send(self, hidden: Tensor) -> None:
        """To the next thread."""
        self._hidden[self._stage + 1].put(hidden)

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """From the thread before."""
        hidden = self._take(self._hidden[self._stage])
        if hidden.shape != shape or hidden.dtype is not dtype:
            raise GroupLost(f"{tuple(hidden.shape)} hidden states came instead of {shape}")
        return hidden

    def announce(self, tokens: Sequence[int]) -> None:
        """To all other threads."""
        for box in self._tokens[:-1]:
            box.put(list(tokens))

    def hear(self, count: int) -> list[int]:
        """From the last thread."""
        tokens = self._take(self._tokens[self._stage])
        if len(tokens) != count:
            raise GroupLost(f"{len(tokens)} tokens were announced instead of {count}")
        return tokens

    def _take(self, box: queue.SimpleQueue[_Item]) -> _Item:
        try:
            return box.get(timeout=self._timeout)
        except queue.Empty:
            raise GroupLost(f"stage {self._stage}: nothing came from a peer") from None


class DistributedStage:
    """A stage that is a process of its own, over torch.distributed.

    Hidden states go through gloo, by way of host memory, or straight through NCCL; tokens always
    through gloo.
    """

    def __init__(
        self, stage: int, lane: Sequence[int], direct: dist.ProcessGroup | None = None
    ) -> None:
        """lane: the world's numbers of the ranks of equal place in every stage. direct: a group
        of all ranks for tensors that stay on their devices."""
        self._stage, self._lane, self._direct = stage, list(lane), direct
        self._sent: deque[tuple[dist.Work, Tensor]] = deque()
        self._said: deque[tuple[dist.Work, Tensor]] = deque()

    @property
    def stage(self) -> int:
        """This stage."""
        return self._stage

    @property
    def size(self) -> int:
        """Number of stages."""
        return len(self._lane)

    def send(self, hidden: Tensor) -> None:
        """Waits only where the next stage is more than `MAX_CARRIED` tensors behind."""
        if self._direct is None:
            hidden = hidden.cpu()
        _post(self._sent, hidden, self._lane[self._stage + 1], self._direct)
        _settle(self._sent, MAX_CARRIED)

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Raises when nothing came in time."""
        place = torch.device("cpu") if self._direct is None else device
        hidden = torch.empty(shape, dtype=dtype, device=place)
        dist.recv(hidden, self._lane[self._stage - 1], group=self._direct)
        return hidden.to(device)

    def announce(self, tokens: Sequence[int]) -> None:
        """To the ranks of equal place, who hear in time: all that is waited for is long heard."""
        told = torch.tensor(tokens, dtype=torch.int64)
        for rank in self._lane[:-1]:
            _post(self._said, told, rank, None)
        _settle(self._said, (MOST_UNHEARD * self.size + 2) * self.size)

    def hear(self, count: int) -> list[int]:
        """Raises when nothing came in time."""
        told = torch.empty(count, dtype=torch.int64)
        dist.recv(told, self._lane[-1])
        return [int(token) for token in told.tolist()]


def _post(
    posted: deque[tuple[dist.Work, Tensor]],
    tensor: Tensor,
    rank: int,
    group: dist.ProcessGroup | None,
) -> None:
    """Begin to send, and keep the tensor until it has been."""
    tensor = tensor.contiguous()
    work = dist.isend(tensor, rank, group=group)
    if work is None:
        raise RuntimeError("torch.distributed sends nothing")
    posted.append((work, tensor))


def _settle(posted: deque[tuple[dist.Work, Tensor]], most: int) -> None:
    while len(posted) > most:
        posted.popleft()[0].wait()


def split_rows(rows: Sequence[Row], parts: int) -> list[list[Row]]:
    """Up to `parts` micro-batches of about equal numbers of tokens, of consecutive whole rows.

    Rows that read what another row of the plan writes come after it, so the order is kept. Steps
    of the same rows are split alike: then a stage can begin with the first micro-batch of a step
    while a later stage still works on the last one of the step before.
    """
    total, end = sum(row.num_new for row in rows), 0
    middles: list[int] = []  # of each row, in halves of tokens
    for row in rows:
        middles.append(2 * end + row.num_new)
        end += row.num_new
    pairs = zip(middles, rows, strict=True)
    groups = groupby(pairs, key=lambda pair: pair[0] * parts // (2 * total))
    return [[row for _, row in group] for _, group in groups]
