"""Prefixes and forks: who shares blocks with whom, and who never does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from phalanx.controller.scheduling.request import FinishReason

LoopFactory = Callable[..., Any]


def cached_tokens(loop: Any, name: str, prompt: list[int], **given: Any) -> int:
    """Run a request alone; how many of its prompt tokens the cache spared."""
    loop.add(name, prompt, **given)
    loop.run()
    first, *later = loop.streams[name, 0].events
    assert not any(event.cached_prompt_tokens for event in later)
    return int(first.cached_prompt_tokens)


def test_a_tenant_reuses_its_own_prefixes_only(make_loop: LoopFactory) -> None:
    loop = make_loop(block_size=4)
    prompt = [1, 2, 1, 2, 2, 1, 1, 1, 2]
    assert cached_tokens(loop, "cold", prompt, tenant="a", max_tokens=2) == 0
    assert cached_tokens(loop, "warm", prompt, tenant="a", max_tokens=2) == 8
    assert cached_tokens(loop, "branch", prompt[:4] + [5] * 6, tenant="a", max_tokens=2) == 4
    assert cached_tokens(loop, "stranger", prompt, tenant="b", max_tokens=2) == 0
    assert cached_tokens(loop, "shifted", [1, *prompt], tenant="a", max_tokens=2) == 0


def test_the_next_turn_of_a_talk_finds_the_last_answer(make_loop: LoopFactory) -> None:
    loop = make_loop(block_size=4)
    loop.add("one", [1] * 10, max_tokens=11, ignore_eos=True)
    while loop.scheduler.has_work:
        while loop.send():
            pass
        loop.receive()
    # 20 of the 21 tokens were computed: 5 full blocks
    talk = [1] * 10 + loop.streams["one", 0].tokens + [2, 2, 2]
    assert cached_tokens(loop, "two", talk, max_tokens=2) == 20


def test_a_prompt_that_is_being_computed_is_shared_already(make_loop: LoopFactory) -> None:
    loop = make_loop(block_size=4, max_tokens_per_step=64)
    loop.add("a", [1] * 17, max_tokens=4, ignore_eos=True)
    loop.send()
    loop.add("b", [1] * 17, max_tokens=4, ignore_eos=True)
    plan = loop.send()
    assert plan.new[0].num_computed == 16
    loop.run()


def test_caching_can_be_turned_off(make_loop: LoopFactory) -> None:
    loop = make_loop(prefix_caching=False)
    for name in ("a", "b"):
        assert cached_tokens(loop, name, [1] * 20, max_tokens=2) == 0
    assert loop.scheduler.stats().blocks_cached == 0


def test_samples_share_all_but_the_last_block_of_their_prompt(make_loop: LoopFactory) -> None:
    loop = make_loop(num_blocks=64, block_size=16, max_tokens_per_step=512)
    loop.add("a", [1, 2] * 50, n=4, max_tokens=8, ignore_eos=True, seed=5)
    first = loop.step()
    assert [row.num_new for row in first.rows] == [100]
    assert loop.cache.num_blocks - loop.cache.num_free == 7
    second = loop.step()
    # 100 tokens: six full blocks are shared, the seventh is copied for each follower
    assert loop.cache.num_blocks - loop.cache.num_free == 7 + 3
    assert len(second.copies) == 3
    assert [row.num_new for row in second.rows] == [1, 1, 1, 1]
    assert [new.num_computed for new in second.new] == [99, 99, 99]
    loop.run()
    assert loop.rank.computed == {(5, 0): 107, (5, 1): 8, (5, 2): 8, (5, 3): 8}
    outputs = [loop.streams["a", index].tokens for index in range(4)]
    assert len({tuple(output) for output in outputs}) == 4


def test_a_fork_at_the_border_of_blocks_copies_nothing(make_loop: LoopFactory) -> None:
    loop = make_loop(block_size=4)
    loop.add("a", [1] * 9, n=2, max_tokens=3, ignore_eos=True)
    loop.step()
    plan = loop.step()
    assert plan.new and not plan.copies
    loop.run()


def test_followers_do_not_hold_up_others(make_loop: LoopFactory) -> None:
    """While the leader computes a long prompt in chunks, the next request is admitted."""
    loop = make_loop(max_tokens_per_step=8)
    loop.add("many", [1] * 40, n=3, max_tokens=4, ignore_eos=True)
    loop.add("other", [2] * 3, max_tokens=2, ignore_eos=True)
    for _ in range(6):
        loop.step()
    assert loop.streams["other", 0].tokens
    loop.run()


@pytest.mark.parametrize("steps", [0, 1, 3, 7])
@pytest.mark.parametrize("victim", [0, 1])
def test_ending_one_sample_leaves_the_others(
    make_loop: LoopFactory, steps: int, victim: int
) -> None:
    """Before, while and after the leader computes the prompt."""
    loop = make_loop(max_tokens_per_step=8)
    loop.add("a", [1] * 40, n=3, max_tokens=6, ignore_eos=True)
    for _ in range(steps):
        loop.step()
    loop.feed(loop.scheduler.abort("a", victim))
    loop.run()
    finishes = [loop.streams["a", index].finish for index in range(3)]
    expected = [FinishReason.LENGTH] * 3
    expected[victim] = FinishReason.ABORT
    assert finishes == expected


def test_the_first_follower_inherits_the_place_in_the_queue(make_loop: LoopFactory) -> None:
    loop = make_loop(max_running=1)
    loop.add("runs", [1], max_tokens=5, ignore_eos=True)
    loop.step()
    loop.add("many", [1] * 9, n=2, max_tokens=2, ignore_eos=True, seed=50)
    loop.add("last", [1], max_tokens=2, ignore_eos=True, seed=60)
    loop.feed(loop.scheduler.abort("many", 0))
    order = []
    while loop.scheduler.has_work:
        plan = loop.step()
        order += [new.params.seed for new in plan.new] if plan else []
    assert order == [50, 60]


def test_a_leader_that_fails_leaves_its_followers_alive(make_loop: LoopFactory) -> None:
    loop = make_loop()
    loop.add("a", [1] * 10, n=3, max_tokens=6, ignore_eos=True, seed=4)
    loop.rank.poisoned.add((4, 0))
    loop.run()
    finishes = [loop.streams["a", index].finish for index in range(3)]
    assert finishes == [FinishReason.ERROR, FinishReason.LENGTH, FinishReason.LENGTH]
