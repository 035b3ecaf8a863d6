"""Prompts on one replica and streams on another; prefixes that are copied; queues that are eased."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from phalanx.controller.routing.router import Work
from phalanx.protos.errors import TransferFailed, Unavailable

PROMPT = [17 + 3 * place for place in range(70)]
PARAMS: list[dict[str, Any]] = [{}, {"temperature": 0.9, "seed": 5, "n": 2}, {"max_tokens": 1}]


async def ask_all(scene: Any, label: str) -> list[Any]:
    readers = [
        scene.ask(f"{label} {number}", [number, *PROMPT], **({"max_tokens": 60} | params))
        for number, params in enumerate(PARAMS)
    ]
    for _, task in readers:
        await task
    return [read.tokens for read, _ in readers]


def test_prompts_are_computed_here_and_answers_there(
    tiny_llama: Callable[..., Path], play: Callable[..., None]
) -> None:
    async def work(scene: Any) -> None:
        await scene.start(1, 2)
        expected = await ask_all(scene, "alone")  # a decode replica alone does both
        await scene.start(0, 1)
        assert await ask_all(scene, "apart") == expected
        moves = [(kept.request_id, kept.move) for kept in scene.engine.moves()]
        done = {name for name, move in moves if move.outcome == "moved"}
        assert {"apart 0", "apart 1"} <= done
        assert {(move.reason, move.source, move.target) for _, move in moves} == {("decode", 0, 1)}
        await scene.settle()

    play(str(tiny_llama()), work, {"prefill": 1})


@pytest.mark.parametrize("fails", [False, True])
def test_what_another_replica_has_cached_is_copied_not_computed(
    tiny_llama: Callable[..., Path],
    play: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    fails: bool,
) -> None:
    """Here every copy counts as fast, and the holder has too much to do. Where a copy fails, the
    request is placed anew, without one."""
    monkeypatch.setattr("phalanx.controller.routing.loads.COPY_START_S", 0.0)
    monkeypatch.setattr("phalanx.controller.routing.loads.COPY_MARGIN", 1e9)

    async def fail(*_: Any) -> None:
        raise TransferFailed("cut off")

    if fails:
        monkeypatch.setattr("phalanx.controller.movement.mover._Run.copy_prefix", fail)

    async def work(scene: Any) -> None:
        for index in (0, 1):
            await scene.start(index, 1 + index)
        scene.close(1)
        first, task = scene.ask("first", PROMPT, max_tokens=12)
        await task
        scene.open(1)
        busy = [scene.ask(f"busy {n}", [n, 3], max_tokens=150) for n in range(2)]
        scene.engine._placer.loads.charge(0, Work(), Work(queue_tokens=10**6))
        again, task = scene.ask("again", PROMPT, max_tokens=12)
        await task
        assert again.tokens == first.tokens
        [move] = [move for move in moves if move.reason == "prefix"]
        assert (move.source, move.target) == (0, 1)
        decisions = [
            item.decision for item in scene.engine.placements() if item.request_id == "again"
        ]
        # of 70 tokens, the blocks of 4 before the last
        assert decisions[0].source == 0 and decisions[0].estimates[0].copied_tokens == 68
        if fails:
            assert move.outcome == "failed" and again.cached == 0
            assert decisions[1].replica == 1 and not decisions[1].estimates[0].copied_tokens
        else:
            assert move.outcome == "moved" and again.cached == 68 and len(decisions) == 1
        for _, task in busy:
            await task
        await scene.settle()

    moves: list[Any] = []
    play(str(tiny_llama()), work, {"on_move": moves.append})


def test_a_stream_moves_to_where_nobody_waits(
    tiny_llama: Callable[..., Path], play: Callable[..., None]
) -> None:
    async def work(scene: Any) -> None:
        await scene.start(0, 1, max_running=1)
        calm, task = scene.ask("calm", PROMPT, max_tokens=100)
        await task
        await scene.start(1, 2, joins=False)
        first, running = scene.ask("first", PROMPT, max_tokens=100)
        waiting = scene.ask("waiting", [5, 4], max_tokens=4)[1]
        await scene.until(lambda: len(first.tokens.get(0, ())) > 4)
        await scene.join(1)
        scene.engine.tick(0.0)
        await waiting
        await running
        assert first.tokens == calm.tokens
        [kept] = scene.engine.moves()
        assert (kept.request_id, kept.move.reason) == ("first", "rebalance")
        assert kept.move.outcome == "moved"
        await scene.settle()

    play(str(tiny_llama()), work, {"rebalance": True})


def test_the_only_replica_is_not_drained(
    tiny_llama: Callable[..., Path], play: Callable[..., None]
) -> None:
    async def work(scene: Any) -> None:
        await scene.start(0, 1)
        read, task = scene.ask("only", PROMPT, max_tokens=9)
        with pytest.raises(Unavailable, match="only"):
            await scene.engine.drain(0)
        with pytest.raises(Unavailable, match="replica-1"):
            await scene.engine.drain(1)
        await task
        assert len(read.tokens[0]) == 9 and scene.engine.serving

    play(str(tiny_llama()), work)
