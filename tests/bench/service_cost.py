"""What the service costs: CPU time a token of the server and of its client, of many streams.

    python tests/bench/service_cost.py
    python tests/bench/service_cost.py --streams 64 --step-ms 50 --journal

The whole service over loopback as it is: client, gRPC, sessions, engine, scheduler, step loop. Only
the ranks are played: a step takes `--step-ms` and gives every stream a token. CPU seconds, unlike
tokens per second, stay nearly the same on a machine that others use too; what is compared runs side
by side. `step loop` is the part of the server's that schedules and updates, by its thread's own clock.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import multiprocessing
import random
import tempfile
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

import numpy as np
from rich.console import Console
from rich.table import Table

from phalanx.controller.client import AsyncClient
from phalanx.controller.cluster.fleet import Fleet
from phalanx.controller.engine import AsyncEngine
from phalanx.controller.garbage import settle
from phalanx.controller.handle import ReplicaHandle
from phalanx.controller.journal.file import JournalFile
from phalanx.controller.journal.writer import DurableJournal
from phalanx.controller.kvcache.manager import KVCacheManager
from phalanx.controller.metrics import Metrics
from phalanx.controller.model import resolve_model
from phalanx.controller.quotas import MeteredEngine
from phalanx.controller.replica import Replica
from phalanx.controller.routing.pace import PaceMeter
from phalanx.controller.scheduling.request import TokenEvent
from phalanx.controller.scheduling.scheduler import Scheduler, SchedulerConfig
from phalanx.controller.server.host import GrpcHost
from phalanx.controller.server.service import InferenceService
from phalanx.controller.tenants import Tenants
from phalanx.protos.steps import SampledToken, StepPlan, StepResult

PROMPT_TOKENS = 128
BLOCK = 16


class PlayedFleet:
    """A rank that takes `step_s` for a step, whatever is in it."""

    exchange = None

    def __init__(self, step_s: float) -> None:
        self._step_s, self._free = step_s, 0.0
        self._left: dict[int, int] = {}
        self._plans: deque[tuple[float, StepPlan]] = deque()

    def send(self, plan: StepPlan) -> None:
        """Begin it when the one before is done."""
        self._free = max(self._free, time.perf_counter()) + self._step_s
        self._plans.append((self._free, plan))

    def receive(self, timeout_s: float) -> StepResult:
        """Wait for the oldest, and sample."""
        due, plan = self._plans.popleft()
        time.sleep(max(due - time.perf_counter(), 0.0))
        for new in plan.new:
            self._left[new.seq] = len(new.token_ids) - new.num_computed
        sampled = []
        for row in plan.rows:
            self._left[row.seq] -= row.num_new
            if not self._left[row.seq]:
                self._left[row.seq] = 1
                sampled.append(SampledToken(row.seq, 1000 + 37 * row.seq % 20_000))
        return StepResult(plan.epoch, plan.step, sampled, execute_s=self._step_s)

    def check(self) -> None:
        """It never dies."""

    def stop(self, *, at_once: bool = False) -> None:
        """There is nothing to end."""


class Timed(Replica):
    """Notes what its thread has computed."""

    seconds = 0.0

    def _hand_over(self, events: list[TokenEvent]) -> None:
        super()._hand_over(events)
        self.seconds = time.thread_time()


@contextlib.asynccontextmanager
async def serving(
    streams: int, step_s: float, journal: str | None
) -> AsyncIterator[tuple[str, Timed]]:
    """Address and step loop of a server whose ranks are played."""
    model = resolve_model("smollm2")
    metrics = Metrics()
    engine = AsyncEngine(model.spec, 1)
    cache = KVCacheManager(streams * 64, BLOCK, namespace=b"played")
    limits = SchedulerConfig(
        max_tokens_per_step=8192,
        max_running=streams,
        max_queued=streams,
        max_context=BLOCK * 64,
        eos_token_ids=(),
    )
    meter = PaceMeter(metrics)
    replica = Timed(
        Scheduler(limits, cache, 0),
        cast("Fleet", PlayedFleet(step_s)),
        engine.sink,
        max_in_flight=2,
        step_timeout_s=60.0,
        observer=meter,
        on_lost=lambda error: engine.lost(handle, error),
    )
    handle = ReplicaHandle(0, replica, [], BLOCK, meter=meter, places=streams)
    replica.start()
    await engine.adopt(handle)
    kept = None
    if journal is not None:
        kept = DurableJournal(
            JournalFile(Path(journal), sync="normal"), keep_s=60, keep_bytes=2**28
        )
        kept.adopt("played")
    metered = MeteredEngine(engine, Tenants(), metrics)
    service = InferenceService(metered, model, metrics, dtype="bfloat16", journal=kept)
    host = GrpcHost(service)
    await host.start()
    host.set_serving(True)
    settle()
    yield host.address, replica
    await host.stop(0.0)
    if kept is not None:
        await kept.close()
    await asyncio.to_thread(replica.stop)


def serve(pipe: Connection, streams: int, step_s: float, journal: str | None) -> None:
    """The server's process: says its address, then at every word what its CPU time is."""

    async def run() -> None:
        async with serving(streams, step_s, journal) as (address, replica):
            pipe.send(address)
            while await asyncio.to_thread(pipe.recv):
                pipe.send((time.process_time(), replica.seconds))

    asyncio.run(run())


async def ask(client: AsyncClient, tokens: int, interval_s: float, gaps: list[float]) -> int:
    """Read one stream; returns how many messages it took."""
    prompt = [random.randrange(100, 40_000) for _ in range(PROMPT_TOKENS)]
    count = messages = 0
    last = None
    asked = {"max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    if interval_s:
        asked["stream_interval_s"] = interval_s
    async for message in client.generate(prompt, **asked):
        messages += 1
        now = time.perf_counter()
        if last is not None:
            gaps.append(now - last)
        last = now
        count += sum(len(sample.token_ids) for sample in message.samples)
    if count != tokens:
        raise RuntimeError(f"{count} tokens came, {tokens} were asked for")
    return messages


async def measure(pipe: Connection, options: argparse.Namespace, table: Table) -> None:
    """One line of the table per round."""
    async with AsyncClient(address=pipe.recv()) as client:
        await client.wait_ready()

        def clocks() -> np.ndarray[Any, Any]:
            pipe.send(True)
            return np.array([*pipe.recv(), time.process_time()])

        await asyncio.gather(*(ask(client, 8, 0.0, []) for _ in range(options.streams)))
        for number in range(options.rounds):
            gaps: list[float] = []
            before = clocks()
            asked = [
                ask(client, options.tokens, options.interval_ms / 1000, gaps)
                for _ in range(options.streams)
            ]
            messages = sum(await asyncio.gather(*asked))
            spent = clocks() - before
            tokens = options.tokens * options.streams
            server, loop, ours = spent / tokens * 1e6
            times = [server - loop, loop, ours, server - loop + ours]
            row: Sequence[str] = [
                str(number),
                *(f"{time:.1f}" for time in times),
                f"{tokens / messages:.2f}",
                *(f"{np.percentile(gaps, at) * 1e3:.1f}" for at in (50, 99)),
            ]
            table.add_row(*row)
    pipe.send(False)


def burn() -> None:
    """What ranks do to caches and cores."""
    left, right = np.ones((1024, 1024), np.float32), np.ones((1024, 1024), np.float32)
    while True:
        left @ right


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--step-ms", type=float, default=50.0)
    parser.add_argument("--interval-ms", type=float, default=0.0, help="between messages, at least")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--busy", type=int, default=0, help="processes that want the cores as well")
    parser.add_argument("--journal", action="store_true", help="with a journal, in /tmp")
    options = parser.parse_args()
    table = Table(
        "round",
        *("service us", "step loop us", "client us", "service + client us"),
        *("tokens a message", "p50 ms", "p99 ms"),
    )
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        pipe, other = context.Pipe()
        journal = f"{folder}/journal" if options.journal else None
        given = other, options.streams, options.step_ms / 1000, journal
        server = context.Process(target=serve, args=given)
        busy = [context.Process(target=burn, daemon=True) for _ in range(options.busy)]
        for process in [server, *busy]:
            process.start()
        asyncio.run(measure(pipe, options, table))
        server.join()
    Console().print(table)


if __name__ == "__main__":
    main()
