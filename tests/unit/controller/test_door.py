"""Refusals before anything is done: as the scheduler would, and with a time that is worth waiting."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phalanx.controller.door import MAX_RETRY_S, MEMORY_S, Door
from phalanx.protos.errors import ResourceExhausted


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def refusal(door: Door, tenant: str, running: int, most: int) -> ResourceExhausted | None:
    try:
        door.check(tenant, running, most)
    except ResourceExhausted as error:
        return error
    return None


@given(
    st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from([-1, 1, 2, 3]))), st.integers(1, 6)
)
def test_a_tenant_is_refused_when_as_many_of_its_own_wait_as_may(
    moves: list[tuple[str, int]], most: int
) -> None:
    door, waiting = Door(Clock()), {"a": 0, "b": 0}
    for tenant, change in moves:
        refused = refusal(door, tenant, 0, most)
        assert (refused is not None) == (waiting[tenant] >= most)
        if change > 0:
            door.enter(tenant, change)
        elif waiting[tenant]:
            door.leave(tenant, 1)
        else:
            continue
        waiting[tenant] += change
        assert door.open(tenant) == waiting[tenant]


def test_who_runs_does_not_wait() -> None:
    door = Door(Clock())
    door.enter("a", 20)
    assert refusal(door, "a", 16, 4) is not None
    assert refusal(door, "a", 17, 4) is None


def test_callers_are_told_to_come_one_after_the_other_as_fast_as_places_get_free() -> None:
    clock = Clock()
    door = Door(clock)
    door.enter("a", 1000)
    for _ in range(400):  # ten a second
        clock.now += 0.1
        door.leave("a", 1)
    told = [refusal(door, "a", 0, 4) for _ in range(20)]
    waits = [error.retry_after_s for error in told if error is not None]
    assert len(waits) == 20
    assert all(wait == pytest.approx(0.1 * place, rel=0.1) for place, wait in enumerate(waits, 1))
    clock.now += 10 * MEMORY_S  # whoever was to come has come, or never will
    for _ in range(100):
        clock.now += 0.1
        door.leave("a", 1)
    last = refusal(door, "a", 0, 4)
    assert last is not None and last.retry_after_s < 0.3


@pytest.mark.parametrize("rate_known", [False, True])
def test_nobody_is_told_to_come_at_the_same_time_or_never(rate_known: bool) -> None:
    clock = Clock()
    door = Door(clock)
    door.enter("a", 100)
    if rate_known:
        clock.now += 10.0
        door.leave("a", 1)
    errors = [refusal(door, "a", 0, 4) for _ in range(5000)]
    waits = [error.retry_after_s for error in errors if error is not None]
    assert 0 < min(waits) and max(waits) <= MAX_RETRY_S
    assert len(set(waits)) == len(waits) == 5000


def test_who_has_nothing_open_is_forgotten() -> None:
    door = Door(Clock())
    for number in range(100):
        door.enter(str(number), 3)
        door.leave(str(number), 2)
        door.leave(str(number), 1, served=False)
        door.leave(str(number), 0)
    assert all(door.open(str(number)) == 0 for number in range(100))
    assert not door._accounts
