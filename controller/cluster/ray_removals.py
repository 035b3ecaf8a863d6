"""Placement groups that are over."""

from __future__ import annotations

import threading
from collections.abc import Callable

from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, remove_placement_group


class Removals:
    """Gives places back. What Ray's GCS could not be told, as it was away, it is told later: it would
    keep them taken for ever. Any thread may call it."""

    def __init__(self, remove: Callable[[PlacementGroup], None] = remove_placement_group) -> None:
        self._remove, self._lock = remove, threading.Lock()
        self._due: list[PlacementGroup] = []

    def remove(self, group: PlacementGroup) -> None:
        """Now, or with a later `settle`."""
        with self._lock:
            self._due.append(group)
        self.settle()

    def settle(self) -> None:
        """Tell what could not be told."""
        with self._lock:
            due, self._due = self._due, []
        for group in due:
            try:
                self._remove(group)
            except RayError:
                with self._lock:
                    self._due.append(group)
