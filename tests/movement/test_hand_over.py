"""Running streams go on at another replica from their KV blocks, with the very same tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

PARAMS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.9, "seed": 5},
    {"temperature": 1.1, "seed": 6, "n": 3, "top_k": 30, "repetition_penalty": 1.2},
    {"temperature": 0.8, "seed": 7, "logprobs": 2},
]
PROMPTS = [[5, 17, 300, 44, 9, 9, 81, 80, 2, 99, 12, 13, number] for number in range(len(PARAMS))]
TOKENS = 100


def ask_all(scene: Any, label: str) -> list[tuple[Any, Any]]:
    asks = zip(PROMPTS, PARAMS, strict=True)
    return [
        scene.ask(f"{label}-{number}", prompt, max_tokens=TOKENS, **params)
        for number, (prompt, params) in enumerate(asks)
    ]


async def alone(scene: Any) -> list[dict[int, list[int]]]:
    """What the requests get where nothing moves."""
    readers = ask_all(scene, "alone")
    for _, task in readers:
        await task
    return [read.tokens for read, _ in readers]


@pytest.mark.parametrize(
    ("source", "target", "processes", "overrides"),
    [
        ((1, 1), (3, 1), False, {}),
        (
            (2, 1),
            (1, 1),
            False,
            {"hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3},
        ),
        ((2, 1), (1, 1), True, {}),
        ((1, 2), (2, 1), False, {"num_hidden_layers": 3}),
    ],
    ids=["one to three", "uneven to one", "processes", "stages to ranks"],
)
def test_a_drained_replica_hands_its_streams_over(
    tiny_llama: Callable[..., Path],
    play: Callable[..., None],
    source: tuple[int, int],
    target: tuple[int, int],
    processes: bool,
    overrides: dict[str, Any],
) -> None:
    async def work(scene: Any) -> None:
        await scene.start(0, *source, processes=processes)
        expected = await alone(scene)
        await scene.start(1, *target, processes=processes)
        readers = ask_all(scene, "moved")
        await scene.until(lambda: all(len(r.tokens.get(0, ())) > 5 for r, _ in readers))
        leaving = scene.streams_on(0)
        report = await scene.engine.drain(0)
        for _, task in readers:
            await task
        assert [read.tokens for read, _ in readers] == expected
        assert (report.moved, report.recomputed) == (leaving, 0)
        assert leaving > 0
        moves = [kept.move for kept in scene.engine.moves()]
        assert {(move.reason, move.outcome) for move in moves} == {("drain", "moved")}
        assert all(move.num_bytes > 0 for move in moves)
        await scene.settle()

    play(str(tiny_llama(**overrides)), work)
