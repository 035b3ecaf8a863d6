"""Groups of ranks that exchange blocks: threads of this process, and processes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import pytest

LOOPBACK = "127.0.0.1"


def _main(group: Any, stage: Any) -> Callable[[Any, Any], None]:
    from phalanx.kernels.select import select_backend
    from phalanx.workers.engine import Engine
    from phalanx.workers.serve import serve_rank

    def build(spec: Any) -> Engine:
        return Engine(spec, group, select_backend("cpu")[0], pipeline=stage)

    return lambda address, hello: serve_rank(address, hello, build, exchange_host=LOOPBACK)


def _mains(tp: int, pp: int) -> list[Callable[[Any, Any], None]]:
    from phalanx.workers.parallel import SingleRank, ThreadRank
    from phalanx.workers.pipeline import ThreadStage

    lanes = [ThreadStage.pipeline(pp) for _ in range(tp)]
    mains = []
    for index in range(pp):
        groups: Any = [SingleRank()] if tp == 1 else ThreadRank.group(tp)
        mains += [_main(group, lanes[place][index]) for place, group in enumerate(groups)]
    return mains


def _spec(name: str, tp: int, pp: int, epoch: int, **sizes: Any) -> Any:
    from phalanx.controller.model import resolve_model
    from phalanx.protos.specs import CacheSpec, WorkerSpec

    model = resolve_model(name)
    return WorkerSpec(
        checkpoint=model.checkpoint,
        model=model.spec,
        dtype="float32",
        tp_size=tp,
        pp_size=pp,
        cache=CacheSpec(
            block_size=sizes.get("block_size", 4),
            num_blocks=sizes.get("num_blocks", 16),
            dtype=sizes.get("kv_dtype", "float32"),
        ),
        max_tokens_per_step=64,
        max_running=sizes.get("max_running", 8),
        eos_token_ids=model.eos_token_ids,
        device="cpu",
        epoch=epoch,
        tokenizer=model.tokenizer.to_str(),
    )


def _fleet(tp: int, pp: int, *, processes: bool) -> Any:
    if not processes:
        from phalanx.controller.cluster.local_fleet import LocalFleet

        return LocalFleet(_mains(tp, pp))
    from phalanx.controller.cluster.process_fleet import ProcessFleet

    fleet = ProcessFleet(
        tp,
        collectives="auto",
        threads=1,
        start_timeout_s=120,
        step_timeout_s=60,
        silence_timeout_s=30,
        exchange=True,
    )
    fleet.reserve()
    return fleet


@pytest.fixture
def group_of(one_thread: None) -> Iterator[Callable[..., Any]]:
    """`group_of(model, tp, pp=1, epoch=0, **sizes)`: a started `LocalFleet`.

    sizes: block_size (4), num_blocks (16), kv_dtype.
    """
    with ExitStack() as stack:

        def make(name: str, tp: int, pp: int = 1, epoch: int = 0, **sizes: Any) -> Any:
            fleet = _fleet(tp, pp, processes=False)
            stack.callback(fleet.stop)
            fleet.start(_spec(name, tp, pp, epoch, **sizes), lambda rank, done, total: None)
            return fleet

        yield make


@dataclass
class Read:
    """What a reader got: the tokens of each sample, at their places, and how each ended."""

    tokens: dict[int, list[int]] = field(default_factory=dict)
    finishes: list[Any] = field(default_factory=list)
    cached: int = 0

    def take(self, event: Any) -> None:
        tokens = self.tokens.setdefault(event.sample_index, [])
        assert event.first_index == len(tokens), "a token was lost or came twice"
        tokens += [token.token_id for token in event.tokens]
        self.finishes += [event.finish] if event.finish is not None else []
        self.cached += event.cached_prompt_tokens


class Scene:
    """An engine over replicas of any cuts, and readers of its streams."""

    def __init__(self, engine: Any, stack: ExitStack, name: str, sizes: dict[str, Any]) -> None:
        self.engine, self._stack, self._name, self._sizes = engine, stack, name, sizes
        self.schedulers: dict[int, Any] = {}
        self.handles: dict[int, Any] = {}
        self.fleets: dict[int, Any] = {}

    async def start(
        self,
        index: int,
        tp: int,
        pp: int = 1,
        *,
        processes: bool = False,
        joins: bool = True,
        **changes: Any,
    ) -> None:
        """Make a replica, and add it unless it `joins` later, by `join`."""
        from phalanx.controller.handle import ReplicaHandle
        from phalanx.controller.kvcache.manager import KVCacheManager
        from phalanx.controller.observing import Silent
        from phalanx.controller.replica import Replica
        from phalanx.controller.routing.pace import PaceMeter
        from phalanx.controller.scheduling.scheduler import Scheduler, SchedulerConfig

        sizes, epoch = self._sizes | changes, index + 1
        spec = _spec(self._name, tp, pp, epoch, **sizes)
        fleet = _fleet(tp, pp, processes=processes)
        self._stack.callback(fleet.stop, at_once=True)
        facts = await asyncio.to_thread(fleet.start, spec, lambda rank, done, total: None)
        cache = KVCacheManager(spec.cache.num_blocks, spec.cache.block_size)
        cache.track_changes(epoch)
        config = SchedulerConfig(
            max_tokens_per_step=64,
            max_running=spec.max_running,
            max_queued=1024,
            max_context=spec.model.max_context,
            eos_token_ids=spec.eos_token_ids,
            reserve_tokens=16,
        )
        scheduler = self.schedulers[index] = Scheduler(config, cache, epoch)
        meter = PaceMeter(Silent())
        replica = Replica(
            scheduler,
            fleet,
            self.engine.sink,
            max_in_flight=2,
            step_timeout_s=60,
            observer=meter,
            on_lost=lambda error: self.engine.lost(handle, error),
            prefix_sink=lambda events, update: self.engine.prefix_sink(handle, events, update),
        )
        handle = ReplicaHandle(
            index,
            replica,
            facts,
            spec.cache.block_size,
            meter=meter,
            places=spec.max_running,
            num_stages=pp,
        )
        self.handles[index], self.fleets[index] = handle, fleet
        self._stack.callback(replica.stop)
        replica.start()
        if joins:
            await self.join(index)

    async def join(self, index: int) -> None:
        """Add a replica that was made."""
        await self.engine.adopt(self.handles[index])

    def ask(self, name: str, prompt: list[int], **params: Any) -> tuple[Read, Any]:
        """A reader, and the task in which it reads."""
        from phalanx.protos.sampling import SamplingParams

        read = Read()

        async def work() -> None:
            async for events in self.engine.submit(
                request_id=name,
                prompt_token_ids=prompt,
                params=SamplingParams(**({"temperature": 0.0, "ignore_eos": True} | params)),
                tenant="tests",
                deadline=None,
            ):
                for event in events:
                    read.take(event)

        return read, asyncio.create_task(work())

    def close(self, *indices: int) -> None:
        """Let replicas take nothing, as if they were not there."""
        for index in indices:
            self.engine._residents.leave(index)

    def open(self, *indices: int) -> None:
        """Let them take requests again."""
        for index in indices:
            self.engine._residents.join(self.handles[index])

    def streams_on(self, index: int) -> int:
        """How many streams run on a replica."""
        return len(self.engine._residents.of(index))

    async def until(self, condition: Callable[[], bool], timeout_s: float = 60) -> None:
        """Wait for something to be so."""
        async with asyncio.timeout(timeout_s):
            while not condition():
                await asyncio.sleep(0.002)

    async def settle(self) -> None:
        """Wait until the replicas that live hold nothing, and check their books."""
        live = [index for index, handle in self.handles.items() if handle.replica.lost is None]
        for index in live:
            scheduler = self.schedulers[index]
            await self.until(
                lambda s=scheduler: not s.has_work and not len(s.arrivals) and not len(s.departures)
            )
            await self.until(lambda s=scheduler: s.stats().blocks_free == s.stats().blocks_total)
            scheduler.check_integrity()


@pytest.fixture
def play(one_thread: None) -> Callable[..., None]:
    """`play(model, work, engine={}, **sizes)`: run `work(scene)`; replicas are started in it."""

    def run(
        name: str,
        work: Callable[[Scene], Coroutine[Any, Any, None]],
        engine: dict[str, Any] | None = None,
        **sizes: Any,
    ) -> None:
        from phalanx.controller.engine import AsyncEngine
        from phalanx.controller.model import resolve_model

        async def main() -> None:
            with ExitStack() as stack:
                made = AsyncEngine(resolve_model(name).spec, 3, **(engine or {}))
                await work(Scene(made, stack, name, {"num_blocks": 128} | sizes))

        asyncio.run(asyncio.wait_for(main(), 240))

    return run
