"""How one replica comes to be: places, sizes, ranks, scheduler, step loop."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import Literal, Protocol

import msgspec
from rich.console import Console

from phalanx.protos.errors import GroupLost
from phalanx.protos.failpoints import failpoints
from phalanx.protos.specs import DecoderSpec, TierSpec

from .cluster.fleet import Fleet, RankFacts
from .cluster.placement import MemoryPlan
from .cluster.sizing import Node, plan_tiers, size_group
from .config import ClusterConfig
from .failing import FailingCache
from .handle import ReplicaHandle
from .kvcache.changes import PrefixUpdate
from .kvcache.manager import KVCacheManager
from .kvcache.opening import open_tiers
from .kvcache.rates import MoveRates
from .kvcache.tiers import LowerTiers
from .loading import LoadingDisplay
from .model import ServedModel
from .observing import Observer
from .replica import Replica, TraceStep
from .routing.pace import PaceMeter
from .scheduling.request import TokenEvent
from .scheduling.scheduler import Scheduler, SchedulerConfig
from .tenants import Tenants

Device = Literal["cpu", "cuda"]
ATTENTION_SPEED = 2 / 3
"""Of that of the products with weights, as prompts of 128 and 4,096 tokens show on CPUs."""


class PlacedFleet(Fleet, Protocol):
    """A fleet that first takes its places and then starts."""

    def reserve(self) -> Sequence[Node]:
        """Take the places and look around in them, one entry a rank."""


MakeFleet = Callable[[ClusterConfig, Device], PlacedFleet]


class Listener(Protocol):
    """Who hears of what replicas do; `AsyncEngine` is one. Called on the step loops' threads."""

    def sink(self, events: Sequence[TokenEvent]) -> None:
        """Events of a step."""

    def prefix_sink(
        self, handle: ReplicaHandle, events: Sequence[TokenEvent], update: PrefixUpdate
    ) -> None:
        """Events of a step after which the replica's cached prefixes are others."""

    def lost(self, handle: ReplicaHandle, error: GroupLost) -> None:
        """A replica is gone."""


class ReplicaStarter:
    """Starts replicas of one model, the first time and again, on fleets that `make_fleet` makes."""

    def __init__(
        self,
        config: ClusterConfig,
        served: ServedModel,
        device: Device,
        listener: Listener,
        observer: Observer,
        console: Console | None,
        make_fleet: MakeFleet,
        take_spare: Callable[[bool], PlacedFleet | None] = lambda fits: None,
        tenants: Tenants | None = None,
        trace_step: TraceStep | None = None,
    ) -> None:
        """take_spare: a fleet that stands by, if there is one; not fits: all spares give up their
        places, as a group of another size is to start."""
        self._config, self._served, self._device = config, served, device
        self._listener, self._observer, self._console = listener, observer, console
        self._make_fleet, self._take_spare = make_fleet, take_spare
        self._tenants = tenants or Tenants()
        self._trace_step = trace_step

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

    async def start(self, index: int, epoch: int, tp: int | None = None) -> ReplicaHandle:
        """A replica for slot `index` whose loop runs, of `tp` ranks a stage; None: as configured.
        Raises `ConfigError`, `ModelError` or `GroupLost`, leaving nothing behind."""
        with LoadingDisplay(self._console, f"replica-{index}") as display:
            start = functools.partial(
                self._start_group, index, epoch, tp or self._config.tp, display
            )
            fleet, facts, memory, tiers = await asyncio.to_thread(start)
            display.account(facts, memory)
        config = self._config
        cache = self._make_cache(
            memory, None if tiers is None else open_tiers(tiers, facts, memory.cache)
        )
        meter = PaceMeter(self._observer, None if cache.loads is None else cache.loads.rates)
        if config.most_replicas > 1:
            cache.track_changes(epoch)

        def on_lost(error: GroupLost) -> None:
            self._listener.lost(handle, error)

        def on_prefixes(events: Sequence[TokenEvent], update: PrefixUpdate) -> None:
            self._listener.prefix_sink(handle, events, update)

        replica = Replica(
            self._make_scheduler(cache, epoch),
            fleet,
            self._listener.sink,
            max_in_flight=config.plans_in_flight,
            step_timeout_s=config.step_timeout_s,
            observer=meter,
            on_lost=on_lost,
            prefix_sink=on_prefixes,
            trace_step=self._trace_step,
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
        self, index: int, epoch: int, tp: int, display: LoadingDisplay
    ) -> tuple[PlacedFleet, list[RankFacts], MemoryPlan, TierSpec | None]:
        """Reserve places, size the cache for them, load."""
        config = self._config
        if tp != config.tp:
            config = dataclasses.replace(config, tp=tp, min_tp=None)
        fleet = self._take_spare(tp == self._config.tp) or self._make_fleet(config, self._device)
        try:
            nodes = fleet.reserve()
            spec, memory = size_group(config, self._served, self._device, nodes, epoch=epoch)
            spec = msgspec.structs.replace(
                spec, tiers=plan_tiers(config, self._served, memory, index)
            )
            facts = fleet.start(spec, display.progress)
        except BaseException:
            fleet.stop(at_once=True)
            raise
        # all replicas, and those that come later, must give the same tokens
        self._config = dataclasses.replace(
            self._config, dtype=spec.dtype, kv_dtype=spec.cache.dtype
        )
        return fleet, facts, memory, spec.tiers

    def _make_cache(self, memory: MemoryPlan, tiers: LowerTiers | None) -> KVCacheManager:
        config = self._config
        block_bytes = max(rank.kv_per_token for rank in memory.ranks) * memory.cache.block_size
        make: Callable[..., KVCacheManager] = KVCacheManager
        if (points := failpoints()) is not None:
            make = functools.partial(FailingCache, points)
        return make(
            memory.cache.num_blocks,
            memory.cache.block_size,
            prefix_caching=config.prefix_caching,
            num_states=memory.cache.num_states,
            state_stride=config.state_stride or 0,
            tiers=tiers,
            rates=None if tiers is None else MoveRates(memory.cache.block_size, block_bytes),
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
            attention_reach=attention_reach(served.spec),
            num_stages=config.pp,
            prefix_caching=config.prefix_caching,
            max_bypass=config.max_bypass,
            aging_s=config.aging_s,
            tenants=self._tenants,
        )
        return Scheduler(limits, cache, epoch)


def attention_reach(model: DecoderSpec) -> float | None:
    """Position at which a token's attention takes as long as its products with weights; None
    where that is not known, or attention reaches a window only."""
    if model.experts or model.latent or model.state or any(model.windows):
        return None
    heads = model.num_heads * model.head_dim
    cached = model.num_kv_heads * model.head_dim
    widths = (3 if model.gated_mlp else 2) * model.intermediate_size + 2 * heads + 2 * cached
    return ATTENTION_SPEED * model.hidden_size * widths / (2 * heads)
