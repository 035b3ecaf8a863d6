"""What is removed of folders that instances have left, and what is not."""

from __future__ import annotations

import os
from pathlib import Path

from phalanx.controller.cluster.ray_sessions import MARK, Session, sweep


def folder(parent: Path, name: str) -> Path:
    made = parent / f"session_{name}"
    (made / "sockets").mkdir(parents=True)
    (made / "logs").mkdir()
    (made / "sockets" / "raylet").touch()
    return made


def left(parent: Path) -> set[str]:
    return {str(path.relative_to(parent)) for path in parent.glob("*/*")}


def died(made: Path, at: float) -> None:
    """Its process ended without a word, at this time."""
    os.close(Session(made)._mark)
    os.utime(made / MARK, (at, at))


def test_an_orderly_end_takes_the_sockets_along(tmp_path: Path) -> None:
    session = Session(folder(tmp_path, "a"))
    session.close()
    assert left(tmp_path) == {"session_a/logs", f"session_a/{MARK}"}


def test_what_the_dead_have_left_is_removed_and_the_last_logs_stay(tmp_path: Path) -> None:
    for number in range(4):
        died(folder(tmp_path, str(number)), at=1000.0 + number)
    sweep(tmp_path, kept=2)
    kept = {f"session_{number}/{name}" for number in (2, 3) for name in ("logs", MARK)}
    assert left(tmp_path) == kept


def test_the_living_and_strangers_are_left_alone(tmp_path: Path) -> None:
    """Also where the last one is named by a link, as Ray does."""
    folder(tmp_path, "stranger")
    session = Session(folder(tmp_path, "living"))
    (tmp_path / "session_latest").symlink_to(tmp_path / "session_living")
    before = left(tmp_path)
    sweep(tmp_path, kept=0)
    assert left(tmp_path) == before
    session.close()
