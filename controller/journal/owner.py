"""Whose journal it is: one process at a time, and everybody else is told its name."""

from __future__ import annotations

import fcntl
import os
import socket
import stat
import time
from datetime import UTC, datetime
from pathlib import Path

from phalanx.protos.errors import ConfigError

POLL_S = 0.05
MAX_NAME_BYTES = 300


def open_folder(path: Path) -> Path:
    """Make the journal's folder, for its owner's eyes only; raises `ConfigError` where it is not."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        mode = stat.S_IMODE(path.stat().st_mode)
    except OSError as error:
        raise ConfigError(
            f"journal is {str(path)!r}, which cannot be a folder: {error.strerror}"
        ) from None
    if mode & 0o077:
        raise ConfigError(
            f"journal is {str(path)!r}, a folder of mode {mode:04o}: it will hold what users write, "
            "allowed is 0700"
        )
    return path


class Owner:
    """A lock that ends with its process, however that ends."""

    def __init__(self, folder: Path, wait_s: float) -> None:
        """Raises `ConfigError` naming the owner if it is still there after `wait_s` seconds."""
        try:
            self._file = os.open(folder / "owner", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigError(
                f"journal is {str(folder)!r}, which cannot be written: {error.strerror}"
            ) from None
        deadline = time.monotonic() + wait_s
        while not self._try():
            if time.monotonic() >= deadline:
                name = os.pread(self._file, MAX_NAME_BYTES, 0).decode(errors="replace")
                os.close(self._file)
                raise ConfigError(
                    f"journal is {str(folder)!r}, which belongs to {name or 'another process'}; "
                    "one controller at a time may have it"
                )
            time.sleep(POLL_S)
        since = datetime.now(UTC).isoformat(timespec="seconds")
        os.ftruncate(self._file, 0)
        os.pwrite(
            self._file, f"process {os.getpid()} on {socket.gethostname()} since {since}".encode(), 0
        )

    def _try(self) -> bool:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True

    def release(self) -> None:
        """Let the next one have it."""
        os.close(self._file)
