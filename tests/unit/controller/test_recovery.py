"""When lost replicas are started again: a pure function, so every rule is a line here."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phalanx.controller.cluster.recovery import (
    CRASH_LOOP,
    DEGRADED_BACKOFF_S,
    LONGEST_BACKOFF_S,
    MEMORY_S,
    Slot,
    Start,
    Wait,
    next_action,
)


def failed(*times: float) -> Slot:
    slot = Slot()
    for time in times:
        slot = slot.failed(time, f"cause at {time:g}")
    return slot


def test_nothing_is_to_be_done_while_all_run() -> None:
    assert next_action([Slot().started(), Slot().started()], 0.0) == Wait(None)


def test_a_first_loss_is_answered_at_once() -> None:
    slots = [Slot().started(), failed(100.0)]
    assert next_action(slots, 100.0) == Start(1)


def test_further_failures_are_answered_later_and_later() -> None:
    waits = []
    times: list[float] = []
    now = 0.0
    for _ in range(CRASH_LOOP - 1):
        times.append(now)
        action = next_action([failed(*times)], now)
        waits.append(action.seconds if isinstance(action, Wait) else 0.0)
        now += waits[-1] or 0.0
    assert waits == sorted(waits)
    assert waits[0] == 0.0 < waits[1]


def test_a_crash_loop_is_degraded_with_its_cause_and_still_tried() -> None:
    slot = failed(*range(CRASH_LOOP))
    now = float(CRASH_LOOP - 1)
    assert slot.degraded(now)
    assert slot.cause == f"cause at {now:g}"
    assert next_action([slot], now) == Wait(DEGRADED_BACKOFF_S)
    assert next_action([slot], now + DEGRADED_BACKOFF_S) == Start(0)
    assert not slot.started().degraded(now)


def test_old_failures_are_forgiven() -> None:
    slot = failed(*range(CRASH_LOOP))
    assert not slot.degraded(MEMORY_S + CRASH_LOOP)
    assert len(slot.failed(MEMORY_S + CRASH_LOOP, "new").failures) == 1


@pytest.mark.parametrize(("first", "second", "expected"), [(5.0, 3.0, 1), (3.0, 3.0, 0)])
def test_who_failed_first_is_started_first(first: float, second: float, expected: int) -> None:
    assert next_action([failed(first), failed(second)], 10.0) == Start(expected)


@given(st.lists(st.floats(0, 1000), max_size=12).map(sorted), st.floats(0, 5000))
def test_a_missing_replica_is_always_started_in_the_end(times: list[float], later: float) -> None:
    slot = failed(*times)
    now = (times[-1] if times else 0.0) + later
    action = next_action([slot], now)
    if isinstance(action, Wait):
        assert action.seconds is not None
        assert 0 < action.seconds <= max(DEGRADED_BACKOFF_S, LONGEST_BACKOFF_S) + 1e-6
        assert next_action([slot], now + action.seconds + 1e-3) == Start(0)
