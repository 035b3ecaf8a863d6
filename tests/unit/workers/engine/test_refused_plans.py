"""A plan that does not fit the rank ends the group, before any memory is touched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from phalanx.controller.model import resolve_model
from phalanx.kernels.select import select_backend
from phalanx.protos.errors import GroupLost
from phalanx.protos.sampling import SamplingParams
from phalanx.protos.specs import CacheSpec, WorkerSpec
from phalanx.protos.steps import BlockCopy, NewSequence, Row, StepPlan
from phalanx.workers.engine import Engine
from phalanx.workers.parallel import SingleRank

NEW = NewSequence(1, [5, 6, 7], 3, 0, SamplingParams(temperature=0.0))


@pytest.fixture(scope="module")
def engine(tiny_llama: Callable[..., Path]) -> Engine:
    model = resolve_model(str(tiny_llama()))
    spec = WorkerSpec(
        checkpoint=model.checkpoint,
        model=model.spec,
        dtype="float32",
        tp_size=1,
        cache=CacheSpec(block_size=4, num_blocks=8, dtype="float32"),
        max_tokens_per_step=64,
        max_running=8,
        eos_token_ids=model.eos_token_ids,
        device="cpu",
    )
    engine = Engine(spec, SingleRank(), select_backend("cpu")[0])
    engine.load()
    return engine


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (StepPlan(1, 0, [], [], [], []), "plan 1.0 came, 0.0 is due"),
        (StepPlan(0, 1, [], [], [], []), "plan 0.1 came, 0.0 is due"),
        (StepPlan(0, 0, [], [NEW], [], [Row(1, 3, [8])]), "block 8, there are 8"),
        (StepPlan(0, 0, [], [NEW], [], [Row(1, 3, [-1])]), "block -1"),
        (StepPlan(0, 0, [], [], [BlockCopy(0, 8)], []), "block 8"),
        (StepPlan(0, 0, [], [], [BlockCopy(-3, 0)], []), "block -3"),
        (
            StepPlan(0, 0, [], [NewSequence(1, [515], 1, 0, NEW.params)], [], [Row(1, 1, [0])]),
            "token 515, there are 515",
        ),
    ],
)
def test_refused(engine: Engine, plan: StepPlan, message: str) -> None:
    with pytest.raises(GroupLost, match=message):
        engine.step(plan)


def test_what_was_refused_left_no_trace(engine: Engine) -> None:
    result = engine.step(StepPlan(0, 0, [], [NEW], [], [Row(1, 3, [7])]))
    assert len(result.sampled) == 1
    with pytest.raises(GroupLost, match="sequence 2, which this rank does not know"):
        engine.step(StepPlan(0, 1, [], [], [], [Row(2, 1, [0])]))
