"""The fit of step times finds the numbers that made them."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

BENCH = Path(__file__).parents[2] / "bench"
POINTS = [(32, 0), (128, 0), (512, 0), (0, 1), (0, 8), (0, 64)]


@pytest.fixture(scope="module")
def bench() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH))
        yield importlib.import_module("step_profile")


@given(st.floats(1e-4, 1e-1), st.floats(1e-6, 1e-3), st.floats(1e-6, 1e-3))
def test_the_fit_finds_the_formula(bench: Any, base: float, token: float, stream: float) -> None:
    seconds = {(t, s): base + t * token + s * stream for t, s in POINTS}
    assert bench.fit(seconds) == pytest.approx((base, token, stream), rel=1e-6)


def test_nothing_takes_less_than_no_time(bench: Any) -> None:
    """Larger batches that were faster, as on a noisy machine."""
    seconds = dict(zip(POINTS, [0.02, 0.05, 0.1, 0.02, 0.018, 0.015], strict=True))
    assert min(bench.fit(seconds)) > 0
