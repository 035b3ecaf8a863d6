"""Ranks that sample the same token for ever, and replicas made of them."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from phalanx.controller.engine import AsyncEngine
from phalanx.controller.handle import ReplicaHandle
from phalanx.controller.kvcache.manager import KVCacheManager
from phalanx.controller.observing import Silent
from phalanx.controller.replica import Replica
from phalanx.controller.routing.pace import PaceMeter
from phalanx.controller.scheduling.scheduler import Scheduler, SchedulerConfig
from phalanx.protos.errors import GroupLost
from phalanx.protos.steps import SampledToken, StepPlan, StepResult

TOKEN = 1


class EchoRank:
    """Answers plans, and counts the prompt tokens that they compute."""

    def __init__(self) -> None:
        self.prefill_tokens = 0
        self._left: dict[int, int] = {}

    def execute(self, plan: StepPlan) -> StepResult:
        for new in plan.new:
            self._left[new.seq] = len(new.token_ids) - new.num_computed
        sampled = []
        for row in plan.rows:
            self._left[row.seq] -= row.num_new
            self.prefill_tokens += row.num_new
            if not self._left[row.seq]:
                self._left[row.seq] = 1
                self.prefill_tokens -= 1
                sampled.append(SampledToken(row.seq, TOKEN))
        return StepResult(plan.epoch, plan.step, sampled)


class EchoFleet:
    """A group of one such rank, which exchanges no blocks. It can be killed."""

    exchange = None

    def __init__(self) -> None:
        self.rank, self.killed = EchoRank(), False
        self._results: queue.SimpleQueue[StepResult] = queue.SimpleQueue()

    def start(self, spec: Any, progress: Any) -> list[Any]:
        return []

    def send(self, plan: StepPlan) -> None:
        self.check()
        self._results.put(self.rank.execute(plan))

    def receive(self, timeout_s: float) -> StepResult:
        self.check()
        return self._results.get(timeout=timeout_s)

    def check(self) -> None:
        if self.killed:
            raise GroupLost("killed")

    def stop(self, *, at_once: bool = False) -> None:
        self.killed = True


def _scheduler(num_blocks: int, block_size: int, epoch: int) -> tuple[Scheduler, KVCacheManager]:
    cache = KVCacheManager(num_blocks, block_size, namespace=b"model")
    cache.track_changes(epoch)
    config = SchedulerConfig(
        max_tokens_per_step=64,
        max_running=8,
        max_queued=10_000,
        max_context=4096,
        eos_token_ids=(),
        reserve_tokens=16,
    )
    return Scheduler(config, cache, epoch), cache


@pytest.fixture
def make_scheduler() -> Callable[..., tuple[Scheduler, KVCacheManager, EchoRank]]:
    """`make_scheduler(num_blocks, block_size, epoch)`: a replica's insides without a thread."""

    def make(*sizes: int) -> tuple[Scheduler, KVCacheManager, EchoRank]:
        return (*_scheduler(*sizes), EchoRank())

    return make


@pytest.fixture
def start_replica() -> Iterator[Callable[..., tuple[ReplicaHandle, EchoFleet]]]:
    """`start_replica(engine, index, epoch)`: one whose step loop runs, not adopted yet."""
    with ExitStack() as stack:

        def start(engine: AsyncEngine, index: int, epoch: int) -> tuple[ReplicaHandle, EchoFleet]:
            scheduler, cache = _scheduler(64, 4, epoch)
            fleet, meter = EchoFleet(), PaceMeter(Silent())
            replica = Replica(
                scheduler,
                fleet,
                engine.sink,
                max_in_flight=2,
                step_timeout_s=60.0,
                observer=meter,
                on_lost=lambda error: engine.lost(handle, error),
                prefix_sink=lambda events, update: engine.prefix_sink(handle, events, update),
            )
            handle = ReplicaHandle(
                index,
                replica,
                [],
                cache.block_size,
                namespace=cache.naming.namespace,
                meter=meter,
                places=8,
            )
            stack.callback(replica.stop)
            replica.start()
            return handle, fleet

        yield start
