"""How a plan's rows are divided among stages, and when a stage waits for tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from phalanx.controller.model import resolve_model
from phalanx.kernels.reference import ReferenceBackend
from phalanx.protos.errors import GroupLost
from phalanx.protos.sampling import SamplingParams
from phalanx.protos.specs import CacheSpec, WorkerSpec
from phalanx.protos.steps import NewSequence, Row, StepPlan
from phalanx.workers.engine import Engine
from phalanx.workers.parallel import SingleRank
from phalanx.workers.pipeline import MOST_UNHEARD, split_rows

BLOCK_SIZE = 4


def rows_of(sizes: Sequence[int]) -> list[Row]:
    return [Row(seq, size, []) for seq, size in enumerate(sizes)]


@given(st.lists(st.integers(1, 600), max_size=70), st.integers(1, 8))
def test_rows_stay_whole_and_in_order(sizes: list[int], parts: int) -> None:
    rows = rows_of(sizes)
    batches = split_rows(rows, parts)
    assert [row for batch in batches for row in batch] == rows
    assert all(batches) and len(batches) <= parts
    # as even as whole rows allow: no batch exceeds its part by more than its first and last row
    for batch in batches:
        fair = sum(sizes) / parts
        assert (
            sum(row.num_new for row in batch) <= fair + (batch[0].num_new + batch[-1].num_new) / 2
        )


@given(st.integers(1, 70), st.integers(1, 8))
def test_equal_rows_make_as_many_batches_as_can_be(count: int, parts: int) -> None:
    sizes = [len(batch) for batch in split_rows(rows_of([1] * count), parts)]
    assert len(sizes) == min(count, parts)
    assert max(sizes) - min(sizes) <= 1


class FirstOfTwo:
    """The view of a first stage whose successor says 7 to everything; notes what happens."""

    stage, size = 0, 2

    def __init__(self) -> None:
        self.events: list[Any] = []

    def send(self, hidden: Tensor) -> None:
        self.events.append(("send", len(hidden)))

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        raise AssertionError("the first stage receives nothing")

    def announce(self, tokens: Sequence[int]) -> None:
        raise AssertionError("the first stage samples nothing")

    def hear(self, count: int) -> list[int]:
        self.events.append(("hear", count))
        return [7] * count


@pytest.fixture
def first_stage(tiny_llama: Callable[..., Path]) -> tuple[Engine, FirstOfTwo]:
    model, pipeline = resolve_model(str(tiny_llama())), FirstOfTwo()
    spec = WorkerSpec(
        checkpoint=model.checkpoint,
        model=model.spec,
        dtype="float32",
        tp_size=1,
        pp_size=2,
        cache=CacheSpec(block_size=BLOCK_SIZE, num_blocks=64, dtype="float32"),
        max_tokens_per_step=64,
        max_running=16,
        eos_token_ids=(),
        device="cpu",
    )
    engine = Engine(spec, SingleRank(), ReferenceBackend(), pipeline=pipeline)
    engine.load()
    return engine, pipeline


def begin(lengths: Sequence[int], first: int = 0, step: int = 0) -> StepPlan:
    """New sequences that compute their whole prompts."""
    params = SamplingParams(temperature=0.0)
    new = [
        NewSequence(first + index, [5] * length, length, 0, params)
        for index, length in enumerate(lengths)
    ]
    rows = [
        Row(first + index, length, list(range(4 * (first + index), 4 * (first + index) + 4)))
        for index, length in enumerate(lengths)
    ]
    return StepPlan(0, step, [], new, [], rows)


def test_a_stage_waits_only_for_the_tokens_of_its_next_micro_batch(
    first_stage: tuple[Engine, FirstOfTwo],
) -> None:
    engine, pipeline = first_stage
    engine.step(begin([3, 3, 2, 4]))
    assert pipeline.events == [("send", 6), ("send", 6)]
    pipeline.events.clear()
    engine.step(StepPlan(0, 1, [], [], [], [Row(seq, 1, []) for seq in range(4)]))
    assert pipeline.events == [("hear", 2), ("send", 2), ("hear", 2), ("send", 2)]


def test_other_sequences_do_not_wait(first_stage: tuple[Engine, FirstOfTwo]) -> None:
    engine, pipeline = first_stage
    engine.step(begin([3]))
    engine.step(begin([9], first=1, step=1))
    assert pipeline.events == [("send", 3), ("send", 9)]


def test_what_nobody_counts_on_is_heard_in_time(first_stage: tuple[Engine, FirstOfTwo]) -> None:
    engine, pipeline = first_stage
    for step in range(12):
        engine.step(begin([2], first=step, step=step))
    heard = pipeline.events.count(("hear", 1))
    assert pipeline.events.count(("send", 2)) == 12
    assert 12 - heard <= 2 * MOST_UNHEARD + 1


def test_a_token_that_was_not_sampled_cannot_be_counted_on(
    first_stage: tuple[Engine, FirstOfTwo],
) -> None:
    """The plan computes two tokens where only one more is known."""
    engine, _ = first_stage
    engine.step(begin([3]))
    with pytest.raises(GroupLost, match="it has 4 tokens"):
        engine.step(StepPlan(0, 1, [], [], [], [Row(0, 2, [])]))
