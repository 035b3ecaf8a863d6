"""A folder of files with packed weights."""

from __future__ import annotations

import os
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from phalanx.kernels.stored import Contents
from phalanx.workers.loading.shelf import Shelf

SIZE = 10_000
FILE = 5 * 4096
"""What a file of so much data takes, but for its index: a page, three, and one for the table."""


def key(number: int) -> str:
    return f"{number:064x}"


def write(
    shelf: Shelf, number: int, size: int = SIZE, pause: Callable[[], None] = lambda: None
) -> str | None:
    data = memoryview(bytes([number]) * size)
    linears = {"weight": Contents(("bfloat16", 1, 1), (7, 5), (data, memoryview(b"")))}
    return shelf.write(key(number), linears, {"table": memoryview(b"abc")}, zlib.crc32, pause)


def names(shelf: Shelf) -> set[str]:
    return {path.name[62:] for path in shelf.folder.iterdir()}


def test_what_was_written_is_found(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path / "shelf", 10 * SIZE)
    assert shelf.open(key(1)) is None
    assert write(shelf, 1) is None
    file = shelf.open(key(1))
    assert file is not None
    (linear,) = file.index.linears.values()
    assert (linear.kind, linear.shape) == (("bfloat16", 1, 1), (7, 5))
    first, empty = linear.arrays
    data = os.pread(file.descriptor, first.size, first.offset)
    assert data == bytes([1]) * SIZE and first.digest == zlib.crc32(data) and empty.size == 0
    table = file.index.tables["table"]
    assert os.pread(file.descriptor, table.size, table.offset) == b"abc"
    file.close()


def test_the_least_recently_used_make_room(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path / "shelf", 3 * FILE + 2000)
    for number in (1, 2, 3):
        write(shelf, number)
        os.utime(shelf.place(key(number)), (number, number))
    used = shelf.open(key(1))
    assert used is not None
    used.close()
    (shelf.folder / "notes").write_text("somebody's")
    write(shelf, 4, 2 * SIZE)  # more than the place of one
    assert names(shelf) == {"01.weights", "04.weights", ""}
    refused = write(shelf, 5, 7 * SIZE)
    assert refused is not None and "more than all files may have" in refused
    assert names(shelf) == {"01.weights", "04.weights", ""}


def test_a_disk_without_much_room_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf = Shelf(tmp_path / "shelf", 10 * SIZE)
    room = SimpleNamespace(f_bavail=2 * FILE - 1, f_frsize=1)
    monkeypatch.setattr(os, "statvfs", lambda path: room)
    refused = write(shelf, 1)
    assert refused is not None and "2 times the room" in refused
    assert names(shelf) == set()
    room.f_bavail = 2 * FILE
    assert write(shelf, 1) is None


def test_what_was_not_finished_is_removed(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path / "shelf", 10 * SIZE)
    part = shelf.folder / f"{key(2)}.weights.part"
    part.write_bytes(bytes(99))
    os.utime(part, (1, 1))

    def stop() -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        write(shelf, 1, pause=stop)
    assert names(shelf) == set()


def test_one_of_several_writers_writes(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path / "shelf", 10 * SIZE)
    begun, other_is_done = threading.Event(), threading.Event()
    answers: list[str | None] = []

    def pause() -> None:
        begun.set()
        assert other_is_done.wait(60)

    thread = threading.Thread(target=lambda: answers.append(write(shelf, 1, pause=pause)))
    thread.start()
    assert begun.wait(60)
    assert write(shelf, 1) == "somebody else writes the same"
    assert write(shelf, 2) is None  # takes nothing away from the other one
    other_is_done.set()
    thread.join()
    assert answers == [None]
    assert names(shelf) == {"01.weights", "02.weights"}
