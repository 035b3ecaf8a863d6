"""The checker finds each kind of fault that is put into a right history, and none in a right one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
from harness.history import Answer, End, Fault, Piece, Record, Remains, bound, judge, reference_of
from hypothesis import given, settings
from hypothesis import strategies as st

Draw = st.DataObject
REASONS = ("stop", "length")


@st.composite
def worlds(draw: st.DrawFn) -> tuple[dict[int, Answer], list[Record]]:
    """Answers, and records of readers who got them in pieces of any sizes."""
    answers: dict[int, Answer] = {}
    records = []
    for number in range(draw(st.integers(1, 4))):
        samples = draw(st.integers(1, 3))
        record = Record(request=number, samples=samples)
        answer, clock = {}, 0.0
        for index in range(samples):
            tokens = tuple(draw(st.lists(st.integers(0, 99), min_size=1, max_size=8)))
            answer[index] = (tokens, draw(st.sampled_from(REASONS)))
            first = 0
            while first < len(tokens):
                size, clock = draw(st.integers(1, 3)), clock + 1
                record.pieces.append(Piece(clock, index, first, tokens[first : first + size]))
                first += size
            record.ends.append(End(clock, index, answer[index][1]))
        record.closed_at = clock
        answers[number] = answer
        records.append(record)
    return answers, records


def some(draw: Draw, records: list[Record]) -> Record:
    return draw.draw(st.sampled_from(records))


def drop_a_piece(draw: Draw, record: Record) -> str:
    """A lost message in the middle is a gap; at the end of a sample, tokens are missing."""
    index = draw.draw(st.integers(0, len(record.pieces) - 1))
    piece = record.pieces.pop(index)
    later = any(other.sample == piece.sample for other in record.pieces[index:])
    return "skipped" if later else "changed"


def repeat_a_piece(draw: Draw, record: Record) -> str:
    index = draw.draw(st.integers(0, len(record.pieces) - 1))
    record.pieces.insert(index, record.pieces[index])
    return "duplicated"


def overlap(draw: Draw, record: Record) -> str:
    """The last token of a piece comes again with the next message."""
    index = draw.draw(st.integers(0, len(record.pieces) - 1))
    piece = record.pieces[index]
    again = Piece(piece.at, piece.sample, piece.first + len(piece.tokens) - 1, piece.tokens[-1:])
    record.pieces.insert(index + 1, again)
    return "duplicated"


def change_a_token(draw: Draw, record: Record) -> str:
    index = draw.draw(st.integers(0, len(record.pieces) - 1))
    piece = record.pieces[index]
    place = draw.draw(st.integers(0, len(piece.tokens) - 1))
    tokens = tuple(100 if i == place else token for i, token in enumerate(piece.tokens))
    record.pieces[index] = dataclasses.replace(piece, tokens=tokens)
    return "changed"


def swap_samples(draw: Draw, record: Record) -> str:
    """A piece goes to a sample that nobody asked for."""
    index = draw.draw(st.integers(0, len(record.pieces) - 1))
    record.pieces[index] = dataclasses.replace(record.pieces[index], sample=record.samples)
    return "changed"


def lose_an_end(draw: Draw, record: Record) -> str:
    record.ends.pop(draw.draw(st.integers(0, len(record.ends) - 1)))
    return "lost"


def end_twice(draw: Draw, record: Record) -> str:
    record.ends.append(draw.draw(st.sampled_from(record.ends)))
    return "ended-twice"


def end_otherwise(draw: Draw, record: Record) -> str:
    index = draw.draw(st.integers(0, len(record.ends) - 1))
    record.ends[index] = dataclasses.replace(record.ends[index], reason="abort")
    return "changed"


def speak_after_the_end(draw: Draw, record: Record) -> str:
    index = draw.draw(st.integers(0, len(record.ends) - 1))
    record.ends[index] = dataclasses.replace(record.ends[index], at=-1.0)
    return "after-end"


def fail(draw: Draw, record: Record) -> str:
    record.error = "UNAVAILABLE"
    return "lost"


def never_close(draw: Draw, record: Record) -> str:
    record.closed_at = None
    return "open"


def refuse_late(draw: Draw, record: Record) -> str:
    record.refused = True
    return "refused-late"


PLANTED: tuple[Callable[[Draw, Record], str], ...] = (
    drop_a_piece,
    repeat_a_piece,
    overlap,
    change_a_token,
    swap_samples,
    lose_an_end,
    end_twice,
    end_otherwise,
    speak_after_the_end,
    fail,
    never_close,
    refuse_late,
)


@settings(deadline=None)
@given(worlds())
def test_a_right_history_has_no_faults(world: tuple[dict[int, Answer], list[Record]]) -> None:
    answers, records = world
    assert judge(records, answers, Remains(7, 7)) == []
    assert reference_of([records, records]) == answers


@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__)
@settings(deadline=None)
@given(world=worlds(), draw=st.data())
def test_a_planted_fault_is_found_and_named(
    plant: Callable[[Draw, Record], str],
    world: tuple[dict[int, Answer], list[Record]],
    draw: Draw,
) -> None:
    answers, records = world
    record = some(draw, records)
    kind = plant(draw, record)
    found = judge(records, answers)
    assert kind in {fault.kind for fault in found}
    assert {fault.request for fault in found} == {record.request}


@settings(deadline=None)
@given(worlds(), st.data())
def test_who_left_or_was_refused_has_lost_nothing(
    world: tuple[dict[int, Answer], list[Record]], draw: Draw
) -> None:
    """But what came before must still be right."""
    answers, records = world
    gone, refused = some(draw, records), Record(request=0, refused=True)
    del gone.pieces[draw.draw(st.integers(0, len(gone.pieces))) :]
    gone.left, gone.closed_at, gone.ends = True, None, []
    assert judge([*records, refused], answers) == []
    if gone.pieces:
        change_a_token(draw, gone)
        assert {fault.kind for fault in judge(records, answers)} == {"changed"}


@pytest.mark.parametrize("kind", ["processes", "segments", "sockets"])
def test_what_is_left_behind_is_named(kind: str) -> None:
    assert judge([], {}, Remains(4, 4, **{kind: ("it",)})) == [Fault(kind, None, "it")]
    assert [fault.kind for fault in judge([], {}, Remains(4, 3))] == ["blocks"]


def test_undisturbed_runs_that_differ_are_no_reference() -> None:
    one, other = (
        Record(0, pieces=[Piece(0, 0, 0, (token,))], ends=[End(0, 0, "stop")], closed_at=0.0)
        for token in (1, 2)
    )
    with pytest.raises(ValueError, match="differ"):
        reference_of([[one], [other]])


def test_the_bound_is_the_rule_of_three() -> None:
    assert bound(0, 640) == pytest.approx(0.0046875)
    assert bound(0, 1) == 1.0 == bound(0, 0)
    assert bound(1, 640) > bound(0, 640)
