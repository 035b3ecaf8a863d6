"""What callers of a running scheduler get: tokens, endings, and steady streams."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from phalanx.controller.scheduling.request import FinishReason, Request, TokenEvent
from phalanx.protos.errors import GroupLost, PhalanxError, RequestFailed
from phalanx.protos.steps import (
    SampledToken,
    SequenceFailure,
    StepPlan,
    StepResult,
)

LoopFactory = Callable[..., Any]
EOS = 3


def answer(plan: StepPlan, *tokens: int) -> StepResult:
    """A result that samples `tokens` for the plan's rows, in order."""
    pairs = zip(plan.rows, tokens, strict=True)
    return StepResult(plan.epoch, plan.step, [SampledToken(row.seq, token) for row, token in pairs])


def token_ids(events: list[TokenEvent]) -> list[int]:
    return [token.token_id for event in events for token in event.tokens]


def generate(loop: Any, tokens: list[int]) -> list[TokenEvent]:
    """Let the only sample sample these tokens, until it ends."""
    events: list[TokenEvent] = []
    for token in tokens:
        if (plan := loop.scheduler.schedule(0.0)) is None:
            break
        events += loop.scheduler.update(answer(plan, token))
    return events


def test_a_stream_ends_at_the_end_of_sequence_token(make_loop: LoopFactory) -> None:
    loop = make_loop(max_in_flight=1)
    loop.add("a", [1, 1], max_tokens=9)
    events = generate(loop, [5, 6, EOS, 7])
    assert token_ids(events) == [5, 6, EOS]
    assert [event.finish for event in events] == [None, None, FinishReason.STOP]
    assert events[-1].stop_token == EOS
    assert not loop.scheduler.has_work


@pytest.mark.parametrize(
    ("params", "expected", "finish"),
    [
        ({"ignore_eos": True, "max_tokens": 5}, [5, EOS, 6, 7, 5], FinishReason.LENGTH),
        ({"stop_token_ids": (6,), "ignore_eos": True}, [5, EOS, 6], FinishReason.STOP),
        ({"stop_token_ids": (EOS,), "ignore_eos": True}, [5, EOS], FinishReason.STOP),
        ({"max_tokens": 2}, [5, EOS], FinishReason.STOP),
        ({"max_tokens": 1}, [5], FinishReason.LENGTH),
        # the sampler bans stop ids while fewer than min_tokens tokens are out
        ({"min_tokens": 1}, [5, EOS], FinishReason.STOP),
        ({"min_tokens": 2, "stop_token_ids": (6,)}, [5, EOS, 6], FinishReason.STOP),
        ({"min_tokens": 3, "max_tokens": 5}, [5, EOS, 6, 7, 5], FinishReason.LENGTH),
    ],
)
def test_what_ends_a_stream(
    make_loop: LoopFactory, params: dict[str, Any], expected: list[int], finish: FinishReason
) -> None:
    loop = make_loop(max_in_flight=1)
    loop.add("a", [1, 1], **params)
    events = generate(loop, [5, EOS, 6, 7, 5, 6])
    assert token_ids(events) == expected
    assert events[-1].finish is finish


@pytest.mark.parametrize("max_tokens", [0, 100])
def test_a_stream_ends_when_the_context_is_full(make_loop: LoopFactory, max_tokens: int) -> None:
    loop = make_loop(max_context=10)
    loop.add("a", [1] * 7, max_tokens=max_tokens, ignore_eos=True)
    loop.run()
    stream = loop.streams["a", 0]
    assert len(stream.tokens) == 3
    assert stream.finish is FinishReason.LENGTH


def test_the_pool_bounds_the_context(make_loop: LoopFactory) -> None:
    """Twelve slots: the thirteenth token is sampled, and never computed."""
    loop = make_loop(num_blocks=3, block_size=4, max_context=100)
    assert loop.scheduler.max_context == 13
    loop.add("a", [1] * 7, ignore_eos=True)
    loop.run()
    assert len(loop.streams["a", 0].tokens) == 6


@pytest.mark.parametrize("max_in_flight", [1, 2, 3])
def test_nothing_is_computed_past_a_known_limit(make_loop: LoopFactory, max_in_flight: int) -> None:
    loop = make_loop(max_in_flight=max_in_flight)
    loop.add("a", [1] * 5, max_tokens=6, ignore_eos=True)
    loop.run()
    assert loop.rank.computed[1, 0] == 5 + 6 - 1


def test_plans_run_ahead_of_their_results(make_loop: LoopFactory) -> None:
    loop = make_loop(max_in_flight=3)
    loop.add("a", [1, 1, 1], max_tokens=9)
    first, second, third = (loop.scheduler.schedule(0.0) for _ in range(3))
    assert loop.scheduler.schedule(0.0) is None
    assert [plan.rows[0].num_new for plan in (first, second, third)] == [3, 1, 1]
    assert not second.new and not third.new
    assert loop.scheduler.in_flight == 3

    assert token_ids(loop.scheduler.update(answer(first, 5))) == [5]
    (event,) = loop.scheduler.update(answer(second, EOS))
    assert (event.first_index, event.finish) == (1, FinishReason.STOP)
    assert loop.scheduler.update(answer(third, 7)) == [], "computed in vain"
    assert not loop.scheduler.has_work

    loop.add("b", [1], max_tokens=1)
    plan = loop.scheduler.schedule(0.0)
    assert plan.finished == [first.rows[0].seq]
    assert plan.new[0].seq != first.rows[0].seq


def test_a_long_prompt_never_makes_a_stream_miss_a_step(make_loop: LoopFactory) -> None:
    loop = make_loop(
        num_blocks=400, block_size=16, max_context=5000, max_tokens_per_step=64, max_running=8
    )
    for name in ("a", "b", "c"):
        loop.add(name, [1, 2], max_tokens=120, ignore_eos=True)
    loop.step()
    loop.add("long", [1, 0] * 2048, max_tokens=1)
    steps = 0
    while loop.streams["long", 0].finish is None:
        plan = loop.step()
        streams = [row for row in plan.rows if row.num_new == 1]
        assert len(streams) >= 3, "a stream missed a step"
        assert plan.num_tokens <= 64
        steps += 1
    assert steps <= 4096 / (64 - 3) + 3, "the budget was not used up"
    loop.run()


def test_a_chunk_far_on_in_a_prompt_is_short_beside_streams(make_loop: LoopFactory) -> None:
    """A token at position p takes 1 + p / reach; no step beside a stream takes more than 64, but
    for a prompt's beginning."""
    loop = make_loop(
        num_blocks=400, block_size=16, max_context=5000, max_tokens_per_step=64, max_running=8
    )
    far = make_loop(
        num_blocks=400,
        block_size=16,
        max_context=5000,
        max_tokens_per_step=64,
        max_running=8,
        attention_reach=500.0,
    )
    steps = []
    for each, reach in ((loop, float("inf")), (far, 500.0)):
        each.add("stream", [1, 2], max_tokens=1000, ignore_eos=True)
        each.step()
        each.add("long", [1, 0] * 2000, max_tokens=1)
        done, count = 0, 0
        while each.streams["long", 0].finish is None:
            plan = each.step()
            new = max(row.num_new for row in plan.rows)
            took = sum(1 + (done + place) / reach for place in range(new))
            assert len(plan.rows) == 2 and took <= 64 + (1 + done / reach) or done < reach / 4
            done, count = done + new, count + 1
        steps.append(count)
        each.run()
    # 4000 tokens take 4000 (1 + 2000 / 500)
    assert steps[0] <= 70 and 4.5 * steps[0] < steps[1] <= 5.6 * steps[0]


def test_a_failed_sample_ends_alone_and_its_blocks_are_not_matched(make_loop: LoopFactory) -> None:
    loop = make_loop()
    loop.add("bad", [1] * 20, seed=1, max_tokens=9, ignore_eos=True)
    loop.add("good", [2] * 20, seed=2, max_tokens=9, ignore_eos=True)
    loop.rank.poisoned.add((1, 0))
    loop.run()
    (event,) = loop.streams["bad", 0].events
    assert event.finish is FinishReason.ERROR
    assert isinstance(event.error, RequestFailed)
    assert loop.streams["good", 0].finish is FinishReason.LENGTH

    for name, prompt, cached in (("bad2", [1] * 20, 0), ("good2", [2] * 20, 16)):
        loop.add(name, prompt, seed=7, max_tokens=2)
        loop.run()
        assert loop.streams[name, 0].events[0].cached_prompt_tokens == cached


def test_prompt_logprobs_arrive_once_and_turn_cache_reading_off(make_loop: LoopFactory) -> None:
    loop = make_loop(max_tokens_per_step=8)
    loop.add("first", [1] * 30, max_tokens=2)
    loop.run()
    loop.add("second", [1] * 30, max_tokens=2, prompt_logprobs=0)
    loop.run()
    stream = loop.streams["second", 0]
    assert stream.num_scored == 30
    assert stream.events[0].cached_prompt_tokens == 0
    assert len([event for event in stream.events if event.prompt_logprobs]) == 4, "as they come"
    assert loop.scheduler.stats().prefix_queried == 30, "the second one did not ask"


def test_results_of_another_epoch_are_ignored_and_counted(make_loop: LoopFactory) -> None:
    loop = make_loop()
    loop.add("a", [1], max_tokens=4)
    plan = loop.scheduler.schedule(0.0)
    stale = StepResult(plan.epoch + 1, plan.step, [SampledToken(plan.rows[0].seq, 5)])
    assert loop.scheduler.update(stale) == []
    assert loop.scheduler.foreign_results == 1
    assert token_ids(loop.scheduler.update(answer(plan, 5))) == [5]


def test_a_result_that_does_not_fit_the_oldest_plan_ends_the_group(make_loop: LoopFactory) -> None:
    def planned() -> tuple[Any, StepPlan]:
        loop = make_loop()
        loop.add("a", [1], max_tokens=4)
        return loop.scheduler, loop.scheduler.schedule(0.0)

    scheduler, plan = planned()
    seq = plan.rows[0].seq
    wrong = [
        StepResult(0, plan.step + 1, [SampledToken(seq, 5)]),
        StepResult(0, plan.step, []),
        StepResult(0, plan.step, [SampledToken(seq, 5), SampledToken(seq + 1, 5)]),
        StepResult(0, plan.step, [SampledToken(seq, 5)], [], [SequenceFailure(seq + 1, "x")]),
    ]
    for result in wrong:
        scheduler, _ = planned()
        with pytest.raises(GroupLost):
            scheduler.update(result)
    scheduler, _ = planned()
    scheduler.update(answer(plan, 5))
    with pytest.raises(GroupLost):
        scheduler.update(answer(plan, 5))


def test_a_sample_goes_on_from_the_output_of_an_earlier_life(make_loop: LoopFactory) -> None:
    loop = make_loop()
    loop.add("a", [1] * 6, max_tokens=10, ignore_eos=True, n=3)
    loop.run()
    again = make_loop()
    group = [
        Request(
            request_id="a",
            sample_index=index,
            prompt_token_ids=[1] * 6,
            params=loop.streams["a", index].request.params,
            arrival=0.0,
            output_token_ids=loop.streams["a", index].tokens[:known],
        )
        for index, known in ((1, 4), (2, 6))
    ]
    again.scheduler.add(group)
    events: list[TokenEvent] = []
    while again.scheduler.has_work:
        again.send()
        events += again.scheduler.update(again.rank.execute(again.sent.popleft()))
    for index, known in ((1, 4), (2, 6)):
        own = [event for event in events if event.sample_index == index]
        assert own[0].first_index == known
        assert token_ids(own) == loop.streams["a", index].tokens[known:]
        talk = [1] * 6 + loop.streams["a", index].tokens + [2, 2]
        again.add(f"next{index}", talk, max_tokens=1)
        again.run()
        # 15 tokens were computed: 3 full blocks
        assert again.streams[f"next{index}", 0].events[0].cached_prompt_tokens == 12


def test_figures(make_loop: LoopFactory) -> None:
    loop = make_loop(num_blocks=10, block_size=4, max_running=1)
    loop.now = 3.0
    loop.add("a", [1] * 8, max_tokens=3, ignore_eos=True)
    loop.add("b", [1] * 8, max_tokens=3, ignore_eos=True)
    loop.now = 5.0
    loop.step()
    stats = loop.scheduler.stats()
    assert (stats.running, stats.waiting, stats.blocks_total, stats.steps) == (1, 1, 10, 1)
    assert (stats.blocks_free, stats.blocks_cached) == (7, 0)
    assert loop.scheduler.drain_queue_times() == [2.0]
    loop.now = 9.0
    loop.run()
    assert loop.scheduler.drain_queue_times() == [6.0]
    assert loop.scheduler.drain_queue_times() == []
    stats = loop.scheduler.stats()
    assert (stats.prefix_queried, stats.prefix_hit) == (16, 4), "the last token is computed"
    assert (stats.blocks_free, stats.blocks_cached) == (10, 2)


def test_errors_are_typed(make_loop: LoopFactory) -> None:
    loop = make_loop()
    with pytest.raises(PhalanxError):
        loop.add("a", [])
