"""What a checkpoint is, by its content; a content that was read once is remembered."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import msgspec

from .shelf import is_own, is_trusted

READ_BYTES = 4 << 20
SETTLED_NS = 2 * 10**9
"""A file that was changed less long ago may be changed again without another time of change."""
LOOK_S = 0.1
"""Between two looks at what another process reads."""
_SUFFIX = ".digest"


class FileFacts(NamedTuple):
    """A file as it is found; whoever changes its content changes one of these."""

    path: str
    size: int
    changed_ns: int
    inode: int
    device: int
    status_changed_ns: int


def facts_of(checkpoint: str) -> tuple[FileFacts, ...]:
    """The files that hold the tensors of a folder or of a .gguf file. Raises `OSError`."""
    path = Path(os.path.abspath(checkpoint))
    files = [path]
    if path.is_dir():
        files = [
            *sorted(path.glob("*.safetensors")),
            *sorted(path.glob("*.safetensors.index.json")),
        ]
    return tuple(_facts(file) for file in files)


def _facts(file: Path) -> FileFacts:
    found = file.stat()
    times = (found.st_mtime_ns, found.st_ino, found.st_dev, found.st_ctime_ns)
    return FileFacts(str(file), found.st_size, *times)


class Digests:
    """Digests of contents in a folder, each in a file named by the facts that it is of."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def known(self, facts: tuple[FileFacts, ...]) -> str | None:
        """What `read` gave for these facts once, None if it is not known."""
        with contextlib.suppress(OSError, ValueError):
            place = os.open(self._place(facts), os.O_RDONLY | os.O_NOFOLLOW)
            with open(place, "rb") as file:
                found, text = os.fstat(file.fileno()), file.read(65).decode("ascii")
            if is_trusted(found) and len(bytes.fromhex(text)) == hashlib.sha256().digest_size:
                return text
        return None

    def read(
        self, facts: tuple[FileFacts, ...], pause: Callable[[], None] = lambda: None
    ) -> str | None:
        """SHA-256 of the files' names and contents; remembers it. `pause` is called between pieces
        of 4 MiB. None if the files are not those of the facts any more, or are too new to be sure.
        Of several processes one reads. Raises `OSError`."""
        part = self._place(facts).with_name(self._place(facts).name + ".part")
        with open(os.open(part, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600), "w") as file:
            while not is_own(file.fileno(), part):  # another rank reads them already
                if not part.exists():
                    return self.known(facts)
                pause()
                time.sleep(LOOK_S)
            if (text := self.known(facts)) is not None:
                part.unlink()
                return text
            text = _content(facts, pause)
            now = tuple(_facts(Path(found.path)) for found in facts)
            newest = max((found.status_changed_ns for found in facts), default=0)
            if now != facts or time.time_ns() - newest < SETTLED_NS:
                part.unlink()
                return None
            file.truncate(0)
            file.write(text)
            file.flush()
            part.rename(self._place(facts))
            return text

    def _place(self, facts: tuple[FileFacts, ...]) -> Path:
        name = hashlib.sha256(msgspec.msgpack.encode(facts)).hexdigest()
        return self._folder / f"{name}{_SUFFIX}"


def _content(facts: tuple[FileFacts, ...], pause: Callable[[], None]) -> str:
    total, buffer = hashlib.sha256(), bytearray(READ_BYTES)
    for found in facts:
        total.update(msgspec.msgpack.encode((os.path.basename(found.path), found.size)))
        with open(found.path, "rb", buffering=0) as file:
            while count := file.readinto(buffer):
                total.update(memoryview(buffer)[:count])
                pause()
    return total.hexdigest()
