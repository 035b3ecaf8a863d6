"""Places are given back, also when Ray did not listen at first."""

from __future__ import annotations

from typing import Any

from ray.exceptions import RayError

from phalanx.controller.cluster.ray_removals import Removals


def test_what_could_not_be_told_is_told_later_and_once() -> None:
    away, told = True, []

    def remove(group: Any) -> None:
        if away:
            raise RayError("nobody answers")
        told.append(group)

    removals = Removals(remove)
    removals.remove("a")  # type: ignore[arg-type]
    removals.remove("b")  # type: ignore[arg-type]
    assert told == []
    away = False
    removals.settle()
    removals.settle()
    assert told == ["a", "b"]
