"""Values that files say, read again when the files change."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from phalanx.protos.errors import ConfigError

CHECK_S = 1.0

Value = TypeVar("Value")
_log = logging.getLogger(__name__)


class Watched(Generic[Value]):
    """What `read` makes of `paths`. A change that it refuses is logged, and what was known holds.

    Raises what `read` raises when it is made. Safe to use from several threads.
    """

    def __init__(
        self, paths: Sequence[str], read: Callable[[], Value], *, check_s: float = CHECK_S
    ) -> None:
        """check_s: seconds between looks at the files."""
        self._paths, self._read, self._check_s = tuple(paths), read, check_s
        self._lock = threading.Lock()
        self._stamps = self._look()
        self._value = read()
        self._looked = time.monotonic()

    def get(self) -> Value:
        """What holds now."""
        with self._lock:
            now = time.monotonic()
            if now - self._looked < self._check_s:
                return self._value
            self._looked = now
            stamps = self._look()
            if stamps != self._stamps:
                # noted first: a file that is wrong is told once
                self._stamps = stamps
                try:
                    self._value = self._read()
                    _log.info("%s: read again", ", ".join(self._paths))
                except ConfigError as error:
                    _log.error("a change is not used: %s", error)
            return self._value

    def _look(self) -> tuple[object, ...]:
        return tuple(map(_stamp, self._paths))


def _stamp(path: str) -> object:
    """Changes whenever the file does, also where a symbolic link is laid elsewhere."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_ino, found.st_dev, found.st_size, found.st_mtime_ns
