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


def lost(loop: Any) -> list[str]:
    """Who loses blocks, in order, until all is done."""
    names = {stream.request.params.seed: name for (name, _), stream in loop.streams.items()}
    found: list[str] = []
    running: set[int] = set()
    while loop.scheduler.has_work:
        before = loop.scheduler.stats().preemptions
        plan = loop.step()
        now = {state.new.params.seed for state in loop.rank.sequences.values()}
        if plan is not None and loop.scheduler.stats().preemptions > before:
            ended = {s.request.params.seed for s in loop.streams.values() if s.finish is not None}
            found += [names[seed] for seed in sorted(running - now - ended)]
        running = now
    loop.check_idle()
    return found


TIGHT = {"num_blocks": 9, "block_size": 2, "prefix_caching": False, "reserve_tokens": 1}


@pytest.mark.parametrize("place", [0, 1, 2])
def test_the_least_urgent_gives_way_first_wherever_it_stands(
    make_loop: LoopFactory, place: int
) -> None:
    found = []
    for _ in range(2):
        loop = make_loop(**TIGHT)
        loop._check_streams = lambda plan: None
        for index in range(3):
            priority = 5 if index == place else 0
            loop.add(f"r{index}", [1, 1], max_tokens=8, ignore_eos=True, priority=priority)
        found.append(lost(loop))
    assert found[0] == found[1] and found[0][0] == f"r{place}"


def test_who_runs_more_than_its_share_gives_way_first(make_loop: LoopFactory) -> None:
    loop = make_loop(**TIGHT)
    for index, tenant in enumerate(["many", "many", "one"]):
        # a priority is worth nothing between tenants
        priority = 9 if tenant == "one" else 0
        loop.add(f"{tenant}{index}", [1, 1], max_tokens=8, ignore_eos=True, tenant=tenant,
                 priority=priority)  # fmt: skip
    assert lost(loop)[0] == "many1"
