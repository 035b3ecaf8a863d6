"""Keeps the replicas there: starts them, and starts them again when they are lost."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from phalanx.protos.errors import GroupLost, PhalanxError

from .cluster.recovery import Slot, Start, Wait, next_action
from .engine import AsyncEngine
from .handle import ReplicaHandle

TICK_S = 0.5

StartReplica = Callable[[int, int], Awaitable[ReplicaHandle]]
"""(slot, epoch) -> a replica whose loop runs. Raises a `PhalanxError`, leaving nothing behind."""

_log = logging.getLogger(__name__)


class Supervisor:
    """Runs `recovery.next_action` against the facts. Belongs to the engine's event loop."""

    def __init__(self, engine: AsyncEngine, replicas: int, start: StartReplica) -> None:
        self._engine, self._start_replica = engine, start
        self._slots = [Slot() for _ in range(replicas)]
        self._epoch = 0
        self._changed = asyncio.Event()
        engine.on_replica_lost = self._on_lost

    async def start_all(self) -> None:
        """Start every replica for the first time. Raises the first failure."""
        for index in range(len(self._slots)):
            await self._start(index)

    async def run(self) -> None:
        """Watch for ever. Cancel it to end."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._tick())
            tasks.create_task(self._keep())

    async def close(self) -> None:
        """Stop all replicas, for good."""
        self._engine.on_replica_lost = lambda index, error: None
        for handle in self._engine.replicas:
            await asyncio.to_thread(handle.replica.stop)

    async def _tick(self) -> None:
        while True:
            self._engine.tick(time.monotonic())
            await asyncio.sleep(TICK_S)

    async def _keep(self) -> None:
        while True:
            action = next_action(self._slots, time.monotonic())
            if isinstance(action, Start):
                await self._start_again(action.index)
            else:
                await self._wait(action)

    async def _start(self, index: int) -> None:
        self._epoch += 1
        handle = await self._start_replica(index, self._epoch)
        self._slots[index] = self._slots[index].started()
        try:
            await self._engine.adopt(handle)
        except PhalanxError:
            await asyncio.to_thread(handle.replica.stop)  # which the engine reports as a loss
            raise

    async def _start_again(self, index: int) -> None:
        _log.warning("replica-%d: starting a new group of ranks", index)
        before = self._slots[index].failures
        try:
            await self._start(index)
        except PhalanxError as error:
            # a replica that died over its canary was counted by `_on_lost`
            if self._slots[index].failures == before:
                self._fail(index, error)
        else:
            _log.warning("replica-%d: ready again", index)

    def _on_lost(self, index: int, error: GroupLost) -> None:
        self._fail(index, error)
        self._changed.set()

    def _fail(self, index: int, error: PhalanxError) -> None:
        _log.error("replica-%d: %s", index, error)
        self._slots[index] = self._slots[index].failed(time.monotonic(), str(error))

    async def _wait(self, action: Wait) -> None:
        try:
            async with asyncio.timeout(action.seconds):
                await self._changed.wait()
        except TimeoutError:
            return
        self._changed.clear()
