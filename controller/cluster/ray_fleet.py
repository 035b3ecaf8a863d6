"""A fleet of Ray actors: Ray places, starts and watches; steps travel over our own sockets."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError
from ray.util.placement_group import (
    NODE_ID_LABEL_KEY,
    PlacementGroup,
    placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from phalanx.controller.config import ClusterConfig
from phalanx.protos.errors import ConfigError, GroupLost, PhalanxError
from phalanx.protos.specs import LoadReport, WorkerSpec
from phalanx.protos.steps import StepPlan, StepResult
from phalanx.protos.wire import Hello
from phalanx.workers.actor import NodeFacts, RankActor, Rendezvous

from .deaths import oom_kills, starved
from .exchanging import ExchangingFleet
from .fleet import REASON, NoPlace, Progress, RankFacts
from .link import RankLinks
from .ray_cluster import LOOPBACK, Device
from .ray_removals import Removals

MIN_CALL_S = 10.0
STANDS_S = 2.0
REASON_S = 0.3  # Ray learns of a death about as fast as our socket does
REASON_CHARS = 300
LOOK_S = 1.0
"""Between two looks at whether nodes went while Ray waits for them."""

Gone = Callable[[], frozenset[str]]
"""Nodes that Ray takes for alive and that are not; see `ray_nodes.NodeWatch`."""


class RayFleet(ExchangingFleet):
    """`Fleet` with one actor per rank in a placement group: `reserve`, then `start`.

    Of several stages, each is one place of the group, so that its ranks share a node.
    """

    def __init__(
        self,
        tp_size: int,
        pp_size: int,
        device: Device,
        *,
        placement: str,
        collectives: str,
        threads: int | None,
        replicas: int,
        start_timeout_s: float,
        step_timeout_s: float,
        silence_timeout_s: float,
        gone: Gone = frozenset,
        removals: Removals | None = None,
    ) -> None:
        """threads: CPU threads of a rank; None divides a node's cores by the ranks that it may
        get, `replicas` times those of this fleet. gone: nodes to keep away from.
        removals: who gives its places back."""
        self._tp_size, self._pp_size, self._device = tp_size, pp_size, device
        self._placement = strategy(placement, pp_size)
        self._collectives, self._threads, self._replicas = collectives, threads, replicas
        self._start_timeout_s, self._step_timeout_s = start_timeout_s, step_timeout_s
        self._silence_timeout_s = silence_timeout_s
        self._gone, self._shunned = gone, frozenset[str]()
        self._removals = removals or Removals()
        self._group: PlacementGroup | None = None
        self._actors: list[Any] = []
        self._runs: list[ray.ObjectRef[None]] = []
        self._nodes: list[NodeFacts] = []
        self._links: RankLinks | None = None
        self._oom_kills = 0

    def reserve(self) -> list[NodeFacts]:
        """Take the places and look around in them. Raises `ConfigError` when there are none."""
        if self._actors:  # it stood by
            return self._look_around()
        each = {"CPU": 1.0} | ({"GPU": 1.0} if self._device == "cuda" else {})
        self._check_room(each)
        bundles = [each] * self._tp_size
        if self._pp_size > 1:
            stage = {name: amount * self._tp_size for name, amount in each.items()}
            bundles = [stage] * self._pp_size
        group = self._place(bundles)
        gpus = 1 if self._device == "cuda" else 0
        for rank in range(self._num_ranks):
            index = rank if self._pp_size == 1 else rank // self._tp_size
            place = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)
            self._actors.append(rank_actor(rank, place, num_cpus=1, num_gpus=gpus))
        return self._look_around()

    def _place(self, bundles: list[dict[str, float]]) -> PlacementGroup:
        """Bundles on nodes that answer. Raises `NoPlace`."""
        self._shunned = self._gone()
        elsewhere = {NODE_ID_LABEL_KEY: f"!in({','.join(sorted(self._shunned))})"}
        group = self._group = placement_group(
            bundles,
            strategy=self._placement,
            bundle_label_selector=[elsewhere] * len(bundles) if self._shunned else None,
        )
        shape = f"{self._shape} with placement {self._placement}"
        deadline = time.monotonic() + self._start_timeout_s
        while not group.wait(max(min(deadline - time.monotonic(), LOOK_S), 0)):
            if self._gone() - self._shunned:
                self.stop()
                raise NoPlace(f"{shape}: a node went while places were looked for")
            if time.monotonic() >= deadline:
                self.stop()
                raise NoPlace(
                    f"{shape}: no such place became "
                    f"free in the Ray cluster within {self._start_timeout_s:g} s; it has "
                    f"{_resources(ray.available_resources())} free"
                )
        return group

    def _look_around(self) -> list[NodeFacts]:
        self._nodes = self._call([actor.facts.remote() for actor in self._actors])
        return self._nodes

    def warm(self, checkpoint: str) -> None:
        """Let the ranks do what can be done before there is a group."""
        self._call([actor.warm.remote(checkpoint) for actor in self._actors])

    def stands(self) -> bool:
        """Whether all ranks of a fleet that is not started still answer."""
        try:
            ray.get([actor.facts.remote() for actor in self._actors], timeout=STANDS_S)
        except RayError:
            return False
        return bool(self._actors)

    @property
    def places(self) -> tuple[str, ...]:
        """The node of each rank."""
        return tuple(node.place for node in self._nodes)

    def start(self, spec: WorkerSpec, progress: Progress) -> list[RankFacts]:
        """Form the group and load."""
        self._oom_kills = oom_kills()
        local = {node.address for node in self._nodes} == {ray.util.get_node_ip_address()}
        host = LOOPBACK if local else ray.util.get_node_ip_address()
        links = self._links = RankLinks(
            self._num_ranks, spec.epoch, host, silence_timeout_s=self._silence_timeout_s
        )
        store_host = LOOPBACK if local else self._nodes[0].address
        port, alone = 0, len(ray.nodes()) == 1  # only others' ranks need more than the loopback
        if self._num_ranks > 1:
            [port] = self._call([self._actors[0].open_store.remote(store_host)])
        for rank, (actor, node) in enumerate(zip(self._actors, self._nodes, strict=True)):
            rendezvous = Rendezvous(
                host=store_host,
                port=port,
                collectives=self._resolve_collectives(),
                threads=self._threads or self._share_of_cores(node),
                timeout_s=self._step_timeout_s,
                exchange_host=LOOPBACK if alone else node.address,
            )
            hello = Hello(rank, spec.epoch, links.secret)
            self._runs.append(actor.run.remote(links.address, hello, rendezvous))
        try:
            links.accept(self._start_timeout_s, alive=self._check_alive)
            reports = self._load(links, spec, progress)
        except BaseException:
            self.stop()
            raise
        return [
            RankFacts(
                rank=report.rank,
                node=node.node,
                device=node.device,
                report=report,
                place=node.place,
            )
            for report, node in zip(reports, self._nodes, strict=True)
        ]

    def send(self, plan: StepPlan) -> None:
        """To every rank."""
        self._open().send(plan)

    def receive(self, timeout_s: float) -> StepResult:
        """From the rank that answers."""
        try:
            return self._open().receive(timeout_s)
        except GroupLost as error:
            raise self._explained(error) from error

    def _load(self, links: RankLinks, spec: WorkerSpec, progress: Progress) -> list[LoadReport]:
        try:
            return links.load(spec, progress, self._start_timeout_s)
        except GroupLost as error:
            raise self._explained(error) from error

    def check(self) -> None:
        """Raise `GroupLost` if a rank has gone."""
        try:
            self._open().check()
        except GroupLost as error:
            raise self._explained(error) from error

    def stop(self, *, at_once: bool = False) -> None:
        """Ask the ranks to end, then end them, and give the places back."""
        if self._links is not None:
            self._links.close()
        if self._runs and not at_once and ray.is_initialized():
            ray.wait(self._runs, num_returns=len(self._runs), timeout=2.0)
        for actor in self._actors:
            with contextlib.suppress(RayError):
                ray.kill(actor)
        if self._group is not None and ray.is_initialized():
            self._removals.remove(self._group)
        self._group, self._actors, self._runs = None, [], []

    @property
    def _num_ranks(self) -> int:
        return self._pp_size * self._tp_size

    @property
    def _shape(self) -> str:
        return f"tp is {self._tp_size}" + (f", pp is {self._pp_size}" if self._pp_size > 1 else "")

    def _open(self) -> RankLinks:
        if self._links is None:
            raise RuntimeError("the fleet is not started")
        return self._links

    def _check_room(self, bundle: dict[str, float]) -> None:
        """Refuse at once what the whole cluster cannot hold, busy or not."""
        total = ray.cluster_resources()
        for name, each in bundle.items():
            needed = each * self._num_ranks
            if total.get(name, 0) < needed:
                raise NoPlace(
                    f"{self._shape}, which takes {needed:g} {name}; the Ray cluster has "
                    f"{_resources(total)}"
                )

    def _share_of_cores(self, node: NodeFacts) -> int:
        neighbours = sum(other.address == node.address for other in self._nodes)
        return max(node.cpu_count // (neighbours * self._replicas), 1)

    def _resolve_collectives(self) -> str:
        stages = [
            {node.address for node in self._nodes[first : first + self._tp_size]}
            for first in range(0, self._num_ranks, self._tp_size)
        ]
        one_node = all(len(addresses) == 1 for addresses in stages)
        shared = one_node and all(node.shared_memory for node in self._nodes)
        if self._collectives == "auto":
            return "nccl" if self._device == "cuda" else "shm" if shared else "gloo"
        if self._collectives == "shm" and (not shared or self._device != "cpu"):
            raise ConfigError("collectives is 'shm', allowed for CPU ranks on one x86-64 node")
        if self._collectives == "nccl" and self._device != "cuda":
            raise ConfigError("collectives is 'nccl', allowed with device cuda")
        return self._collectives

    def _call(self, references: Sequence[Any]) -> list[Any]:
        """Results of actor calls; a dead actor, or node, is a `GroupLost`."""
        deadline = time.monotonic() + max(self._start_timeout_s, MIN_CALL_S)
        wanted = list(references)
        try:
            while (left := deadline - time.monotonic()) > 0:
                done, _ = ray.wait(wanted, num_returns=len(wanted), timeout=min(left, LOOK_S))
                if len(done) == len(wanted) or self._gone() - self._shunned:
                    break
            return list(ray.get(wanted, timeout=0.0))
        except RayError as error:
            self.stop()
            raise GroupLost(f"a rank did not start: {type(error).__name__}") from error

    def _first_end(self, timeout_s: float) -> tuple[int, Exception | None] | None:
        """A rank whose run is over, and what Ray says of it, if one ends within `timeout_s`."""
        done, _ = ray.wait(self._runs, num_returns=1, timeout=timeout_s)
        if not done:
            return None
        try:
            ray.get(done[0])
        except (RayError, PhalanxError) as error:
            return self._runs.index(done[0]), error
        return self._runs.index(done[0]), None

    def _explained(self, error: GroupLost) -> GroupLost:
        """With what Ray and the kernel know of dead ranks: their sockets only tell that they are
        gone."""
        end = self._first_end(REASON_S)
        if end is None or end[1] is None:
            return error
        words = " ".join(str(end[1]).split())
        hungry = starved(words) or oom_kills() > self._oom_kills
        cause = f"; rank {end[0]} was killed for want of memory" if hungry else ""
        text = f"{error}{cause}{REASON}rank {end[0]}: {words[:REASON_CHARS]}"
        return GroupLost(text, crashed=error.crashed or hungry)

    def _check_alive(self) -> None:
        end = self._first_end(0)
        if end is None:
            return
        rank, error = end
        if isinstance(error, RayActorError):
            raise GroupLost(f"rank {rank} died while starting") from error
        if error is not None:
            raise GroupLost(f"rank {rank} failed while starting: {error}") from error
        raise GroupLost(f"rank {rank} ended while starting")


def rank_actor(rank: int, place: Any, **resources: int) -> Any:
    """A rank's process, where Ray's scheduling strategy `place` says."""
    how: dict[str, Any] = {"max_restarts": 0, "max_concurrency": 1, **resources}
    return ray.remote(RankActor).options(scheduling_strategy=place, **how).remote(rank)


def strategy(placement: str, pp_size: int) -> str:
    """Ray's name of how ranks are laid over nodes."""
    if placement != "auto":
        return placement
    return "STRICT_PACK" if pp_size == 1 else "SPREAD"


def ray_fleet(
    config: ClusterConfig,
    device: Device,
    gone: Gone = frozenset,
    removals: Removals | None = None,
) -> RayFleet:
    """A fleet as the configuration has it. gone, removals: see `RayFleet`."""
    return RayFleet(
        config.tp,
        config.pp,
        device,
        placement=config.placement,
        collectives=config.collectives,
        threads=config.threads,
        replicas=config.most_replicas,
        start_timeout_s=config.start_timeout_s,
        step_timeout_s=config.step_timeout_s,
        silence_timeout_s=config.silence_timeout_s,
        gone=gone,
        removals=removals,
    )


def _resources(amounts: dict[str, float]) -> str:
    return f"{amounts.get('CPU', 0):g} CPU and {amounts.get('GPU', 0):g} GPU"
