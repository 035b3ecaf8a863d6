"""Groups that stand by, played: who takes them, and what becomes of those that die."""

from __future__ import annotations

import pytest

from phalanx.controller.cluster.spares import SparePool
from phalanx.protos.errors import GroupLost


class PlayedFleet:
    def __init__(self, name: str) -> None:
        self.places = (name, name)
        self.reserved = self.stopped = self.dead = False
        self.warmed = ""
        self.fails = False

    def reserve(self) -> list[str]:
        self.reserved = True
        return list(self.places)

    def warm(self, checkpoint: str) -> None:
        if self.fails:
            raise GroupLost("a rank did not start")
        self.warmed = checkpoint

    def stands(self) -> bool:
        return not self.dead

    def stop(self, *, at_once: bool = False) -> None:
        self.stopped = True


def filled(*names: str) -> tuple[SparePool, list[PlayedFleet]]:
    fleets = [PlayedFleet(name) for name in names]
    left = iter(fleets)
    pool = SparePool(lambda: next(left), "/models/one")
    for _ in names:
        pool.add()
    return pool, fleets


def test_a_spare_is_taken_once_with_its_processes_warm() -> None:
    pool, [first, second] = filled("a", "b")
    assert pool.places == ["a", "a", "b", "b"]
    assert pool.take(PlayedFleet) is first
    assert (first.reserved, first.warmed, first.stopped) == (True, "/models/one", False)
    assert pool.take(PlayedFleet) is second
    assert pool.take(PlayedFleet) is None
    assert (len(pool), pool.places) == (0, [])


def test_one_that_has_died_is_not_given_out() -> None:
    pool, [first, second] = filled("a", "b")
    first.dead = True
    assert pool.take(PlayedFleet) is second
    assert first.stopped and not second.stopped


def test_the_dead_are_cleared_away_and_their_places_given_back() -> None:
    pool, [first, second] = filled("a", "b")
    first.dead = True
    pool.prune()
    assert first.stopped
    assert pool.places == ["b", "b"]
    pool.clear()
    assert second.stopped and not pool.places


def test_one_that_does_not_start_leaves_nothing_behind() -> None:
    fleet = PlayedFleet("a")
    fleet.fails = True
    pool = SparePool(lambda: fleet, "/models/one")
    with pytest.raises(GroupLost):
        pool.add()
    assert fleet.stopped and len(pool) == 0


def test_one_that_is_ready_after_the_end_is_let_go_of() -> None:
    fleet = PlayedFleet("a")
    pool = SparePool(lambda: fleet, "/models/one")
    pool.close()
    pool.add()
    assert fleet.stopped and len(pool) == 0
