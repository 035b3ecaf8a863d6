"""When lost replicas are started again: a pure function, so every rule is a line here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phalanx.controller.cluster.recovery import (
    CRASH_LOOP,
    DEGRADED_BACKOFF_S,
    LIVED_S,
    LONGEST_BACKOFF_S,
    LOOK_AT_SPARES_S,
    LOOK_FOR_MORE_S,
    MEMORY_S,
    QUIET_WAIT_S,
    STEADY_S,
    Action,
    AddSpare,
    Desired,
    Facts,
    Replace,
    Slot,
    Start,
    Wait,
    condition,
    next_actions,
    observe,
)
from phalanx.controller.cluster.room import freed, has_room, largest_tp

WANTED = Desired(tp=4, shrink_after_s=10.0)


def failed(*times: float) -> Slot:
    slot = Slot()
    for time in times:
        slot = slot.failed(time, f"cause at {time:g}")
    return slot


def foremost(slots: Sequence[Slot], now: float, *more: Any) -> Action:
    return next_actions(slots, now, *more)[0]


def test_nothing_is_to_be_done_while_all_run() -> None:
    assert foremost([Slot().started(), Slot().started()], 0.0) == Wait(None)


def test_a_first_loss_is_answered_at_once() -> None:
    slots = [Slot().started(), failed(100.0)]
    assert foremost(slots, 100.0) == Start(1)


def test_further_failures_are_answered_later_and_later() -> None:
    waits = []
    times: list[float] = []
    now = 0.0
    for _ in range(CRASH_LOOP - 1):
        times.append(now)
        action = foremost([failed(*times)], now)
        waits.append(action.seconds if isinstance(action, Wait) else 0.0)
        now += waits[-1] or 0.0
    assert waits == sorted(waits)
    assert waits[0] == 0.0 < waits[1]


def test_a_crash_loop_is_degraded_with_its_cause_and_still_tried() -> None:
    slot = failed(*range(CRASH_LOOP))
    now = float(CRASH_LOOP - 1)
    assert slot.degraded(now)
    assert slot.cause == f"cause at {now:g}"
    assert foremost([slot], now) == Wait(DEGRADED_BACKOFF_S)
    assert foremost([slot], now + DEGRADED_BACKOFF_S) == Start(0)
    assert not slot.started().degraded(now)


def test_losses_of_groups_that_had_come_up_well_are_no_crash_loop() -> None:
    """Somebody kills them, say; each is answered at once."""
    slot, now = Slot(), 0.0
    for _ in range(3 * CRASH_LOOP):
        slot = slot.started(now=now)
        now += LIVED_S
        slot = slot.failed(now, "killed")
        assert not slot.degraded(now) and foremost([slot], now) == Start(0)
    for _ in range(CRASH_LOOP - 1):
        slot = slot.started(now=now)
        now += LIVED_S - 1
        slot = slot.failed(now, "died young")
    assert slot.degraded(now)


def test_old_failures_are_forgiven() -> None:
    slot = failed(*range(CRASH_LOOP))
    assert not slot.degraded(MEMORY_S + CRASH_LOOP)
    assert len(slot.failed(MEMORY_S + CRASH_LOOP, "new").failures) == 1


@pytest.mark.parametrize(("first", "second", "expected"), [(5.0, 3.0, 1), (3.0, 3.0, 0)])
def test_who_failed_first_is_started_first(first: float, second: float, expected: int) -> None:
    assert foremost([failed(first), failed(second)], 10.0) == Start(expected)


@given(st.lists(st.floats(0, 1000), max_size=12).map(sorted), st.floats(0, 5000))
def test_a_missing_replica_is_always_started_in_the_end(times: list[float], later: float) -> None:
    slot = failed(*times)
    now = (times[-1] if times else 0.0) + later
    action = foremost([slot], now)
    if isinstance(action, Wait):
        assert action.seconds is not None
        assert 0 < action.seconds <= max(DEGRADED_BACKOFF_S, LONGEST_BACKOFF_S) + 1e-6
        assert foremost([slot], now + action.seconds + 1e-3) == Start(0)


# --- places that are gone, and that come back ---


def seen(slot: Slot, *looks: tuple[float, dict[str, int]], desired: Desired = WANTED) -> Slot:
    for now, free in looks:
        [slot] = observe([slot], now, desired, Facts(free=free))
    return slot


@pytest.mark.parametrize(
    ("strategy", "pp", "expected"),
    [
        ("STRICT_PACK", 1, 3),
        ("PACK", 1, 6),
        ("SPREAD", 1, 6),
        ("STRICT_SPREAD", 1, 3),
        ("SPREAD", 2, 2),
        ("STRICT_SPREAD", 3, 1),
        ("STRICT_PACK", 2, 1),
        ("STRICT_PACK", 4, 0),
    ],
)
def test_the_largest_size_that_finds_places(strategy: str, pp: int, expected: int) -> None:
    free = {"a": 3, "b": 2, "c": 1}
    assert largest_tp(free, 8, pp, strategy) == expected
    assert largest_tp(free, 2, pp, strategy) == min(expected, 2)


@given(
    st.dictionaries(st.sampled_from("abcd"), st.integers(0, 5)),
    st.integers(1, 6),
    st.integers(1, 3),
    st.sampled_from(["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"]),
)
def test_room_is_what_laying_the_bundles_out_one_by_one_finds(
    free: dict[str, int], tp: int, pp: int, strategy: str
) -> None:
    left = dict(free)
    bundles = [1] * tp if pp == 1 else [tp] * pp
    used: list[str] = []
    for bundle in bundles:
        nodes = [node for node in left if left[node] >= bundle]
        if strategy == "STRICT_SPREAD":
            nodes = [node for node in nodes if node not in used]
        elif strategy == "STRICT_PACK":
            nodes = [node for node in nodes if free[node] >= tp * pp]
        if nodes:
            used.append(max(nodes, key=lambda node: left[node]))
            left[used[-1]] -= bundle
    assert has_room(free, tp, pp, strategy) == (len(used) == len(bundles))


def test_places_of_a_node_that_is_gone_are_not_freed() -> None:
    assert freed({"a": 1, "c": 2}, ["a", "a", "b"]) == {"a": 3, "c": 2}
    # a node that is full is there all the same
    assert freed({"a": 0}, []) == {"a": 0}


def test_a_group_waits_for_its_places_and_then_goes_on_smaller() -> None:
    slot = seen(failed(100.0), (100.0, {"a": 3}), (105.0, {"a": 2}))
    assert isinstance(foremost([slot], 105.0, WANTED, Facts(free={"a": 3})), Wait)
    assert foremost([slot], 110.0, WANTED, Facts(free={"a": 3})) == Start(0, 3)
    assert "starts smaller in 5 s" in condition(slot, 105.0, WANTED)


def test_places_that_come_back_in_time_are_taken_at_once() -> None:
    slot = seen(failed(100.0), (100.0, {"a": 3}), (109.0, {"a": 4}))
    assert foremost([slot], 109.0, WANTED, Facts(free={"a": 4})) == Start(0, 4)
    slot = seen(slot, (109.5, {"a": 3}))
    # the wait begins anew
    assert isinstance(foremost([slot], 112.0, WANTED, Facts(free={"a": 3})), Wait)


def test_no_group_starts_below_the_least_size_or_one_that_memory_refused() -> None:
    desired = Desired(tp=4, min_tp=2, shrink_after_s=0.0)
    slot = seen(failed(100.0), (100.0, {"a": 1}))
    assert isinstance(foremost([slot], 100.0, desired, Facts(free={"a": 1})), Wait)
    assert foremost([slot], 100.0, desired, Facts(free={"a": 2})) == Start(0, 2)
    slot = slot.too_small(2, "rank 0 needs 9 bytes and has 8")
    assert isinstance(foremost([slot], 100.0, desired, Facts(free={"a": 2})), Wait)
    assert foremost([slot], 100.0, desired, Facts(free={"a": 3})) == Start(0, 3)
    assert "needs 9 bytes" in condition(slot, 100.0, desired)


def test_a_small_group_grows_when_it_is_quiet_and_its_places_are_steady() -> None:
    slot = Slot().started(3, "aaa")
    assert foremost([slot], 0.0, WANTED, Facts(free={"a": 0})) == Wait(LOOK_FOR_MORE_S)
    assert condition(slot, 0.0, WANTED) == "places for tp 4 are gone"
    slot = seen(slot, (50.0, {"a": 0}), (60.0, {"a": 1}))
    facts = Facts(free={"a": 1})
    assert isinstance(foremost([slot], 60.0, WANTED, facts), Wait)
    assert foremost([slot], 60.0 + STEADY_S, WANTED, facts) == Replace(0, 4, beside=False)
    busy = Facts(free={"a": 1}, busy=frozenset({0}))
    assert isinstance(foremost([slot], 60.0 + STEADY_S, WANTED, busy), Wait)
    late = 60.0 + STEADY_S + QUIET_WAIT_S
    assert foremost([slot], late, WANTED, busy) == Replace(0, 4, beside=False)


def test_a_group_grows_into_a_full_node_of_its_own_and_another_one() -> None:
    desired = Desired(tp=3, placement="PACK")
    slot = seen(Slot().started(2, "aa"), (0.0, {"a": 0, "b": 1}), desired=desired)
    assert slot.since == 0.0


def test_a_group_grows_beside_the_old_one_where_there_is_room_for_both() -> None:
    slot = seen(Slot().started(3, "aaa"), (0.0, {"b": 4}))
    action = foremost([slot], STEADY_S, WANTED, Facts(free={"a": 0, "b": 4}))
    assert action == Replace(0, 4, beside=True)


def test_missing_replicas_come_first_then_growth_then_the_rolling_restart() -> None:
    desired = Desired(tp=2, shrink_after_s=0.0, generation=1)
    lost, whole = failed(0.0), Slot().started(2, "aa")
    small = seen(Slot().started(1, "b"), (0.0, {"b": 1}), desired=desired)
    facts = Facts(free={"b": 1, "c": 2})
    actions = next_actions([whole, small, lost], 90.0, desired, facts)
    assert actions[:2] == (Start(2, 2), Replace(1, 2, beside=True))
    assert [type(action) for action in actions[2:]] == [Wait]
    actions = next_actions([whole, whole], 90.0, desired, Facts(free={"c": 1}))
    assert actions == (Replace(0, 2, beside=False), Wait(None))
    newer = Slot().started(2, "aa", 1)
    actions = next_actions([newer, whole], 90.0, desired, Facts(free={"c": 2}))
    assert actions == (Replace(1, 2, beside=True), Wait(None))
    assert next_actions([newer, newer], 90.0, desired, facts) == (Wait(None),)


def test_a_successor_that_did_not_start_is_tried_again_later_and_later() -> None:
    desired = Desired(tp=1, generation=1)
    slot = Slot().started(1, "a")
    now, waits = 0.0, []
    for _ in range(CRASH_LOOP):
        assert isinstance(foremost([slot], now, desired, Facts(free={"a": 1})), Replace)
        slot = slot.stumbled(now, "it died")
        assert slot.running
        waits.append(max(slot.due(now) - now, 0.0))
        now += waits[-1]
    assert waits == sorted(waits)
    assert waits[-1] > 0


@given(
    st.integers(1, 6),
    st.integers(1, 6),
    st.lists(st.dictionaries(st.sampled_from("abc"), st.integers(0, 6)), min_size=1, max_size=8),
    st.sampled_from(["PACK", "STRICT_PACK", "STRICT_SPREAD"]),
)
def test_whatever_is_started_finds_places_and_is_no_smaller_than_allowed(
    tp: int, min_tp: int, looks: list[dict[str, int]], strategy: str
) -> None:
    desired = Desired(tp=tp, min_tp=min(min_tp, tp), placement=strategy, shrink_after_s=1.0)
    slot = failed(0.0)
    for second, free in enumerate(looks):
        facts = Facts(free=free)
        [slot] = observe([slot], float(second), desired, facts)
        action = foremost([slot], float(second), desired, facts)
        if isinstance(action, Start):
            assert has_room(free, action.tp, 1, strategy)
            assert desired.min_tp <= action.tp <= tp
            assert action.tp == tp or not has_room(free, tp, 1, strategy)
        elif slot.since is not None and second - slot.since >= desired.shrink_after_s:
            assert largest_tp(free, tp, 1, strategy) < desired.min_tp


def test_spares_come_last_and_take_only_places_that_nobody_needs() -> None:
    desired = Desired(tp=2, spares=2, generation=1)
    whole = Slot().started(2, "aa", 1)
    free = {"a": 2}
    assert foremost([whole], 0.0, desired, Facts(free=free)) == AddSpare()
    assert foremost([whole], 0.0, desired, Facts(free={"a": 1})) == Wait(LOOK_FOR_MORE_S)
    # two that stand by are enough; now and then somebody looks at them
    full = Facts(free=free, spares=2, spare_places=tuple("bbbb"))
    assert foremost([whole], 0.0, desired, full) == Wait(LOOK_AT_SPARES_S)
    for slots in ([whole, failed(0.0)], [whole, Slot().started(1, "a", 1)]):
        assert AddSpare() not in next_actions(slots, 0.0, desired, Facts(free=free))
    outdated = next_actions([Slot().started(2, "aa", 0)], 0.0, desired, Facts(free=free))
    assert AddSpare() not in outdated


def test_a_lost_group_finds_the_places_of_a_spare() -> None:
    desired = Desired(tp=2, spares=1)
    facts = Facts(free={"a": 0, "b": 0}, spares=1, spare_places=tuple("bb"))
    [slot] = observe([failed(0.0)], 0.0, desired, facts)
    assert slot.since is None
    assert foremost([slot], 0.0, desired, facts) == Start(0, 2)
    # those of a spare on a node that is gone are not there
    facts = Facts(free={"a": 0}, spares=1, spare_places=tuple("bb"))
    [slot] = observe([failed(0.0)], 0.0, desired, facts)
    assert isinstance(foremost([slot], 0.0, desired, facts), Wait)
