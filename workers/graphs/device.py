"""All that graphs ask of a device: record work and replay it. The one seam to CUDA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

Work = Callable[[], None]
"""Reads and writes tensors that stay where they are; takes no value to the host."""

WARM_UPS = 2


class Recorder(Protocol):
    """Turns work into a replay of it."""

    def record(self, work: Work) -> Work:
        """Something that does, each time it is called, what `work` does."""


class CallAgain:
    """For devices without graphs, and for tests: a replay is another call."""

    def record(self, work: Work) -> Work:
        """`work` itself, after one call, as a recording would."""
        work()
        return work


class CudaGraphs:
    """One CUDA graph for each piece of work, all in one pool of memory.

    Replays are on the caller's stream, one after the other, so that what one leaves in the pool
    may be overwritten by the next: results are copied to tensors outside of it. The largest work
    is recorded first; smaller ones then fit into what it took.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def record(self, work: Work) -> Work:
        """Warmed up first: kernels are compiled and libraries opened outside the recording."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            for _ in range(WARM_UPS):
                work()
        current.wait_stream(self._stream)
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        # `torch.cuda.graph` would collect garbage and empty the cache for each of them
        with torch.cuda.stream(self._stream):
            # other threads, such as NCCL's, may ask the device something meanwhile
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                work()
            finally:
                graph.capture_end()
        return graph.replay
