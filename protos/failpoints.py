"""Places at which tests let a process fail, by name. Off unless the environment says so at start.

`PHALANX_FAILPOINTS` names a folder that belongs to the tests. A point is armed while it holds a
file of the point's name, JSON of an `Armed`. When the point fires, the file becomes NAME.fired, so
that of several processes one fails, and once. Nothing asks for points where the variable is not
set: parts with points are other classes, chosen when a process puts its parts together.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import msgspec

from .errors import ConfigError

FLAG = "PHALANX_FAILPOINTS"
PRODUCTION = "production"
"""A file of this name in the installation says that no failpoints are allowed: images have it."""
POINTS = (
    "sampled",
    "journalled",
    "finishing",
    "releasing",
    "epoch",
    "step",
    "poison",
)
"""After tokens were sampled and before they are in the journal; after that, before they are sent;
before the end of a request is in the journal; between two blocks that are freed; when a new group
has started and has proven nothing; before a rank executes a plan; when a rank gets a certain token."""


class Armed(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a point does, the time that it counts."""

    action: Literal["kill", "abort", "raise", "hold", "wait"]
    """SIGKILL; SIGABRT; a RuntimeError; keep the interpreter's lock; only wait."""
    after: int = 1
    """It fires the so-manieth time that a process comes by."""
    seconds: float = 0.0
    """Of `hold` and `wait`; before the others, time for other threads to go on."""
    token: int | None = None
    """Of "poison": the token that kills where a prompt has it."""
    rank: int | None = None
    """Which rank fails; none: whichever comes first."""
    stays: bool = False
    """Fires again and again, in every process."""


class Failpoints:
    """The points of this process."""

    def __init__(self, folder: Path, rank: int | None = None) -> None:
        self._folder, self._rank = folder, rank
        self._passed: dict[str, int] = {}

    def note(self, name: str, text: str) -> None:
        """Leave word for the tests: a file of this name."""
        (self._folder / name).write_text(text, encoding="utf-8")

    def count(self, name: str, number: int) -> None:
        """Leave one more number for the tests, in a file of this name."""
        with (self._folder / name).open("a", encoding="utf-8") as file:
            file.write(f"{number}\n")

    def armed(self, name: str) -> Armed | None:
        """What the point would do."""
        try:
            armed = msgspec.json.decode((self._folder / name).read_bytes(), type=Armed)
        except FileNotFoundError:
            self._passed.pop(name, None)
            return None
        return armed if armed.rank in (None, self._rank) else None

    def hit(self, name: str) -> None:
        """Come by a point."""
        armed = self.armed(name)
        if armed is None:
            return
        self._passed[name] = self._passed.get(name, 0) + 1
        if self._passed[name] < armed.after or not self._claim(name, armed):
            return
        if armed.action == "hold":
            ctypes.PyDLL(None).sleep(int(armed.seconds))  # PyDLL keeps the lock over the call
        else:
            time.sleep(armed.seconds)
        if armed.action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if armed.action == "abort":
            os.abort()
        if armed.action == "raise":
            raise RuntimeError(f"failpoint {name}")

    def _claim(self, name: str, armed: Armed) -> bool:
        """Whether this process is the one to fail."""
        fired = self._folder / f"{name}.fired"
        if armed.stays:
            with contextlib.suppress(FileExistsError):
                fired.touch()
            return True
        try:
            (self._folder / name).rename(fired)
        except FileNotFoundError:
            return False
        return True


def failpoints(
    rank: int | None = None,
    environment: Mapping[str, str] = os.environ,
    installation: str = sys.prefix,
) -> Failpoints | None:
    """The points of this process; None, as ever outside tests, where the flag is not set.

    Raises `ConfigError` in an installation for production, and where the folder is not there.
    """
    folder = environment.get(FLAG)
    if not folder:
        return None
    if Path(installation, PRODUCTION).exists():
        raise ConfigError(f"{FLAG} is set, allowed: not in an installation for production")
    if not Path(folder).is_dir():
        raise ConfigError(f"{FLAG} is {folder!r}, allowed: a folder that is there")
    return Failpoints(Path(folder), rank)
