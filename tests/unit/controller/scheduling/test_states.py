"""Models with state spaces: where states are kept, and who begins from them.

The rank of these loops checks that every row finds the state of its own prefix.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

LoopFactory = Callable[..., Any]


def cached_tokens(loop: Any, name: str, prompt: list[int], **given: Any) -> int:
    """Run a request alone; how many of its prompt tokens a kept state spared."""
    loop.add(name, prompt, **({"max_tokens": 2} | given))
    loop.run()
    return int(loop.streams[name, 0].events[0].cached_prompt_tokens)


def spread(first: int, count: int) -> list[int]:
    return [(first + 3 * index) % 8 for index in range(count)]


def test_a_prompt_is_taken_up_behind_its_last_full_block(make_loop: LoopFactory) -> None:
    loop = make_loop(num_states=4)
    prompt = spread(1, 18)
    assert cached_tokens(loop, "cold", prompt) == 0
    assert cached_tokens(loop, "same", prompt) == 16
    assert cached_tokens(loop, "longer", prompt + spread(2, 5)) == 16
    assert cached_tokens(loop, "shorter", prompt[:14]) == 0, "its blocks are known, no state is"
    assert cached_tokens(loop, "even", prompt[:16]) == 12, "the shorter one left it"
    assert cached_tokens(loop, "stranger", prompt, tenant="b") == 0


@pytest.mark.parametrize("chunk", [1, 3, 7, 32])
def test_where_prompts_part_a_state_is_kept(make_loop: LoopFactory, chunk: int) -> None:
    """A common beginning shows with the second prompt that has it; the third makes use of it."""
    loop = make_loop(num_states=8, max_running=1, max_tokens_per_step=chunk)
    common = spread(5, 21)
    assert cached_tokens(loop, "first", common + spread(1, 12)) == 0
    assert cached_tokens(loop, "second", common + spread(2, 12)) == 0
    assert cached_tokens(loop, "third", common + spread(3, 12)) == 20


def test_states_are_kept_at_a_stride(make_loop: LoopFactory) -> None:
    loop = make_loop(num_states=8, state_stride=7)  # two blocks of 4
    common = spread(5, 21)
    assert cached_tokens(loop, "first", common + spread(1, 12)) == 0
    assert cached_tokens(loop, "second", common + spread(2, 12)) == 16


def test_forks_begin_from_a_copy(make_loop: LoopFactory) -> None:
    for caching in (True, False):
        loop = make_loop(num_states=5, prefix_caching=caching)
        loop.add("r", spread(1, 11), n=4, max_tokens=5, ignore_eos=True, seed=7)
        loop.run()
        # the prompt but for its last token once, that one and four of the five outputs each
        assert sum(loop.rank.computed.values()) == 10 + 4 * 5


def test_forks_whose_state_gave_way_begin_where_they_can(make_loop: LoopFactory) -> None:
    """Two slots for four samples: what is kept for forks gives way to the second of them."""
    loop = make_loop(num_states=2)
    loop.add("r", spread(1, 11), n=4, max_tokens=5, ignore_eos=True, seed=7)
    loop.run()
    assert sum(loop.rank.computed.values()) > 10 + 4 * 5


def test_as_many_run_as_there_are_slots(make_loop: LoopFactory) -> None:
    loop = make_loop(num_states=3, max_running=8)
    for index in range(7):
        loop.add(f"r{index}", spread(index, 9), max_tokens=6, ignore_eos=True)
    most = 0
    while loop.scheduler.has_work or loop.sent:
        loop.step()
        most = max(most, loop.scheduler.num_running)
    loop.check_idle()
    assert most == 3


def test_the_least_recently_used_states_give_way(make_loop: LoopFactory) -> None:
    loop = make_loop(num_states=4)  # one for whoever runs, three are kept
    prompts = {name: spread(index, 9) for index, name in enumerate("abc")}
    for name, prompt in prompts.items():
        assert cached_tokens(loop, name, prompt) == 0
    assert cached_tokens(loop, "a again", prompts["a"]) == 8
    assert cached_tokens(loop, "d", spread(3, 9)) == 0
    assert cached_tokens(loop, "a once more", prompts["a"]) == 8
    assert cached_tokens(loop, "b again", prompts["b"]) == 0


def test_a_broken_state_is_never_begun_from(make_loop: LoopFactory) -> None:
    loop = make_loop(num_states=4)
    loop.rank.poisoned.add((77, 0))
    loop.add("broken", spread(1, 9), seed=77, max_tokens=4)
    loop.run()
    assert cached_tokens(loop, "same", spread(1, 9), seed=5) == 0
