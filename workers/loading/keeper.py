"""When packed weights are kept, under which key, and by whom: a thread behind the start."""

from __future__ import annotations

import atexit
import hashlib
import logging
import os
import threading
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from phalanx.kernels.stored import Contents, WeightStorage
from phalanx.protos.specs import WorkerSpec

from .fingerprint import Digests, FileFacts
from .shelf import Shelf, ShelfFile

_log = logging.getLogger(__name__)
_MADE_BY = ("checkpoint", "layers", "loading", "models", "decoder.py", "packing.py")
"""Code that decides which bits a weight is filled with, in the room of the workers."""
LOOK_S = 0.05
"""After so long a piece of work it looks whether others compute,"""
BUSY = 0.2
"""so many cores of this process at least,"""
REST_S = 5.0
"""and then rests for so long."""


class Stopped(Exception):
    """The process ends, or whoever asked has lost interest."""


class Keeper:
    """One rank's file on the shelf: opened before its weights are filled, written behind."""

    def __init__(self, shelf: Shelf, facts: tuple[FileFacts, ...], recipe: bytes) -> None:
        """facts: of the checkpoint, from before it was opened. recipe: all else that decides what
        is packed."""
        self._shelf, self._facts, self._recipe = shelf, facts, recipe
        self._digests = Digests(shelf.folder)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._looked = (0.0, 0.0)

    def open(self) -> ShelfFile | None:
        """The file of an earlier start; None if there is none, or if the checkpoint is not known
        by its content yet, which would take longer to find out than it saves. Raises `Damaged`."""
        content = self._digests.known(self._facts)
        return None if content is None else self._shelf.open(self._key(content))

    def refuse(self, reason: str) -> None:
        """Remove the file that was opened: it is of no use."""
        content = self._digests.known(self._facts)
        if content is not None:
            place = self._shelf.place(self._key(content))
            _log.warning("packed weights are made anew, as %s is of no use: %s", place, reason)
            self._shelf.drop(self._key(content))

    def write(
        self, linears: dict[str, Contents], tables: dict[str, Tensor], storage: WeightStorage
    ) -> None:
        """Keep what was packed, without waiting for it. The storage keeps the memory alive."""
        arguments = (linears, tables, storage)
        self._thread = threading.Thread(target=self._run, args=arguments, daemon=True)
        self._thread.name = "packed-weights"
        atexit.register(self.close)  # before the memory is given back
        self._thread.start()

    def wait(self, timeout_s: float) -> bool:
        """Until what is being written is; whether it is."""
        if self._thread is not None:
            self._thread.join(timeout_s)
        return self._thread is None or not self._thread.is_alive()

    def close(self) -> None:
        """Stop writing; what is not finished is removed."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        atexit.unregister(self.close)

    def _key(self, content: str) -> str:
        return hashlib.sha256(content.encode() + self._recipe).hexdigest()

    def _run(
        self, linears: dict[str, Contents], tables: dict[str, Tensor], storage: WeightStorage
    ) -> None:
        started = time.perf_counter()
        self._looked = (time.monotonic(), _used())
        try:
            content = self._digests.known(self._facts) or self._digests.read(
                self._facts, self._give_way
            )
            if content is None:
                _log.info("packed weights are not kept: the checkpoint has just been changed")
                return
            views = {name: _bytes_of(table) for name, table in tables.items()}
            key = self._key(content)
            refused = self._shelf.write(key, linears, views, storage.digest, self._give_way)
            seconds = time.perf_counter() - started
            if refused is None:
                place = self._shelf.place(key)
                _log.info("packed weights are kept in %s, after %.1f s", place, seconds)
            else:
                _log.info("packed weights are not kept: %s", refused)
        except Stopped:
            _log.debug("packed weights are not kept: the process ends")
        except OSError as error:
            _log.warning("packed weights are not kept: %s", error)

    def _give_way(self) -> None:
        """Rest while other threads of this process compute, though not for ever.

        A lower priority would be worse: a thread that waits for a core may have the interpreter.
        """
        seconds = time.monotonic() - self._looked[0]
        if seconds > LOOK_S:
            if _used() - self._looked[1] > BUSY * seconds:
                self._stop.wait(REST_S)
            self._looked = (time.monotonic(), _used())
        if self._stop.is_set():
            raise Stopped


def _used() -> float:
    """CPU seconds of all threads but this one."""
    return time.process_time() - time.thread_time()


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.view(-1).view(torch.uint8).numpy().data


def recipe(spec: WorkerSpec, rank: int, layout: str) -> bytes:
    """All that decides a rank's packed weights beside the checkpoint's content: what it holds of
    the model, in which format, as which code makes it."""
    facts = (
        _code(),
        layout,
        spec.model,
        spec.dtype,
        (spec.tp_size, spec.pp_size, rank),
        spec.device,
    )
    return msgspec.msgpack.encode(facts)


def _code() -> list[str]:
    room = Path(__file__).parent.parent
    places = [room / name for name in _MADE_BY]
    files = [file for place in places for file in ([place] if place.suffix else place.glob("*.py"))]
    total = hashlib.sha256()
    for file in sorted(files):
        total.update(file.name.encode() + b"\0" + file.read_bytes())
    return [total.hexdigest(), _version("gguf"), str(torch.__version__)]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def default_folder() -> Path:
    """This user's, as the XDG Base Directory Specification has it."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "phalanx" / "weights"


def keeper_of(
    spec: WorkerSpec, rank: int, storage: WeightStorage, facts: tuple[FileFacts, ...]
) -> Keeper | None:
    """The keeper that a spec asks for; None where it cannot have one. facts: see `Keeper`."""
    if spec.weight_cache is None:
        return None
    try:
        named = spec.weight_cache.folder
        shelf = Shelf(Path(named) if named else default_folder(), spec.weight_cache.most_bytes)
        return Keeper(shelf, facts, recipe(spec, rank, storage.layout))
    except (OSError, RuntimeError) as error:  # no home
        _log.warning("packed weights are not kept: %s", error)
        return None
