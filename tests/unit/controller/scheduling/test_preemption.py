"""Too few blocks for everybody: who gives way, how often, and what it costs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from phalanx.controller.scheduling.request import FinishReason

LoopFactory = Callable[..., Any]


def test_the_youngest_gives_way_and_comes_back_first(make_loop: LoopFactory) -> None:
    loop = make_loop(num_blocks=9, block_size=2, prefix_caching=False, reserve_tokens=1)
    for index, name in enumerate("abc"):
        loop.add(name, [1, 1], max_tokens=8, ignore_eos=True, seed=index)
    loop.step()
    loop.add("late", [1], max_tokens=1, seed=9)
    events: list[tuple[str, int]] = []
    while loop.scheduler.has_work:
        before = loop.scheduler.stats().preemptions
        running = {new.new.params.seed for new in loop.rank.sequences.values()}
        plan = loop.step()
        if plan is None:
            continue
        if loop.scheduler.stats().preemptions > before:
            gone = running - {loop.rank.sequences[row.seq].new.params.seed for row in plan.rows}
            events += [("out", seed) for seed in gone]
        events += [("in", new.params.seed) for new in plan.new]
    loop.check_idle()
    assert next(event for event in events if event[0] == "out") == ("out", 2)
    assert events.index(("in", 2)) < events.index(("in", 9)), "ahead of the waiting"
    assert loop.rank.admissions[0, 0] == 1, "the oldest is never disturbed"


def test_a_preempted_sample_keeps_its_output_and_its_prompt_length(make_loop: LoopFactory) -> None:
    loop = make_loop(num_blocks=6, block_size=2, max_in_flight=3, reserve_tokens=1)
    for index in range(2):
        loop.add(f"r{index}", [1, 1, 1], max_tokens=8, ignore_eos=True, seed=index)
    again = None
    while loop.scheduler.has_work:
        plan = loop.send()
        for new in plan.new if plan else ():
            if len(new.token_ids) > new.num_prompt:
                again = new
                known = loop.streams["r1", 0].tokens
                assert new.token_ids == [1, 1, 1, *known]
        if plan is None or len(loop.sent) == 3:
            loop.receive()
    assert again is not None and again.num_prompt == 3
    loop.run()


@pytest.mark.parametrize("max_preemptions", [0, 1, 3])
def test_preemptions_are_bounded_under_pressure(
    make_loop: LoopFactory, max_preemptions: int
) -> None:
    """Demand is many times the pool: all end, none loses its blocks too often."""
    loop = make_loop(
        num_blocks=20,
        block_size=4,
        max_running=8,
        max_preemptions=max_preemptions,
        reserve_tokens=1,
        prefix_caching=False,
    )
    for index in range(24):
        loop.add(f"r{index}", [index % 3] * 6, max_tokens=30, ignore_eos=True, seed=index)
    loop.run()
    assert max(loop.rank.admissions.values()) <= max_preemptions + 1
    assert all(stream.finish is FinishReason.LENGTH for stream in loop.streams.values())
    if max_preemptions == 0:
        assert loop.scheduler.stats().preemptions == 0
    else:
        assert loop.scheduler.stats().preemptions > 0


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_little_is_recomputed_under_pressure(make_loop: LoopFactory, prefix_caching: bool) -> None:
    """All at once ask for four times the pool, and grow to sixteen times their prompts."""
    loop = make_loop(
        num_blocks=128,
        block_size=16,
        max_running=32,
        max_context=512,
        max_tokens_per_step=256,
        prefix_caching=prefix_caching,
    )
    for index in range(32):
        prompt = [index % 8, index // 8, *([1] * 14)]
        loop.add(f"r{index}", prompt, max_tokens=240, ignore_eos=True, seed=index)
    loop.run()
    assert loop.scheduler.stats().preemptions > 0
    needed = 32 * (16 + 240 - 1)
    assert sum(loop.rank.computed.values()) <= 1.15 * needed
