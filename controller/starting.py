"""How one replica comes to be: places, sizes, ranks, scheduler, step loop."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
from collections.abc import Sequence

import msgspec
from rich.console import Console

from phalanx.protos.errors import GroupLost

from .cluster.fleet import RankFacts
from .cluster.placement import MemoryPlan
from .cluster.ray_fleet import Device, RayFleet
from .cluster.sizing import size_group
from .config import ClusterConfig
from .engine import AsyncEngine
from .handle import ReplicaHandle
from .kvcache.changes import PrefixUpdate
from .kvcache.manager import KVCacheManager
from .loading import LoadingDisplay
from .model import ServedModel
from .observing import Observer
from .replica import Replica
from .routing.pace import PaceMeter
from .scheduling.request import TokenEvent
from .scheduling.scheduler import Scheduler, SchedulerConfig


class ReplicaStarter:
    """Starts replicas of one model in one Ray cluster, the first time and again."""

    def __init__(
        self,
        config: ClusterConfig,
        served: ServedModel,
        device: Device,
        engine: AsyncEngine,
        observer: Observer,
        console: Console | None,
    ) -> None:
        self._config, self._served, self._device = config, served, device
        self._engine, self._observer, self._console = engine, observer, console

    @property
    def dtype(self) -> str:
        """The number format in use; "auto" until a replica has started."""
        return self._config.dtype

    @property
    def identity(self) -> str:
        """Of what makes tokens: the model and its number formats, as far as they are known here."""
        config, served = self._config, self._served
        shape = hashlib.sha256(msgspec.msgpack.encode(served.spec)).hexdigest()[:16]
        return f"{served.name}:{shape}:{config.dtype}:{config.kv_dtype}"

    async def start(self, index: int, epoch: int) -> ReplicaHandle:
        """A replica for slot `index` whose loop runs. Raises `ConfigError`, `ModelError` or
        `GroupLost`, leaving nothing behind."""
        with LoadingDisplay(self._console, f"replica-{index}") as display:
            fleet, facts, memory = await asyncio.to_thread(self._start_group, epoch, display)
            display.account(facts, memory)
        config, meter = self._config, PaceMeter(self._observer)
        cache = self._make_cache(memory)
        if config.replicas > 1:
            cache.track_changes(epoch)

        def on_lost(error: GroupLost) -> None:
            self._engine.lost(handle, error)

        def on_prefixes(events: Sequence[TokenEvent], update: PrefixUpdate) -> None:
            self._engine.prefix_sink(handle, events, update)

        replica = Replica(
            self._make_scheduler(cache, epoch),
            fleet,
            self._engine.sink,
            max_in_flight=config.plans_in_flight,
            step_timeout_s=config.step_timeout_s,
            observer=meter,
            on_lost=on_lost,
            prefix_sink=on_prefixes,
        )
        handle = ReplicaHandle(
            index,
            replica,
            facts,
            config.block_size,
            namespace=cache.naming.namespace,
            meter=meter,
            places=config.max_running,
            num_stages=config.pp,
        )
        replica.start()
        return handle

    def _start_group(
        self, epoch: int, display: LoadingDisplay
    ) -> tuple[RayFleet, list[RankFacts], MemoryPlan]:
        """Reserve places, size the cache for them, load."""
        config = self._config
        fleet = RayFleet(
            config.tp,
            config.pp,
            self._device,
            placement=config.placement,
            collectives=config.collectives,
            threads=config.threads,
            replicas=config.replicas,
            start_timeout_s=config.start_timeout_s,
            step_timeout_s=config.step_timeout_s,
            silence_timeout_s=config.silence_timeout_s,
        )
        try:
            nodes = fleet.reserve()
            spec, memory = size_group(config, self._served, self._device, nodes, epoch=epoch)
            facts = fleet.start(spec, display.progress)
        except BaseException:
            fleet.stop(at_once=True)
            raise
        # all replicas, and those that come later, must give the same tokens
        self._config = dataclasses.replace(config, dtype=spec.dtype, kv_dtype=spec.cache.dtype)
        return fleet, facts, memory

    def _make_cache(self, memory: MemoryPlan) -> KVCacheManager:
        config = self._config
        return KVCacheManager(
            memory.cache.num_blocks,
            memory.cache.block_size,
            prefix_caching=config.prefix_caching,
            namespace=f"{self._served.checkpoint}:{config.dtype}:{config.kv_dtype}".encode(),
        )

    def _make_scheduler(self, cache: KVCacheManager, epoch: int) -> Scheduler:
        config, served = self._config, self._served
        limits = SchedulerConfig(
            max_tokens_per_step=config.max_tokens_per_step,
            max_running=config.max_running,
            max_queued=config.max_queued,
            max_context=served.max_context,
            eos_token_ids=served.eos_token_ids,
            max_in_flight=config.plans_in_flight,
            prefix_caching=config.prefix_caching,
        )
        return Scheduler(limits, cache, epoch)
