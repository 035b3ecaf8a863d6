"""When requests and prefixes move: a replica leaves, a prompt is done, a queue grows, a prefix is
elsewhere. How they move is the mover's affair.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from phalanx.controller.handle import ReplicaHandle
from phalanx.controller.residents import Residents
from phalanx.controller.routing.router import COPY_START_S, Decision, Request
from phalanx.controller.stream import Stream
from phalanx.protos.errors import Unavailable

from .mover import CONCURRENT, Move, Mover

KEPT_MOVES = 1024
RETRY_S = 0.1
DRAIN_S = 60.0
DECODE_TRIES = 3
USUAL_BYTES_PER_S = 200e6
"""Of copies between ranks, until some were measured."""
SMOOTHING = 0.3


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptMove:
    """A hand-over of a tenant's request."""

    tenant: str
    request_id: str
    move: Move


@dataclass(frozen=True, slots=True, kw_only=True)
class DrainReport:
    """What became of the streams of a replica that was drained."""

    moved: int
    """Went on from their KV blocks."""
    recomputed: int
    """Went on from their tokens, or had not begun. Others have ended meanwhile."""


class Movement:
    """Decides what moves, on the engine's event loop."""

    def __init__(
        self,
        residents: Residents,
        relocate: Callable[[Stream], None],
        *,
        rebalance: bool = False,
        copy_prefixes: bool = True,
        on_move: Callable[[Move], None] = lambda move: None,
    ) -> None:
        """relocate: takes a stream from its replica and places it anew, from its tokens.
        on_move: told of every hand-over that was tried."""
        self._residents, self._relocate = residents, relocate
        self._rebalance, self._copy_prefixes = rebalance, copy_prefixes
        self._on_move = on_move
        self._mover = Mover(residents.pass_on, self._keep)
        self._kept: deque[KeptMove] = deque(maxlen=KEPT_MOVES)
        self._tasks: set[asyncio.Task[None]] = set()
        self._bytes_per_s = USUAL_BYTES_PER_S
        if copy_prefixes:
            residents.copies_take(USUAL_BYTES_PER_S)
        self._copying: dict[tuple[int, int], asyncio.Future[Move]] = {}

    # --- a replica leaves ---

    async def drain(self, index: int, timeout_s: float = DRAIN_S) -> DrainReport:
        """Let a replica take no more requests, and all its streams go on elsewhere.

        What cannot be handed over within `timeout_s` is computed again elsewhere. Returns at once
        when the replica is lost, whose streams have gone another way. Raises `Unavailable`,
        changing nothing, where there is no other replica.
        """
        handle = self._residents.handle(index)
        if handle is None:
            raise Unavailable(f"replica-{index} is not ready")
        if len(self._residents.ready) < 2:
            raise Unavailable(f"replica-{index} is the only one that is ready")
        handle.leaving = True
        self._residents.leave(index)
        deadline, gate = time.monotonic() + timeout_s, asyncio.Semaphore(CONCURRENT)
        moved = recomputed = 0
        while streams := self._residents.of(handle.index):
            done = await asyncio.gather(
                *(self._drain_one(stream, handle, deadline, gate) for stream in streams)
            )
            moved += done.count("moved")
            recomputed += done.count("recomputed")
            if handle.replica.lost is not None:
                break
        return DrainReport(moved=moved, recomputed=recomputed)

    async def _drain_one(
        self, stream: Stream, source: ReplicaHandle, deadline: float, gate: asyncio.Semaphore
    ) -> str:
        """How it went on: "moved", "recomputed", or "" where it ended or has gone another way."""
        async with gate:
            while _is_at(stream, source):
                target = self._target(stream, source)
                if target is not None and not self._mover.moves(stream):
                    move = await self._mover.move(stream, source, target, "drain")
                    if move.outcome == "moved":
                        return "moved"
                    if not move.later and _is_at(stream, source):
                        break
                if time.monotonic() > deadline:
                    break
                await asyncio.sleep(RETRY_S)
            if not _is_at(stream, source):
                return ""
            self._relocate(stream)
            return "recomputed"

    def _target(self, stream: Stream, source: ReplicaHandle) -> ReplicaHandle | None:
        """Where a stream that runs would best go on: its prompt need not be computed."""
        loads = self._residents.begun
        while len(loads):
            index = loads.choose(Request(1, stream.open_samples)).replica
            handle = self._residents.handle(index)
            if handle is not None:
                return None if handle is source else handle
            loads.leave(index)  # its loop has ended; the news of that is on the way
        return None

    # --- a prompt is done ---

    def saw_token(self, stream: Stream) -> None:
        """A stream got a token: where it has begun on a prefill replica, it goes on elsewhere."""
        index = stream.replica
        if stream.handed_over or index is None or not self._residents.begins(index):
            return
        if not stream.finished:
            stream.handed_over = True
            self._spawn(self._to_decode(stream))

    async def _to_decode(self, stream: Stream) -> None:
        for _ in range(DECODE_TRIES):
            source = self._residents.handle(stream.replica)
            if source is None or stream.finished or not self._residents.begins(source.index):
                return
            target = self._target(stream, source)
            if target is None:
                return
            move = await self._mover.move(stream, source, target, "decode")
            if not move.later:
                return
            await asyncio.sleep(RETRY_S)

    # --- a queue grows ---

    def balance(self) -> None:
        """Where requests wait at a replica and another one has nobody waiting, a free quarter of
        its places and half of its blocks free, the shortest stream of the first moves there."""
        if not self._rebalance:
            return
        ready = self._residents.ready
        for source in ready:
            if not source.replica.stats().waiting:
                continue
            target = next((other for other in ready if other is not source and _idle(other)), None)
            streams = [s for s in self._residents.of(source.index) if s.has_tokens]
            if target is None or not streams or any(map(self._mover.moves, streams)):
                continue
            stream = min(streams, key=lambda stream: stream.known_tokens)
            self._spawn(self._move(stream, source, target, "rebalance"))

    async def _move(
        self, stream: Stream, source: ReplicaHandle, target: ReplicaHandle, reason: str
    ) -> None:
        await self._mover.move(stream, source, target, reason)

    # --- a prefix is elsewhere ---

    async def bring_prefix(self, stream: Stream, decision: Decision) -> bool:
        """Copy what another replica has cached of a prompt to the one that was chosen for it, where
        the decision says so: so hot prefixes are soon held by all. False: that has failed, and the
        decision with it."""
        chosen = decision.compared[0]
        tokens = chosen.copied_tokens
        if not tokens or decision.source is None:
            return True
        source = self._residents.handle(decision.source)
        target = self._residents.handle(chosen.replica)
        if source is None or target is None:
            return False
        way = (source.index, target.index)
        if (other := self._copying.get(way)) is not None:
            await asyncio.wait([other])  # most likely the very same prefix
            return True
        task = asyncio.ensure_future(
            self._mover.copy_prefix(stream.tenant, stream.prompt_token_ids, source, target)
        )
        self._copying[way] = task
        try:
            move = await asyncio.shield(task)
        finally:
            if self._copying.get(way) is task:
                del self._copying[way]
        if move.outcome != "moved":
            return False
        stream.uncached_tokens = max(stream.uncached_tokens - tokens, 1)
        return True

    # --- what has moved ---

    def _keep(self, stream: Stream | None, move: Move) -> None:
        """Remember a hand-over that was tried."""
        if move.outcome == "moved" and move.seconds > 0 and move.num_bytes:
            rate = move.num_bytes / max(move.seconds - COPY_START_S, 1e-3)
            self._bytes_per_s += SMOOTHING * (rate - self._bytes_per_s)
            if self._copy_prefixes:
                self._residents.copies_take(self._bytes_per_s)
        if stream is not None:
            self._kept.append(
                KeptMove(tenant=stream.tenant, request_id=stream.request_id, move=move)
            )
        self._on_move(move)

    def moves(self) -> list[KeptMove]:
        """The latest hand-overs of requests, the oldest first."""
        return list(self._kept)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _is_at(stream: Stream, source: ReplicaHandle) -> bool:
    """Whether a stream still runs on a replica that lives."""
    here = stream.replica == source.index and not stream.finished
    return here and source.replica.lost is None


def _idle(handle: ReplicaHandle) -> bool:
    """Whether a replica can easily take a stream."""
    stats = handle.replica.stats()
    places = handle.places is None or 4 * stats.running <= 3 * handle.places
    return not stats.waiting and places and 2 * stats.blocks_free >= stats.blocks_total
