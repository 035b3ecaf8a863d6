"""Keeps the replicas there: starts them, and starts them again when they are lost."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Protocol

from phalanx.protos.errors import ConfigError, GroupLost, InvalidArgument, PhalanxError

from .cluster.fleet import REASON, NoPlace
from .cluster.recovery import (
    LOOK_AGAIN_S,
    Action,
    AddSpare,
    Desired,
    Facts,
    Replace,
    Slot,
    Start,
    Wait,
    condition,
    needs_room,
    next_actions,
    observe,
)
from .cluster.room import Free, largest_tp
from .cluster.snapshot import ReplicaSnapshot
from .cluster.spares import SparePool
from .engine import AsyncEngine
from .handle import ReplicaHandle

TICK_S = 0.5
SPARE_RETRY_S = 10.0

Look = Callable[[], Free | None]
"""What nodes have free; None: places are not counted here. Called on a thread."""

_log = logging.getLogger(__name__)


class StartReplica(Protocol):
    """Starts a replica whose loop runs. Raises a `PhalanxError`, leaving nothing behind."""

    def __call__(
        self, index: int, epoch: int, tp: int | None = None, /
    ) -> Awaitable[ReplicaHandle]:
        """For slot `index`; `tp` as configured where it is None."""


class Supervisor:
    """Runs `recovery.next_actions` against the facts. Belongs to the engine's event loop."""

    def __init__(
        self,
        engine: AsyncEngine,
        replicas: int,
        start: StartReplica,
        desired: Desired | None = None,
        look: Look = lambda: None,
        spares: SparePool | None = None,
        *,
        max_replicas: int | None = None,
        ask_for: Callable[[int], None] = lambda replicas: None,
    ) -> None:
        """max_replicas: that `scale` allows; None: as many as at first. ask_for: tells whoever
        provides machines how many replicas there are to be; called on a thread."""
        self._wanted, self._max_replicas = replicas, max_replicas or replicas
        self._ask_for = ask_for
        self._engine, self._start_replica, self._look = engine, start, look
        self._desired, self._spares = desired or Desired(), spares
        self._warming: asyncio.Task[None] | None = None
        self._spare_due = 0.0
        self._slots = [Slot() for _ in range(replicas)]
        self._epoch = 0
        self._changed = asyncio.Event()
        self.on_failure: Callable[[], None] = lambda: None
        """Called when a group was lost, or did not start."""
        engine.on_replica_lost = self._on_lost
        engine.condition = self._condition

    async def start_all(self, *, min_tp: int | None = None) -> None:
        """Start every replica for the first time. Raises the first failure.

        min_tp: replicas may start as small as this where places for more are not there for a
        while; None: they may not.
        """
        await self._ask(self._wanted)
        for index in range(len(self._slots)):
            await self._start(index, await self._first_size(min_tp))

    async def _first_size(self, min_tp: int | None) -> int:
        """The TP size to start with; the desired one, too, where none finds places."""
        desired = self._desired
        deadline = time.monotonic() + desired.shrink_after_s
        while True:
            free = (await self._facts()).free
            shape = (desired.pp, desired.placement)
            found = desired.tp if free is None else largest_tp(free, desired.tp, *shape)
            if min_tp is None or not min_tp <= found < desired.tp:
                return desired.tp
            if time.monotonic() >= deadline:
                return found
            await asyncio.sleep(LOOK_AGAIN_S)

    async def run(self) -> None:
        """Watch for ever. Cancel it to end."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._tick())
            tasks.create_task(self._keep())

    @property
    def ranks_missing(self) -> int:
        """Ranks that replicas have fewer than they should."""
        desired = self._desired
        return sum(desired.tp - slot.tp for slot in self._slots) * desired.pp

    @property
    def spares(self) -> int:
        """Groups that stand by."""
        return 0 if self._spares is None else len(self._spares)

    def restart_all(self) -> int:
        """Replace every replica, one after the other; their streams go on. Returns how many."""
        generation = self._desired.generation + 1
        self._desired = dataclasses.replace(self._desired, generation=generation)
        self._changed.set()
        return len(self._slots)

    def scale(self, replicas: int) -> int:
        """Let replicas join or leave, the one with the highest index first; returns how many were
        wanted before. Raises `InvalidArgument`."""
        if not 1 <= replicas <= self._max_replicas:
            text = f"{replicas}, 1 to {self._max_replicas} allowed (max_replicas)"
            raise InvalidArgument.of("replicas", text)
        before, self._wanted = self._wanted, replicas
        self._changed.set()
        return before

    async def close(self) -> None:
        """Stop all replicas, for good."""
        self._engine.on_replica_lost = lambda index, error: None
        if self._spares is not None:
            await asyncio.to_thread(self._spares.close)
        for handle in self._engine.replicas:
            await asyncio.to_thread(handle.replica.stop)

    async def _tick(self) -> None:
        while True:
            self._engine.tick(time.monotonic())
            await asyncio.sleep(TICK_S)

    async def _keep(self) -> None:
        while True:
            await self._resize()
            match (await self._next())[0]:
                case Start(index, tp):
                    await self._start_again(index, tp)
                case Replace() as action:
                    await self._replace(action)
                case AddSpare():
                    self._warming = asyncio.create_task(self._add_spare())
                case Wait(seconds):
                    await self._wait(seconds)

    async def _resize(self) -> None:
        """Make slots for replicas that are to join; end the last ones that are to leave."""
        if self._wanted > len(self._slots):
            await self._ask(self._wanted)
            self._slots += [Slot() for _ in range(self._wanted - len(self._slots))]
            self._engine.resize(len(self._slots))
        # streams must find another replica
        while self._wanted < len(self._slots) and any(
            slot.running for slot in self._slots[: self._wanted]
        ):
            index = len(self._slots) - 1
            _log.warning("replica-%d: leaves", index)
            ending = await self._engine.release(index)
            del self._slots[index]
            self._engine.resize(index)
            if ending is not None:
                await ending
            await self._ask(self._wanted)

    async def _ask(self, replicas: int) -> None:
        try:
            await asyncio.to_thread(self._ask_for, replicas)
        except PhalanxError as error:
            _log.warning("nobody was told that %d replicas are wanted: %s", replicas, error)

    async def _next(self) -> tuple[Action, ...]:
        """What is to be done, by what is seen now."""
        facts, now = await self._facts(), time.monotonic()
        self._slots = observe(self._slots, now, self._desired, facts)
        missing = [slot for slot in self._slots if not slot.running]
        self._engine.holding = any(not slot.degraded(now) for slot in missing)
        return next_actions(self._slots, now, self._desired, facts)

    async def _facts(self) -> Facts:
        free: Free | None = None
        if needs_room(self._slots, self._desired):
            try:
                free = await asyncio.to_thread(self._look)
            except PhalanxError as error:
                _log.warning("places cannot be counted: %s", error)
                free = {}
        spares, places = self._desired.spares, []
        if self._spares is not None:
            if self._all_run:
                await asyncio.to_thread(self._spares.prune)
            warming = self._warming is not None or time.monotonic() < self._spare_due
            spares, places = len(self._spares) + warming, self._spares.places
        return Facts(free=free, busy=self._engine.busy, spares=spares, spare_places=tuple(places))

    @property
    def _all_run(self) -> bool:
        return all(slot.running for slot in self._slots)

    async def _add_spare(self) -> None:
        """Beside all else: a replica that is lost meanwhile need not wait."""
        try:
            if self._spares is not None:
                await asyncio.to_thread(self._spares.add)
                _log.info("a spare group stands by")
        except PhalanxError as error:
            _log.warning("no spare group: %s", error)
            self._spare_due = time.monotonic() + SPARE_RETRY_S
        finally:
            self._warming = None
            self._changed.set()

    async def _start(self, index: int, tp: int) -> None:
        """Start a group and take it in."""
        await self._take_in(await self._start_group(index, tp))

    async def _start_group(self, index: int, tp: int) -> ReplicaHandle:
        self._epoch += 1
        return await self._start_replica(index, self._epoch, tp)

    async def _take_in(self, handle: ReplicaHandle) -> None:
        index, generation = handle.index, self._desired.generation
        self._slots[index] = self._slots[index].started(
            handle.tp, handle.rank_places, generation, time.monotonic()
        )
        try:
            await self._engine.adopt(handle)
        except PhalanxError:
            await asyncio.to_thread(handle.replica.stop)  # which the engine reports as a loss
            raise

    async def _start_again(self, index: int, tp: int) -> None:
        _log.warning("replica-%d: starting a new group of ranks, tp %d", index, tp)
        before = self._slots[index].failures
        try:
            await self._start(index, tp)
        except NoPlace as error:
            _log.warning("replica-%d: %s", index, error)  # places will be counted again
            self._changed.set()
            await asyncio.sleep(LOOK_AGAIN_S)
        except PhalanxError as error:
            if isinstance(error, ConfigError) and tp < self._desired.tp:
                _log.error("replica-%d: tp %d: %s", index, tp, error)
                self._slots[index] = self._slots[index].too_small(tp, str(error))
            # a replica that died over its canary was counted by `_on_lost`
            elif self._slots[index].failures == before:
                self._fail(index, error)
        else:
            _log.warning("replica-%d: ready again, tp %d", index, tp)

    async def _replace(self, action: Replace) -> None:
        """Another group for a slot whose group runs. Its streams wait for as long as they have to:
        where there is room for both groups, for a step or two."""
        index = action.index
        _log.warning("replica-%d: to be replaced, tp %d", index, action.tp)
        successor = None
        if action.beside:
            try:
                successor = await self._start_group(index, action.tp)
            except PhalanxError as error:
                _log.error("replica-%d runs on: its successor failed: %s", index, error)
                self._slots[index] = self._slots[index].stumbled(time.monotonic(), str(error))
                return
        self._engine.holding = True
        ending = await self._engine.release(index)
        if self._slots[index].running:
            self._slots[index] = self._slots[index].stopped()
        before = self._slots[index].failures
        try:
            if successor is not None:
                await self._take_in(successor)
        except PhalanxError as error:
            # as in `_start_again`
            if self._slots[index].failures == before:
                self._fail(index, error)
        if ending is not None:
            await ending
        if successor is None:
            await self._start_again(index, action.tp)

    def _on_lost(self, index: int, error: GroupLost) -> None:
        self._fail(index, error)
        self._changed.set()

    def _fail(self, index: int, error: PhalanxError) -> None:
        _log.error("replica-%d: %s", index, error)
        self.on_failure()
        # what Ray has to say of it is in the log
        cause = str(error).split(REASON, 1)[0]
        self._slots[index] = self._slots[index].failed(time.monotonic(), cause)

    async def _wait(self, seconds: float | None) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._changed.wait()
        except TimeoutError:
            return
        self._changed.clear()

    def _condition(self, index: int, known: ReplicaSnapshot) -> ReplicaSnapshot:
        """A replica's snapshot with what it should be, and why it is not."""
        slot, now = self._slots[index], time.monotonic()
        text = condition(slot, now, self._desired)
        state = "degraded" if slot.degraded(now) else known.state
        return dataclasses.replace(
            known,
            state=state,
            tp_desired=self._desired.tp,
            condition=text,
            outdated=slot.generation < self._desired.generation,
        )
