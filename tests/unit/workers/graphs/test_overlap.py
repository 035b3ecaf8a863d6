"""A step may be queued before the tokens of the one before it are read."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from phalanx.protos.sampling import SamplingParams
from phalanx.protos.steps import NewSequence, Row, StepPlan, StepResult
from phalanx.workers.engine import Engine
from phalanx.workers.graphs.device import CallAgain
from phalanx.workers.pending import PendingStep

MakeEngine = Callable[..., Engine]
GREEDY, WARM = SamplingParams(temperature=0.0), SamplingParams(seed=3, temperature=1.5)
FILTERED = SamplingParams(seed=4, top_p=0.7)
FILTERED_MORE = SamplingParams(seed=8, temperature=1.3, top_k=20, top_p=0.9, min_p=0.01)
PENALISED = SamplingParams(seed=5, repetition_penalty=1.4)
PENALISED_MORE = SamplingParams(
    seed=6, temperature=0.8, top_k=30, frequency_penalty=0.7, presence_penalty=-0.4
)
REPEATING = SamplingParams(temperature=0.0, frequency_penalty=-2.0, repetition_penalty=0.5)
SCORED = SamplingParams(seed=7, logprobs=1, frequency_penalty=0.5)
BIASED = SamplingParams(seed=9, logit_bias={7: 3.0})


def blocks(seq: int) -> list[int]:
    return list(range(9 * seq, 9 * seq + 9))


def plans(late: SamplingParams = WARM) -> Iterator[StepPlan]:
    """Sequences 0 and 1 from the start; 2 comes at step 4 in two chunks; 0 ends at step 9."""
    new = [NewSequence(seq, [5 + seq, 9, 33], 3, 0, (GREEDY, WARM)[seq]) for seq in (0, 1)]
    yield StepPlan(0, 0, [], new, [], [Row(0, 3, blocks(0)), Row(1, 3, blocks(1))])
    both = [Row(0, 1, []), Row(1, 1, [])]
    for step in range(1, 4):
        yield StepPlan(0, step, [], [], [], both)
    third = NewSequence(2, [7, 8, 400, 21, 22], 5, 0, late)
    yield StepPlan(0, 4, [], [third], [], [*both, Row(2, 3, blocks(2))])
    yield StepPlan(0, 5, [], [], [], [*both, Row(2, 2, [])])
    for step in range(6, 9):
        yield StepPlan(0, step, [], [], [], [*both, Row(2, 1, [])])
    for step in range(9, 14):
        yield StepPlan(0, step, [0] if step == 9 else [], [], [], [Row(1, 1, []), Row(2, 1, [])])


def tokens(results: list[StepResult]) -> list[list[tuple[int, int]]]:
    return [[(token.seq, token.token_id) for token in result.sampled] for result in results]


ON_THE_DEVICE = [WARM, GREEDY, FILTERED, FILTERED_MORE, PENALISED, PENALISED_MORE, REPEATING]


@pytest.mark.parametrize("late", [*ON_THE_DEVICE, SCORED, BIASED])
def test_results_read_one_step_late_are_the_same(
    make_engine: MakeEngine, late: SamplingParams
) -> None:
    plain = make_engine()
    expected = tokens([plain.step(plan) for plan in plans(late)])
    engine = make_engine(CallAgain())
    results: list[StepResult] = []
    before: PendingStep | None = None
    for plan in plans(late):
        step = engine.launch(plan)
        if before is not None:
            results.append(before.result())
        before = step
    assert before is not None
    results.append(before.result())
    assert tokens(results) == expected


@pytest.mark.parametrize("late", ON_THE_DEVICE)
def test_a_step_is_queued_without_reading_the_last_one(
    make_engine: MakeEngine, late: SamplingParams
) -> None:
    """The tokens that the host has not read reach the next step on the device."""
    engine = make_engine(CallAgain())
    steps = [engine.launch(plan) for plan in plans(late)]
    read = [step._result is not None for step in steps]
    assert read == [True] * (len(steps) - 2) + [False] * 2
    plain = make_engine()
    assert tokens([step.result() for step in steps]) == tokens([*map(plain.step, plans(late))])


def test_penalties_know_what_was_generated_another_way(make_engine: MakeEngine) -> None:
    """While a batch mate wants log-probabilities, the host chooses; then the device goes on, which
    has to know all tokens, also those of a sequence that had the seat before."""
    words = [
        SamplingParams(seed=3, frequency_penalty=1.5, repetition_penalty=1.3, temperature=0.6),
        SamplingParams(seed=4, presence_penalty=2.0),
        SamplingParams(seed=5, logprobs=2),
        SamplingParams(seed=6, frequency_penalty=1.5),
    ]

    def steps() -> Iterator[StepPlan]:
        new = [NewSequence(seq, [5 + seq, 9, 9], 3, 0, words[seq]) for seq in (0, 1)]
        yield StepPlan(0, 0, [], new, [], [Row(0, 3, blocks(0)), Row(1, 3, blocks(1))])
        both = [Row(0, 1, []), Row(1, 1, [])]
        for step in range(1, 4):
            yield StepPlan(0, step, [], [], [], both)
        third = NewSequence(2, [7, 8], 2, 0, words[2])
        yield StepPlan(0, 4, [], [third], [], [*both, Row(2, 2, blocks(2))])
        for step in range(5, 7):
            yield StepPlan(0, step, [], [], [], [*both, Row(2, 1, [])])
        for step in range(7, 10):
            yield StepPlan(0, step, [2] if step == 7 else [], [], [], both)
        last = NewSequence(3, [5, 6, 7, 8], 4, 0, words[3])
        yield StepPlan(0, 10, [0], [last], [], [Row(1, 1, []), Row(3, 4, blocks(3))])
        for step in range(11, 15):
            yield StepPlan(0, step, [], [], [], [Row(1, 1, []), Row(3, 1, [])])

    plain, recorded = make_engine(), make_engine(CallAgain())
    expected = tokens([plain.step(plan) for plan in steps()])
    launched = [recorded.launch(plan) for plan in steps()]
    assert tokens([step.result() for step in launched]) == expected


def test_sequences_without_a_seat_run_as_they_come(make_engine: MakeEngine) -> None:
    """Seven sequences, though the engine was told of six."""
    new = [NewSequence(seq, [5 + seq, 9], 2, 0, GREEDY) for seq in range(7)]
    first = StepPlan(0, 0, [], new, [], [Row(seq, 2, blocks(seq)[:3]) for seq in range(7)])
    rest = [StepPlan(0, step, [], [], [], [Row(seq, 1, []) for seq in range(7)]) for step in (1, 2)]
    engines = make_engine(), make_engine(CallAgain())
    plain, recorded = ([engine.step(plan) for plan in (first, *rest)] for engine in engines)
    assert tokens(plain) == tokens(recorded)


def test_padding_writes_into_no_ones_blocks(make_engine: MakeEngine) -> None:
    """Three rows in a step recorded for four: all blocks that plans may name are untouched."""
    engines = make_engine(), make_engine(CallAgain())
    pools = []
    for engine in engines:
        for plan in plans():
            engine.step(plan)
        layers = engine._cache.layers
        pools.append(torch.stack([torch.stack(layer[:2])[:, :, :64] for layer in layers]))
    assert torch.equal(*pools)


def test_broken_logits_end_one_sequence(make_engine: MakeEngine) -> None:
    engine = make_engine(CallAgain())
    step = iter(plans())
    engine.step(next(step))
    engine._cache.layers[1].value[:, blocks(1)[0]] = torch.nan
    result = engine.step(next(step))
    assert [failure.seq for failure in result.failures] == [1]
    assert [token.seq for token in result.sampled] == [0]
    assert [token.seq for token in engine.step(next(step)).sampled] == [0]
