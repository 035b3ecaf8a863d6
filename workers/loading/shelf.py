"""Packed weights in files: a folder of them, each of one rank's share of one model."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import stat
import struct
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from phalanx.kernels.stored import Contents, StoredArray, StoredLinear

MAGIC = b"phalanxW"
_HEAD = struct.Struct("<8s32sqq32s")
_ALIGNMENT = 4096
_PIECE = 4 << 20
_NAME = re.compile(r"[0-9a-f]{64}\.weights")
_UNFINISHED = ".part"
ABANDONED_S = 60.0
"""Nobody looks whether an unfinished file has a writer that was written to less long ago."""
_SPARE = 2
"""Nothing is written where the disk has not so many times the room."""


class Index(msgspec.Struct, frozen=True):
    """What a file holds, by names that say what each is made from."""

    linears: dict[str, StoredLinear]
    tables: dict[str, StoredArray]


class ShelfFile:
    """An open file, whose index is whole and of the key asked for; see `Shelf` for its layout."""

    def __init__(self, descriptor: int, index: Index) -> None:
        self.descriptor, self.index = descriptor, index

    def close(self) -> None:
        """Let go of the file."""
        os.close(self.descriptor)


class Damaged(Exception):
    """A file is not what its name says."""


class Shelf:
    """A folder of mode 0700 with files of mode 0600, the least recently used of which make room.

    ::

        8 magic | 32 key | 8 where the index is | 8 its size | 32 its SHA-256
        arrays, each on a page of its own | the index, msgpack

    A file that is there is whole, as far as the system has not lost what it had taken: it is renamed
    into place, and every array has a digest, which is looked at when it is read.
    """

    def __init__(self, folder: Path, most_bytes: int) -> None:
        """Raises `OSError` for a folder that cannot be used, or that others can write to or read."""
        self.folder, self._most_bytes = folder, most_bytes
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.lstat()
        private = stat.S_ISDIR(found.st_mode) and not stat.S_IMODE(found.st_mode) & 0o077
        if not private or found.st_uid != os.geteuid():
            mode = stat.S_IMODE(found.st_mode)
            raise PermissionError(
                f"{folder} has mode {mode:04o} and belongs to user {found.st_uid}, allowed: 0700 and "
                "the user of the ranks"
            )

    def place(self, key: str) -> Path:
        """Where the file of a key is, if it is there; 64 hexadecimal digits."""
        return self.folder / f"{key}.weights"

    def open(self, key: str) -> ShelfFile | None:
        """The file of a key, which is the most recently used from now on; None if there is none.

        Raises `Damaged` for one that cannot be what was written.
        """
        try:
            descriptor = os.open(self.place(key), os.O_RDONLY | os.O_NOFOLLOW)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise Damaged(f"it cannot be opened: {error.strerror}") from None
        try:
            index = _read_index(descriptor, key)
            with contextlib.suppress(OSError):
                os.utime(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        return ShelfFile(descriptor, index)

    def drop(self, key: str) -> None:
        """Remove the file of a key, if it is there."""
        _unlink(self.place(key))

    def write(
        self,
        key: str,
        linears: dict[str, Contents],
        tables: dict[str, memoryview],
        digest: Callable[[memoryview], int],
        pause: Callable[[], None] = lambda: None,
    ) -> str | None:
        """Keep what a rank holds. Returns why nothing was written, None if it was.

        Of several that write the same at a time one does. `pause` is called between pieces of
        4 MiB; what it raises ends the writing. Raises `OSError`.
        """
        views = [view for linear in linears.values() for view in linear.arrays]
        size = _ALIGNMENT + sum(_padded(len(view)) for view in [*views, *tables.values()])
        if size > self._most_bytes:
            return f"{size} bytes are more than all files may have together, {self._most_bytes}"
        part = self.place(key).with_name(self.place(key).name + _UNFINISHED)
        descriptor = _take(part)
        if descriptor is None:
            return "somebody else writes the same"
        try:
            if self.place(key).exists():
                _unlink(part)
                return "somebody else has written the same"
            self._make_room(size)
            disk = os.statvfs(self.folder)
            if disk.f_bavail * disk.f_frsize < _SPARE * size:
                _unlink(part)
                return f"the disk has less than {_SPARE} times the room for {size} bytes"
            try:
                os.ftruncate(descriptor, 0)
                _write(descriptor, key, linears, tables, digest, pause)
                part.rename(self.place(key))
            except BaseException:
                _unlink(part)
                raise
        finally:
            os.close(descriptor)
        return None

    def _make_room(self, size: int) -> None:
        """Remove what was not finished, and the least recently used beyond the size in all."""
        found: list[tuple[int, int, Path]] = []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                finished = entry.name.removesuffix(_UNFINISHED)
                if not _NAME.fullmatch(finished) or not entry.is_file(follow_symlinks=False):
                    continue
                if finished == entry.name:
                    facts = entry.stat(follow_symlinks=False)
                    found.append((facts.st_mtime_ns, facts.st_size, Path(entry.path)))
                elif time.time() - entry.stat(follow_symlinks=False).st_mtime > ABANDONED_S:
                    _unlink_abandoned(Path(entry.path))
        total = sum(held for _, held, _ in found) + size
        for _, held, path in sorted(found):
            if total <= self._most_bytes:
                break
            _unlink(path)
            total -= held


def is_trusted(found: os.stat_result) -> bool:
    """Whether nobody else can have written a file."""
    others = stat.S_IMODE(found.st_mode) & 0o022
    return stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() and not others


def _read_index(descriptor: int, key: str) -> Index:
    found = os.fstat(descriptor)
    if not is_trusted(found):
        raise Damaged("it is another user's, or others can write to it")
    head = os.pread(descriptor, _HEAD.size, 0)
    if len(head) < _HEAD.size:
        raise Damaged("it is too short")
    magic, own, start, size, checksum = _HEAD.unpack(head)
    if magic != MAGIC or own.hex() != key or start < 0 or size < 0:
        raise Damaged("it does not begin as it should")
    if start + size != found.st_size:
        raise Damaged("it has not the size that it should have")
    raw = os.pread(descriptor, size, start)
    if hashlib.sha256(raw).digest() != checksum:
        raise Damaged("its index is damaged")
    try:
        index = msgspec.msgpack.decode(raw, type=Index)
    except msgspec.DecodeError:
        raise Damaged("its index is not understood") from None
    arrays = [array for linear in index.linears.values() for array in linear.arrays]
    for array in [*arrays, *index.tables.values()]:
        if min(array.offset, array.size) < 0 or array.offset + array.size > start:
            raise Damaged("its index speaks of what is not there")
    return index


def _write(
    descriptor: int,
    key: str,
    linears: dict[str, Contents],
    tables: dict[str, memoryview],
    digest: Callable[[memoryview], int],
    pause: Callable[[], None],
) -> None:
    end = _ALIGNMENT

    def put(view: memoryview) -> StoredArray:
        nonlocal end
        array = StoredArray(end, len(view), digest(view))
        _write_at(descriptor, view, end, pause)
        end += _padded(len(view))
        return array

    index = Index(
        {
            name: StoredLinear(linear.kind, linear.shape, tuple(map(put, linear.arrays)))
            for name, linear in linears.items()
        },
        {name: put(view) for name, view in tables.items()},
    )
    raw = msgspec.msgpack.encode(index)
    _write_at(descriptor, memoryview(raw), end, pause)
    checksum = hashlib.sha256(raw).digest()
    head = _HEAD.pack(MAGIC, bytes.fromhex(key), end, len(raw), checksum)
    _write_at(descriptor, memoryview(head), 0, pause)


def _write_at(descriptor: int, data: memoryview, offset: int, pause: Callable[[], None]) -> None:
    for start in range(0, len(data), _PIECE):
        pause()
        left = data[start : start + _PIECE]
        while left:
            count = os.pwrite(descriptor, left, offset + start)
            left, start = left[count:], start + count


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _take(part: Path) -> int | None:
    """The file, opened and locked; None while somebody else has it."""
    while True:
        descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        if is_own(descriptor, part):
            return descriptor
        os.close(descriptor)
        if part.exists():
            return None  # else it was removed or renamed just before it was locked


def is_own(descriptor: int, part: Path) -> bool:
    """Whether the file is ours alone, and still is what its name leads to."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(descriptor), os.lstat(part))
    except (BlockingIOError, FileNotFoundError):
        return False


def _unlink_abandoned(part: Path) -> None:
    """Remove what a process that is gone has not finished."""
    with contextlib.suppress(OSError):
        descriptor = os.open(part, os.O_RDWR | os.O_NOFOLLOW)
        try:
            if is_own(descriptor, part):
                part.unlink()
        finally:
            os.close(descriptor)


def _unlink(*paths: Path) -> None:
    for path in paths:
        with contextlib.suppress(OSError):
            path.unlink()
