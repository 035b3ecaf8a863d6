"""Blocks that are offered to another replica stay as they are until the offer is withdrawn."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from phalanx.protos.errors import TransferFailed

PROMPT = [0, 1, 1, 0, 1, 0, 0, 1, 1, 1, 0, 0, 1]


def fill(loop: Any, names: str) -> None:
    """Requests that together want every block there is, and more."""
    for number, name in enumerate(names):
        loop.add(name, [number % 2, number // 2] * 4, max_tokens=12, ignore_eos=True)
    loop.run()


def test_of_a_prefix_that_others_would_evict(make_loop: Callable[..., Any]) -> None:
    loop = make_loop(num_blocks=8, block_size=4)
    loop.add("first", PROMPT, max_tokens=2, ignore_eos=True)
    loop.run()
    departures = loop.scheduler.departures
    outline, offer = departures.offer_prefix(1, "default", PROMPT)
    assert outline.token_ids == PROMPT[:12] and len(offer.blocks) == 3
    before = [copy.copy(loop.rank.pool[block]) for block in offer.blocks]
    assert loop.cache.num_free == 5
    for name in ("abcd", "efgh"):
        loop.scheduler.check_integrity()
        for number, each in enumerate(name):
            loop.add(each, [number % 2, number // 2] * 4, max_tokens=8, ignore_eos=True)
        while loop.scheduler.has_work:
            loop.step()
    assert [loop.rank.pool[block] for block in offer.blocks] == before
    assert departures.withdraw(1) is not None and departures.withdraw(1) is None
    fill(loop, "ijkl")
    assert [loop.rank.pool[block] for block in offer.blocks] != before
    loop.check_idle()


def test_of_a_request_that_ends_meanwhile(make_loop: Callable[..., Any]) -> None:
    loop = make_loop(num_blocks=8, block_size=4)
    loop.add("first", PROMPT, max_tokens=20, ignore_eos=True)
    for _ in range(4):
        loop.step()
    _, offer = loop.scheduler.departures.offer(1, "first")
    while loop.sent:
        loop.receive()
    before = [copy.copy(loop.rank.pool[block]) for block in offer.blocks]
    loop.feed(loop.scheduler.abort("first"))
    for name in "abcd":
        loop.add(name, [1, 1, 0, 1], max_tokens=8, ignore_eos=True)
    while loop.scheduler.has_work:
        loop.step()
    assert [loop.rank.pool[block] for block in offer.blocks] == before
    loop.scheduler.departures.withdraw(1)
    loop.check_idle()


def test_what_is_not_there_is_not_offered(make_loop: Callable[..., Any]) -> None:
    loop = make_loop()
    departures = loop.scheduler.departures
    loop.add("waits", PROMPT, max_tokens=2)
    loop.add("scored", [1, 2], max_tokens=2, prompt_logprobs=0)
    with pytest.raises(TransferFailed, match="run"):
        departures.offer(1, "waits")
    with pytest.raises(TransferFailed, match="run"):
        departures.offer(1, "nobody")
    loop.send()
    with pytest.raises(TransferFailed, match="scored"):
        departures.offer(1, "scored")
    with pytest.raises(TransferFailed, match="not cached"):
        departures.offer_prefix(1, "somebody else", PROMPT)
    with pytest.raises(TransferFailed):
        departures.freeze(1, 8)
    loop.run()


def test_a_frozen_request_gets_no_rows_and_runs_on_when_it_is_let_go(
    make_loop: Callable[..., Any],
) -> None:
    loop = make_loop(block_size=4)
    loop.add("first", PROMPT, max_tokens=20, ignore_eos=True)
    loop.send()
    departures = loop.scheduler.departures
    departures.offer(1, "first")
    with pytest.raises(TransferFailed, match="can be"):
        departures.freeze(1, 0)
    departures.freeze(1, 4)
    assert loop.scheduler.schedule(0.0) is None
    assert departures.settled(1) is None
    loop.receive()
    [standing] = departures.settled(1).values()
    assert (standing.num_known, standing.num_computed) == (len(PROMPT) + 1, len(PROMPT))
    departures.withdraw(1)
    loop.run()
