"""Times of calls, and what the device reaches at best: copying, reading, multiplying."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch

from phalanx.kernels.interface import KernelBackend

from .cases import Case, Inputs

Work = Callable[[], object]
ROUNDS = 5


class Timer(Protocol):
    """How long calls take on one device."""

    def seconds(self, calls: Sequence[Work]) -> float:
        """Of one call, all of them made in turn, again and again: the median of rounds."""


class HostTimer:
    """For devices that are done when a call returns."""

    def __init__(self, round_s: float = 0.03) -> None:
        """round_s: about how long a round lasts."""
        self._round_s = round_s

    def seconds(self, calls: Sequence[Work]) -> float:
        """The first round of calls is not counted."""
        for call in calls:
            call()
        once = self._round(calls, 1)
        repeats = max(1, round(self._round_s / max(once * len(calls), 1e-9)))
        return statistics.median(self._round(calls, repeats) for _ in range(ROUNDS))

    def _round(self, calls: Sequence[Work], repeats: int) -> float:
        started = time.perf_counter()
        for _ in range(repeats):
            for call in calls:
                call()
        return (time.perf_counter() - started) / repeats / len(calls)


class GraphTimer:
    """For CUDA: calls are recorded in one graph, so that launching them costs next to nothing."""

    def __init__(self, device: torch.device, round_s: float = 0.03) -> None:
        self._device, self._round_s = device, round_s

    def seconds(self, calls: Sequence[Work]) -> float:
        """Warmed up on a stream of their own, then recorded, then replayed between two events."""
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(stream):
            for call in (*calls, *calls):
                call()
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for call in calls:
                call()
        once = self._round(graph, 1)
        repeats = max(1, round(self._round_s / max(once, 1e-9)))
        times = [self._round(graph, repeats) for _ in range(ROUNDS)]
        return statistics.median(times) / len(calls)

    def _round(self, graph: torch.cuda.CUDAGraph, repeats: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        for _ in range(repeats):
            graph.replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / repeats


class Ceilings(NamedTuple):
    """What this device reached, in bytes or operations a second."""

    copy: float
    """Bytes read and written by a large copy."""
    read: float
    """Bytes read by a large sum."""
    matrix: float
    """Operations of a large product in the working dtype."""

    def floor(self, moved: int, flops: int) -> float:
        """Seconds that so much takes at the least."""
        return max(moved / max(self.copy, self.read), flops / self.matrix)


def measure_ceilings(device: torch.device, dtype: torch.dtype, timer: Timer) -> Ceilings:
    """On random numbers: products of zeros run faster."""
    large = device.type == "cuda"
    source = torch.randn((1 << 28) if large else (1 << 25), device=device)
    target = torch.empty_like(source)
    side = 8192 if large else 1024
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    moved = source.numel() * 4
    return Ceilings(
        copy=2 * moved / timer.seconds([lambda: target.copy_(source)]),
        read=moved / timer.seconds([lambda: source.sum()]),
        matrix=2 * side**3 / timer.seconds([lambda: a @ b]),
    )


class Measured(NamedTuple):
    """One case's time, seconds, and the share of the ceiling that it reaches."""

    kernel: str
    size: str
    seconds: float
    bytes: int
    flops: int
    share: float
    bound: str
    """What the floor is made of: memory or matrix."""


def measure(
    case: Case,
    backend: KernelBackend,
    device: torch.device,
    dtype: torch.dtype,
    timer: Timer,
    ceilings: Ceilings,
) -> Measured:
    """Inputs are several sets, so that none is found in a cache: `SPREAD` bytes together."""
    moved = case.bytes(dtype.itemsize)
    sets = max(1, min(MOST_SETS, -(-SPREAD[device.type] // max(moved, 1))))
    calls = [case.call(backend, case.inputs(device, dtype, seed)) for seed in range(sets)]
    seconds = timer.seconds(calls)
    memory = moved / max(ceilings.copy, ceilings.read)
    floor = ceilings.floor(moved, case.flops)
    bound = "memory" if floor == memory else "matrix"
    return Measured(case.kernel, case.size, seconds, moved, case.flops, floor / seconds, bound)


SPREAD = {"cpu": 1 << 26, "cuda": 1 << 28}
MOST_SETS = 32


class Compared(NamedTuple):
    """How far a case's result is from that of the reference in float64: |x - r| / |r|."""

    kernel: str
    size: str
    error: float


def compare(
    case: Case,
    backend: KernelBackend,
    reference: KernelBackend,
    device: torch.device,
    dtype: torch.dtype,
    seed: int = 0,
) -> Compared:
    """NaN where anything is NaN."""
    inputs = case.inputs(device, dtype, seed)
    wide: Inputs = {name: tensor.double() for name, tensor in inputs.items()}
    expected = _flat(case.call(reference, wide)())
    got = _flat(case.call(backend, inputs)())
    error = (got - expected).norm() / expected.norm()
    return Compared(case.kernel, case.size, error.item())


def _flat(result: object) -> torch.Tensor:
    parts = result if isinstance(result, tuple) else (result,)
    return torch.cat([part.double().flatten() for part in parts if isinstance(part, torch.Tensor)])
