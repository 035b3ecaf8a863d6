"""Rows of a plan and the slots of their states."""

from __future__ import annotations

import pytest
import torch

from phalanx.protos.errors import GroupLost
from phalanx.protos.steps import NO_STATE, Row, StateSave, StateUse
from phalanx.workers.states import Carried, StateRows, check_states

CPU = torch.device("cpu")


def row(count: int, read: int, write: int, *saves: tuple[int, int]) -> Row:
    return Row(1, count, [], StateUse(read, write, [StateSave(*save) for save in saves]))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row(1, 0, 4)], "state 4, there are 4"),
        ([row(1, 4, 0)], "state 4"),
        ([row(1, 0, NO_STATE)], "state -1"),
        ([row(5, 0, 0, (2, 9))], "state 9"),
        ([row(1, 0, 0), row(1, 1, 0)], r"a state of \[0\] twice"),
        ([row(5, 0, 0, (2, 0))], "twice"),
        ([row(5, 0, 0, (2, 1)), row(1, 1, 1)], "twice"),
        ([row(1, 0, 1), row(1, 0, 0)], r"begins from states \[0\] and writes them"),
        ([row(1, 0, 1), row(3, 2, 2, (1, 0))], "and writes them"),
        ([row(5, 0, 0, (6, 1))], r"behind tokens \[6\]"),
        ([row(5, 0, 0, (0, 1))], r"behind tokens \[0\]"),
        ([row(5, 0, 0, (3, 1), (2, 2))], r"behind tokens \[3, 2\]"),
    ],
)
def test_plans_that_would_mix_up_states_are_refused(rows: list[Row], message: str) -> None:
    with pytest.raises(GroupLost, match=message):
        check_states(rows, 4)


def test_a_row_without_a_slot_is_refused() -> None:
    check_states([Row(1, 1, [])], 0)  # a model without states
    with pytest.raises(GroupLost, match="where the states of sequence 1 are"):
        StateRows.of([Row(1, 1, [])], CPU)


@pytest.mark.parametrize("piece", [1, 2, 100])
def test_every_row_finds_and_leaves_its_state(monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    rows = [
        row(3, 0, 1),
        row(1, 0, 2),
        row(1, NO_STATE, 3, (1, 4)),
        row(2, 5, 5, (1, 6), (2, 7)),
        row(1, 8, 8),
    ]
    check_states(rows, 9)
    found, pool = StateRows.of(rows, CPU), torch.arange(9.0).add(10)[:, None].clone()
    carried = Carried(found, pool)
    monkeypatch.setattr("phalanx.workers.states.PIECE_ELEMENTS", piece)
    for part in carried.pieces():
        carried.store(part, carried.load(part) + 100)
    for run in found.runs:
        state = carried.begin(run)
        for count, slot in run.saves:
            carried.keep(slot, state + 1000 * count)
        carried.keep(run.write, state + 200)
    carried.finish()
    assert pool[:, 0].tolist() == [10, 210, 110, 100, 100, 215, 1015, 215, 118]
