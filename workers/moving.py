"""A rank's hands between its KV pool, host memory and disk; what goes where is decided elsewhere."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

import torch

from phalanx.protos.errors import GroupLost
from phalanx.protos.moves import DIGEST_BYTES, Move, Moved, MoveKind, MoveReport
from phalanx.protos.specs import TierSpec

from .disk import DiskTier
from .kvblocks import BlockBytes, checksum

MOST_UNREPORTED = 64
CLOSE_S = 5.0
_WITH_SLOT = (MoveKind.STORE, MoveKind.LOAD, MoveKind.WRITE)
_WITH_BLOCK = (MoveKind.STORE, MoveKind.LOAD, MoveKind.READ)


def check_moves(moves: Sequence[Move], num_blocks: int, tiers: TierSpec | None) -> None:
    """Raise `GroupLost` for blocks, slots and files that are not there."""
    if moves and tiers is None:
        raise GroupLost("plan moves blocks, and there are no tiers")
    for move in moves:
        slots = 0 if tiers is None else tiers.host_slots
        if move.kind in _WITH_BLOCK and not 0 <= move.block < num_blocks:
            raise GroupLost(f"plan moves block {move.block}, there are {num_blocks}")
        if move.kind in _WITH_SLOT and not 0 <= move.slot < slots:
            raise GroupLost(f"plan moves slot {move.slot}, there are {slots}")
        if len(move.digest) != DIGEST_BYTES:
            raise GroupLost(f"plan moves a digest of {len(move.digest)} bytes")


class BlockMover:
    """Stores at once, in the order of the plans; does the rest on a thread of its own.

    That thread takes loads, and checksums of what was stored, in order, and turns to writes where
    nothing of these is left: nobody waits for a write.
    """

    def __init__(
        self,
        blocks: BlockBytes,
        tiers: TierSpec,
        disk: DiskTier | None,
        device: torch.device,
        report: Callable[[MoveReport], None],
    ) -> None:
        """report: called on the mover's thread; may raise `GroupLost`, which ends it."""
        self._blocks, self._disk, self._device, self._report = blocks, disk, device, report
        self._host = blocks.new(tiers.host_slots)
        self._sums = [0] * tiers.host_slots
        self._passing = blocks.new(1)
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._urgent: deque[tuple[Move, float, torch.cuda.Event | None]] = deque()
        self._lazy: deque[Move] = deque()
        self._work = threading.Condition()
        self._over = False
        self._thread = threading.Thread(target=self._run, name="block-mover", daemon=True)
        self._thread.start()

    def begin(self, moves: Sequence[Move]) -> None:
        """Take a plan's orders, before anything of the plan is computed."""
        urgent: list[tuple[Move, float]] = []
        lazy: list[Move] = []
        for move in moves:
            started = time.perf_counter()
            if move.kind is MoveKind.STORE:
                self._blocks.read([move.block], self._host[move.slot : move.slot + 1])
            if move.kind in (MoveKind.WRITE, MoveKind.DROP):
                lazy.append(move)
            else:
                urgent.append((move, time.perf_counter() - started))
        event = self._mark() if urgent else None
        with self._work:
            self._urgent += ((move, seconds, event) for move, seconds in urgent)
            self._lazy += lazy
            self._work.notify()

    def close(self) -> None:
        """End the thread; what was not begun is left undone."""
        with self._work:
            self._over = True
            self._work.notify()
        self._thread.join(CLOSE_S)  # a disk may hang
        if self._disk is not None:
            self._disk.close()

    def _mark(self) -> torch.cuda.Event | None:
        """What the device must have reached before a store can be read, or a block be written."""
        if self._stream is None:
            return None
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _run(self) -> None:
        done: list[Moved] = []
        while True:
            with self._work:
                hurry = bool(self._urgent)
            if done and (not hurry or len(done) >= MOST_UNREPORTED):
                try:
                    self._report(MoveReport(done))
                except GroupLost:
                    return  # nobody is left to tell; the other thread finds out as well
                done = []
            with self._work:
                self._work.wait_for(lambda: self._over or self._urgent or self._lazy)
                if self._over:
                    return
                if self._urgent:
                    move, seconds, event = self._urgent.popleft()
                else:
                    move, seconds, event = self._lazy.popleft(), 0.0, None
            done.append(self._do(move, seconds, event))

    def _do(self, move: Move, seconds: float, event: torch.cuda.Event | None) -> Moved:
        started, error = time.perf_counter(), ""
        try:
            self._move(move, event)
        except Exception as failure:  # noqa: BLE001  the block is recomputed, whatever it was
            error = f"{move.kind.name.lower()}: {failure}"
        return Moved(move.number, seconds + time.perf_counter() - started, error)

    def _move(self, move: Move, event: torch.cuda.Event | None) -> None:
        data = self._host[move.slot] if move.slot >= 0 else self._passing[0]
        if move.kind is MoveKind.STORE:
            if event is not None:
                event.synchronize()
            self._sums[move.slot] = checksum(data)
        elif move.kind is MoveKind.LOAD:
            if checksum(data) != self._sums[move.slot]:
                raise ValueError("host memory has changed")
            self._fill(move.block, move.slot, event)
        elif self._disk is None:
            raise ValueError("there is no disk tier here")
        elif move.kind is MoveKind.WRITE:
            # what is kept for a long time is checked once more
            if checksum(data) != self._sums[move.slot]:
                raise ValueError("host memory has changed")
            self._disk.write(move.digest, data)
        elif move.kind is MoveKind.READ:
            self._disk.read(move.digest, data)
            self._fill(move.block, None, event)
        else:
            self._disk.drop(move.digest)

    def _fill(self, block: int, slot: int | None, event: torch.cuda.Event | None) -> None:
        data = self._passing if slot is None else self._host[slot : slot + 1]
        if self._stream is None:
            self._blocks.write([block], data)
            return
        with torch.cuda.stream(self._stream):
            if event is not None:
                self._stream.wait_event(event)
            self._blocks.write([block], data)
        self._stream.synchronize()
