"""What steps are measured against, beside numbers worked out by hand; needs no GPU."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from phalanx.kernels.bench.measure import Ceilings

HERE = Path(__file__).parent
# an H200: bytes and operations a second
CEILINGS = Ceilings(copy=4.3e12, read=4.2e12, matrix=790e12)


@pytest.fixture
def pace(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module `pace.py`."""
    monkeypatch.setattr(sys, "path", [str(HERE), *sys.path])
    spec = importlib.util.spec_from_file_location("pace", HERE / "pace.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "pace", module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("dtype", "kv_dtype", "batch", "milliseconds"),
    [
        # weights 6.979 G and head 0.525 G elements, 128 KiB of keys and values a token in bfloat16
        ("bfloat16", "bfloat16", 1, 3.52),
        ("bfloat16", "bfloat16", 8, 3.74),
        ("bfloat16", "bfloat16", 64, 5.49),
        ("fp8", "bfloat16", 1, 1.90),
        ("fp8", "fp8", 64, 2.87),
        ("int4", "bfloat16", 1, 1.11),
    ],
)
def test_a_step_of_llama_3_1_8b_takes_no_less(
    pace: Any, dtype: Any, kv_dtype: Any, batch: int, milliseconds: float
) -> None:
    model = pace.make_spec(pace.LLAMA_8B, "bfloat16", "cpu").model
    floor = pace.Floor(model, CEILINGS, pace.Variant("", dtype, kv_dtype))
    assert floor.decode(batch, 1024) * 1e3 == pytest.approx(milliseconds, abs=0.012)


def test_a_prompt_takes_no_less_than_its_operations(pace: Any) -> None:
    model = pace.make_spec(pace.LLAMA_8B, "bfloat16", "cpu").model
    # 2 operations a weight and token, attention's half square, the last token's logits
    assert pace.Floor(model, CEILINGS).prefill(2048) * 1e3 == pytest.approx(37.6, abs=0.7)


def test_the_goals(pace: Any) -> None:
    assert {1: 75.0, 8: 75.0, 64: 70.0, 256: 65.0} == pace.GOALS
    goals = [variant.goal for variant in pace.VARIANTS if variant.goal is not None]
    assert goals == [pace.FP8_GOAL] == [65.0]
    assert (pace.PREFILL_GOAL, pace.ATTENTION_GOAL) == (60.0, 80.0)
