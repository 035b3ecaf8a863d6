"""The folders that embedded Ray instances leave behind: Ray removes neither sockets nor logs.

A folder of ours has a file `MARK`, locked by the process that it belongs to for as long as that
lives, however it ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from pathlib import Path

MARK = "phalanx.lock"
KEPT = 4
"""Folders of ended instances that are kept for their logs."""


class Session:
    """The folder of a running instance."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        temporary = folder / f".{MARK}"
        self._mark = os.open(temporary, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._mark, fcntl.LOCK_EX)  # before it is found
        temporary.rename(folder / MARK)

    def close(self) -> None:
        """After the instance has ended."""
        _remove_sockets(self._folder)
        os.close(self._mark)


def sweep(parent: Path, kept: int = KEPT) -> None:
    """Remove what instances of ours have left in `parent` whose processes are gone: their sockets,
    and, but for the last ones, their folders."""
    found = sorted(parent.glob(f"session_*/{MARK}"), key=_age, reverse=True)
    ended = [mark.parent for mark in found if not mark.parent.is_symlink() and _unowned(mark)]
    for folder in ended[:kept]:
        _remove_sockets(folder)
    for folder in ended[kept:]:
        shutil.rmtree(folder, ignore_errors=True)


def _age(mark: Path) -> float:
    with contextlib.suppress(OSError):
        return mark.stat().st_mtime
    return 0.0


def _unowned(mark: Path) -> bool:
    """Whether its process is gone. Not so if it cannot be known."""
    try:
        with mark.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _remove_sockets(folder: Path) -> None:
    shutil.rmtree(folder / "sockets", ignore_errors=True)
