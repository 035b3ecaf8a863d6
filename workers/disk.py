"""KV blocks as files: a rank's own folder, one file for each block."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import stat
import struct
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
from torch import Tensor

from phalanx.protos.errors import ConfigError
from phalanx.protos.shards import Span, Stage
from phalanx.protos.specs import WorkerSpec

from .kvblocks import LAYOUT_VERSION

MAGIC = b"phalanxK"
_HEADER = struct.Struct("<8s32s32sQI")
_NAME = re.compile(r"[0-9a-f]{64}\.kv")
_UNFINISHED = ".part"
_LOCK = "lock"
LOCK_WAIT_S = 2.0
"""For a rank that is just ending to let go of its folder."""


class Found(NamedTuple):
    """What a folder held when it was opened."""

    digests: list[bytes]
    """The least recently written first."""
    refused: int
    """Files that are damaged, or of something else."""


def fingerprint(
    spec: WorkerSpec, stage: Stage, heads: Span, arrangement: Sequence[tuple[int, ...]]
) -> bytes:
    """SHA-256 of all that a rank's part of a block depends on beside the tokens before it.

    The checkpoint counts by its files' names, sizes and times of change: weights that were
    replaced must not meet the keys and values of the old ones.
    """
    facts = (
        LAYOUT_VERSION,
        spec.model,
        _checkpoint(Path(spec.checkpoint)),
        spec.dtype,
        (spec.cache.dtype, spec.cache.block_size),
        (spec.tp_size, spec.pp_size, spec.device),
        (stage.layers, heads),
        arrangement,
    )
    return hashlib.sha256(msgspec.msgpack.encode(facts)).digest()


def _checkpoint(path: Path) -> list[tuple[str, int, int]]:
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    facts = [(file.name, file.stat()) for file in files if file.is_file()]
    return [(name, found.st_size, found.st_mtime_ns) for name, found in facts]


class DiskTier:
    """The files of one rank. A file that is there is whole: it is renamed into place.

    ::

        8 magic | 32 fingerprint | 32 digest | 8 size | 4 CRC-32 of these and the rest | the block

    Files have mode 0600, their folder 0700: they hold what users wrote, as keys and values.
    """

    def __init__(self, folder: Path, fingerprint: bytes, num_bytes: int) -> None:
        """Raises `ConfigError` for a folder that cannot be used or that others can read."""
        self._folder, self._fingerprint, self._size = folder, fingerprint, num_bytes
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            facts = folder.stat()
            self._lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise ConfigError(f"disk_kv_path: {folder}: {error.strerror}") from None
        mode = stat.S_IMODE(facts.st_mode)
        if facts.st_uid != os.geteuid() or mode & 0o077:
            os.close(self._lock)
            raise ConfigError(
                f"disk_kv_path: {folder} has mode {mode:04o} and belongs to user {facts.st_uid}, "
                "allowed: 0700 and the user of the ranks"
            )

    def acquire(self, wait_s: float = LOCK_WAIT_S) -> bool:
        """Take the folder for this rank alone; False if another one has it for too long."""
        deadline = time.monotonic() + wait_s
        while True:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    return False
                time.sleep(0.05)

    def close(self) -> None:
        """Let go of the folder."""
        os.close(self._lock)

    def scan(self) -> Found:
        """Which blocks there are, by their headers.

        Files by our name whose header is of another model, cut or version, or whose size is wrong,
        could never be read again: they are removed. Whatever has another name is left alone.
        """
        good: list[tuple[int, bytes]] = []
        refused = 0
        for entry in self._entries():
            name = entry.name
            if name == _LOCK:
                continue
            if name.endswith(_UNFINISHED) and _NAME.fullmatch(name.removesuffix(_UNFINISHED)):
                self._unlink(Path(entry.path))
            elif not _NAME.fullmatch(name):
                refused += 1
            elif (changed := self._changed(entry)) is not None:
                good.append((changed, bytes.fromhex(name[:64])))
            else:
                refused += 1
                self._unlink(Path(entry.path))
        return Found([digest for _, digest in sorted(good)], refused)

    def write(self, digest: bytes, data: Tensor) -> None:
        """Keep a block, uint8 [num_bytes]. Raises `OSError`; then it is not there."""
        path = self._path(digest)
        part = path.with_name(path.name + _UNFINISHED)
        self._unlink(part)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        view = data.numpy().data
        try:
            with open(os.open(part, flags, 0o600), "wb", buffering=0) as file:
                self._write_all(file.fileno(), self._header(digest, view), view)
            part.rename(path)
        except OSError:
            self._unlink(part)
            raise

    def read(self, digest: bytes, into: Tensor) -> None:
        """A block, to uint8 [num_bytes]. Raises `OSError`, and `ValueError` for a damaged one."""
        view = into.numpy().data
        flags = os.O_RDONLY | os.O_NOFOLLOW
        with open(os.open(self._path(digest), flags), "rb", buffering=0) as file:
            header = file.read(_HEADER.size)
            done = 0
            while done < len(view) and (count := file.readinto(view[done:])):
                done += count
            if done < len(view) or file.read(1) or header != self._header(digest, view):
                raise ValueError("the file is damaged")

    def drop(self, digest: bytes) -> None:
        """Forget a block, if it is there."""
        self._unlink(self._path(digest))

    def _path(self, digest: bytes) -> Path:
        return self._folder / f"{digest.hex()}.kv"

    def _header(self, digest: bytes, data: memoryview) -> bytes:
        start = _HEADER.pack(MAGIC, self._fingerprint, digest, self._size, 0)[:-4]
        return start + struct.pack("<I", zlib.crc32(data, zlib.crc32(start)))

    def _changed(self, entry: os.DirEntry[str]) -> int | None:
        """When a file was written, nanoseconds; None if its header or size is not ours."""
        try:
            if not entry.is_file(follow_symlinks=False):
                return None
            with open(os.open(entry.path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
                header = file.read(_HEADER.size)
                found = os.fstat(file.fileno())
        except OSError:
            return None
        digest = bytes.fromhex(entry.name[:64])
        ours = _HEADER.pack(MAGIC, self._fingerprint, digest, self._size, 0)[:-4]
        whole = found.st_size == _HEADER.size + self._size
        return found.st_mtime_ns if whole and header[:-4] == ours else None

    def _entries(self) -> Iterator[os.DirEntry[str]]:
        with os.scandir(self._folder) as entries:
            yield from entries

    @staticmethod
    def _write_all(file: int, *parts: bytes | memoryview) -> None:
        for part in parts:
            left = memoryview(part)
            while left:
                left = left[os.write(file, left) :]

    @staticmethod
    def _unlink(path: Path) -> None:
        with contextlib.suppress(OSError):
            path.unlink()
