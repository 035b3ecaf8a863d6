"""Which journal a server has."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from phalanx.protos.errors import ConfigError

from .file import JournalFile, Sync

AUTO = "auto"


def default_folder(port: int) -> Path | None:
    """Where a server on this port keeps its journal if nobody says; None: nowhere, as whoever
    comes back would not find a server on a port that was drawn."""
    if port == 0:
        return None
    state = os.environ.get("XDG_STATE_HOME") or ""
    # the specification has relative paths ignored
    base = Path(state) if os.path.isabs(state) else Path.home() / ".local" / "state"
    return base / "phalanx" / f"journal-{port}"


def open_journal(
    journal: str | None, port: int, *, sync: Sync, wait_s: float, say: Callable[[str], None]
) -> JournalFile | None:
    """The journal that the configuration asks for, opened; None: none is kept.

    Raises `ConfigError` for one that was asked for by name and cannot be had. Of "auto" that is
    said, and the server goes without.
    """
    if journal is None:
        return None
    if journal != AUTO:
        return JournalFile(Path(journal), sync=sync, wait_s=wait_s)
    try:
        folder = default_folder(port)
        if folder is None:
            return None
        file = JournalFile(folder, sync=sync, wait_s=wait_s, own=True)
    except (ConfigError, RuntimeError) as error:  # RuntimeError: this user has no home
        say(f"without a journal: {error}")
        return None
    say(f"journal in {folder}; it holds what users write, --journal off keeps nothing")
    return file
