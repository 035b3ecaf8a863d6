"""The cases that are measured compute what they say, and count what they must move."""

from __future__ import annotations

import itertools

import pytest
import torch

from phalanx.kernels.bench.cases import Case, Shape, cases, odd_cases
from phalanx.kernels.bench.measure import Ceilings, HostTimer, compare, measure
from phalanx.kernels.interface import KernelBackend
from phalanx.kernels.reference import ReferenceBackend
from phalanx.kernels.select import select_backend

SMALL = Shape(hidden=32, inner=48, heads=4, kv_heads=2, dim=8, vocab=50)
CPU = torch.device("cpu")


def all_cases(backend: KernelBackend) -> list[Case]:
    return [*odd_cases(SMALL, CPU), *cases(SMALL, backend, tokens=9, context=40)]


def test_every_case_gives_what_the_reference_gives() -> None:
    backend = select_backend("cpu")[0]
    errors = {
        (case.kernel, case.size): compare(case, backend, ReferenceBackend(), CPU, torch.float32)
        for case in all_cases(backend)
        if case.exact
    }
    assert len(errors) > 50
    assert {key: done.error for key, done in errors.items() if not done.error < 1e-5} == {}


class Wrong(ReferenceBackend):
    """Off by little, in one kernel."""

    def rms_norm(
        self, x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0
    ) -> torch.Tensor:
        return super().rms_norm(x, weight, eps, offset) * 1.001


def test_a_wrong_kernel_is_found() -> None:
    case = next(case for case in all_cases(Wrong()) if case.kernel == "rms_norm")
    done = compare(case, Wrong(), ReferenceBackend(), CPU, torch.float32)
    assert done.error == pytest.approx(1e-3, rel=1e-2)


def test_decoding_counts_every_key_and_value_once() -> None:
    case = next(c for c in all_cases(ReferenceBackend()) if c.size == "8 x 1 of 40")
    keys_and_values = 2 * 8 * 40 * SMALL.kv_heads * SMALL.dim
    queries_and_results = 2 * 8 * SMALL.heads * SMALL.dim
    assert case.bytes(2) == 2 * (keys_and_values + queries_and_results)
    assert case.flops == 4 * 8 * 40 * SMALL.heads * SMALL.dim


def test_a_share_is_the_floor_over_the_time() -> None:
    backend = ReferenceBackend()
    linear = next(case for case in all_cases(backend) if case.kernel == "linear qkv")
    ticks = itertools.count()

    class Timer(HostTimer):
        def seconds(self, calls: object) -> float:
            next(ticks)
            return 4.0

    moved = linear.bytes(4)
    ceilings = Ceilings(copy=moved / 2.0, read=moved / 3.0, matrix=1e30)
    done = measure(linear, backend, CPU, torch.float32, Timer(), ceilings)
    assert done.share == pytest.approx(0.5) and done.bound == "memory"
    slow = ceilings._replace(matrix=linear.flops / 3.0)
    done = measure(linear, backend, CPU, torch.float32, Timer(), slow)
    assert done.share == pytest.approx(0.75) and done.bound == "matrix"
    assert next(ticks) == 2
