"""What runs for as long as a cluster does: its supervisor, its journal, its gauges."""

from __future__ import annotations

import asyncio

from phalanx.protos.errors import JournalLost

from .engine import AsyncEngine
from .journal.memory import MemoryJournal
from .journal.writer import DurableJournal
from .metrics import Metrics
from .scaling import desired_replicas
from .supervisor import Supervisor

GAUGES_EVERY_S = 1.0


async def watch(
    supervisor: Supervisor,
    engine: AsyncEngine,
    metrics: Metrics,
    journal: DurableJournal | MemoryJournal,
) -> None:
    """Keep replicas there, and the gauges up to date."""
    try:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(journal.watch())
            tasks.create_task(supervisor.run())
            tasks.create_task(_publish(engine, supervisor, metrics))
    except BaseExceptionGroup as group:
        for error in group.exceptions:
            if isinstance(error, JournalLost):
                raise error from None
        raise


async def _publish(engine: AsyncEngine, supervisor: Supervisor, metrics: Metrics) -> None:
    while True:
        metrics.set_ranks(supervisor.ranks_missing, supervisor.spares)
        loads = []
        for handle in engine.replicas:
            stats = handle.replica.stats()
            metrics.set_replica(handle.replica_id, stats)
            loads.append((stats, handle.places))
        metrics.set_desired(desired_replicas(loads, engine.homeless))
        await asyncio.sleep(GAUGES_EVERY_S)


async def cancelled(task: asyncio.Task[None]) -> None:
    """End a task, and wait for its end."""
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
