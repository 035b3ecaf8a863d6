"""Blocks go from the ranks of one group to those of another, which then go on with the tokens."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from phalanx.protos.sampling import SamplingParams
from phalanx.protos.steps import NewSequence, Row, StepPlan
from phalanx.protos.transfers import NO_BLOCK, Offer, Take, Taken, Withdraw

PROMPT = [5, 17, 300, 44, 9, 9, 81, 80, 2, 99]
BEFORE, AFTER = 6, 8
PARAMS = SamplingParams(temperature=0.0, ignore_eos=True)
THREE_HEADS = {"hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3}


class Group:
    """A fleet whose plans the test makes, of one sequence at a time."""

    def __init__(self, fleet: Any, epoch: int) -> None:
        self.fleet, self._epoch, self._step = fleet, epoch, 0

    def plan(self, new: list[NewSequence], rows: list[Row]) -> list[int]:
        self.fleet.send(StepPlan(self._epoch, self._step, [], new, [], rows))
        self._step += 1
        return [token.token_id for token in self.fleet.receive(60).sampled]

    def begin(self, seq: int, tokens: list[int], computed: int, blocks: list[int]) -> list[int]:
        new = NewSequence(seq, tokens, len(PROMPT), computed, PARAMS)
        return self.plan([new], [Row(seq, len(tokens) - computed, blocks)])

    def go_on(self, seq: int, count: int) -> list[int]:
        return [token for _ in range(count) for token in self.plan([], [Row(seq, 1, [])])]

    def taken(self, count: int) -> list[tuple[int, Taken]]:
        """What ranks say of transfers, once they have said so much."""
        deadline, found = time.monotonic() + 60, list[tuple[int, Taken]]()
        while len(found) < count and time.monotonic() < deadline:
            self.fleet.check()
            found += self.fleet.drain_taken()
            time.sleep(0.002)
        return found


def move(source: Group, target: Group, blocks: list[int], places: list[int], ranks: int) -> int:
    """Blocks of the source to places of the target, in two parts; the bytes that came."""
    cut = len(blocks) // 2
    # the target may ask before the source has offered
    parts = [[*places[:cut]], [*places[cut:], 15]]
    target.fleet.tell(Take(1, source.fleet.exchange, parts))
    source.fleet.tell(Offer(1, 0, blocks[:cut]))
    first = target.taken(ranks)
    assert [message.error for _, message in first] == [""] * ranks
    source.fleet.tell(Offer(1, 1, [*blocks[cut:], NO_BLOCK]))
    second = target.taken(ranks)
    assert [(message.part, message.error) for _, message in second] == [(1, "")] * ranks
    source.fleet.tell(Withdraw(1))
    return sum(message.num_bytes for _, message in [*first, *second])


@pytest.mark.parametrize(
    ("source_cut", "target_cut", "overrides", "dtype"),
    [
        ((1, 1), (3, 1), {}, "float32"),  # two heads on three ranks: one head is held twice
        ((3, 1), (2, 1), {}, "int8"),
        ((2, 1), (1, 1), THREE_HEADS, "float32"),  # two heads and one
        ((2, 1), (3, 1), THREE_HEADS, "int8"),
        ((1, 2), (2, 1), {"num_hidden_layers": 3}, "float32"),  # stages of two layers and one
        ((1, 1), (2, 2), {"num_hidden_layers": 3}, "float32"),
    ],
)
def test_a_sequence_goes_on_in_another_group(
    tiny_llama: Callable[..., Path],
    group_of: Callable[..., Any],
    source_cut: tuple[int, int],
    target_cut: tuple[int, int],
    overrides: dict[str, Any],
    dtype: str,
) -> None:
    """Nothing but the last token is computed there. With rounded keys too, the tokens are those
    of the source alone."""
    model = str(tiny_llama(**overrides))
    source = Group(group_of(model, *source_cut, kv_dtype=dtype, epoch=3), 3)
    target = Group(group_of(model, *target_cut, kv_dtype=dtype, epoch=9), 9)
    tokens = [*PROMPT, *source.begin(1, PROMPT, 0, [7, 2, 9, 4, 11, 1])]
    tokens += source.go_on(1, BEFORE)
    computed = len(tokens) - 1
    blocks = [7, 2, 9, 4][: -(-computed // 4)]
    places = [3, 0, 12, 5][: len(blocks)]
    ranks = target_cut[0] * target_cut[1]
    moved = move(source, target, blocks, places, ranks)
    assert moved >= len(blocks) * 4 * 2 * 8  # tokens, keys and values, elements of a head
    expected = source.go_on(1, AFTER)
    went_on = target.begin(5, tokens, computed, [*places, 8, 10, 14])
    went_on += target.go_on(5, AFTER - 1)
    assert went_on == expected
