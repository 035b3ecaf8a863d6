"""The composition root: the only place where the parts of a cluster are put together."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass

from rich.console import Console

from phalanx.protos.errors import ConfigError
from phalanx.protos.failpoints import Failpoints, failpoints

from .cluster.ray_cluster import Device, RayCluster
from .cluster.ray_fleet import RayFleet, ray_fleet, strategy
from .cluster.recovery import Desired
from .cluster.sizing import plan_unplaced
from .cluster.spares import SparePool
from .config import ClusterConfig
from .engine import AsyncEngine
from .failing import FailingJournal, failing_start
from .journal.choosing import open_journal
from .journal.file import Sync
from .journal.memory import MemoryJournal
from .journal.writer import DurableJournal
from .metrics import Metrics, MetricsServer
from .model import ServedModel, resolve_model
from .openai.host import OpenAIHost
from .page.figures import Figures
from .page.start import start_page
from .page.state import EngineCluster
from .ports import check_free
from .quotas import MeteredEngine
from .server.host import GrpcHost
from .server.listeners import Listener
from .server.service import InferenceService
from .starting import ReplicaStarter
from .supervisor import Supervisor
from .tenants import Tenants, read_tenants
from .tracing.setup import start_tracing, with_endpoint
from .tracing.steps import trace_step
from .units import split_address
from .vllm.service import load_messages
from .watching import cancelled, watch

DRAIN_S = 30.0
JOURNAL_WAIT_S = 5.0
"""For a controller that is just ending to let go of its journal."""


class RunningCluster:
    """A cluster that answers on `address`; end it with `stop`."""

    def __init__(
        self,
        stack: AsyncExitStack,
        watching: asyncio.Task[None],
        service: InferenceService,
        supervisor: Supervisor,
        address: str,
        metrics_address: str | None,
        openai_url: str | None,
        page_url: str | None = None,
    ) -> None:
        self._stack, self._watching = stack, watching
        self._service, self._supervisor = service, supervisor
        self.address, self.metrics_address = address, metrics_address
        self.openai_url, self.page_url = openai_url, page_url

    async def wait(self) -> None:
        """Return never, as lost replicas are started again; raises what ended that, a defect."""
        await asyncio.shield(self._watching)

    def restart(self) -> None:
        """Replace every replica, one after the other; running requests go on."""
        self._supervisor.restart_all()

    async def stop(self, drain_s: float = DRAIN_S) -> None:
        """Stop taking requests, let running ones finish for `drain_s` seconds over all fronts,
        then end everything. Ranks that are lost meanwhile are replaced. What has not finished is
        left to the journal, where there is one."""
        await self._service.drain(drain_s)
        await self._stack.aclose()


async def start_cluster(
    config: ClusterConfig, *, progress: Console | None = None
) -> RunningCluster:
    """Start everything that `config` asks for; returns when canary tokens came back.

    progress: where to show what is going on. Raises `ConfigError`, `ModelError` or `GroupLost`,
    with nothing left running.
    """
    if config.vllm_protocol:
        load_messages()  # a package that is missing is told before anything starts
    logging.getLogger("phalanx").setLevel(config.log_level.upper())
    config = with_endpoint(config)
    async with AsyncExitStack() as stack:
        served = await asyncio.to_thread(
            resolve_model, config.model, config.max_context, config.chat_template
        )
        plan_unplaced(config, served)
        _check_ports(config)
        tenants = read_tenants(config.tenants_file)
        metrics = Metrics()
        figures = None if config.page is None else Figures(metrics)
        observer = figures or metrics
        say = _silent if progress is None else progress.print
        journal = await _open_journal(config, metrics, say, stack, failpoints())
        engine, starter, supervisor = await _start_replicas(
            config, served, tenants, metrics, observer, stack, progress
        )
        if isinstance(journal, DurableJournal):
            journal.adopt(starter.identity)
        service = InferenceService(
            MeteredEngine(engine, tenants, metrics),
            served,
            observer,
            dtype=starter.dtype,
            journal=journal,
            grace_s=config.resume_grace_s,
            tool_parser=config.tool_parser,
            tracing=start_tracing(config, served.name, stack),
        )
        recovered = service.recover()
        metrics.on_recovered(recovered)
        if recovered and progress is not None:
            progress.print(f"took up {recovered} unfinished requests from the journal")
        fronts = await _start_fronts(config, service, supervisor, stack)
        page = None
        if figures is not None:
            page = await start_page(config, service, EngineCluster(engine), figures, stack)
        scraped = None
        if config.metrics_port is not None:
            scraped = _serve_metrics(config, service, metrics, stack)
        fronts.set_serving(engine.serving)
        engine.on_serving = fronts.set_serving
        watching = asyncio.create_task(watch(supervisor, engine, metrics, journal))
        stack.push_async_callback(cancelled, watching)
        address, urls = fronts.grpc.address, (fronts.openai_url, page.url if page else None)
        return RunningCluster(
            stack.pop_all(), watching, service, supervisor, address, scraped, *urls
        )


@dataclass(frozen=True)
class _Fronts:
    """What requests come through."""

    service: InferenceService
    grpc: GrpcHost
    openai: OpenAIHost | None

    @property
    def openai_url(self) -> str | None:
        return None if self.openai is None else self.openai.url

    def set_serving(self, serving: bool) -> None:
        """What health checks are told."""
        serving = serving and not self.service.draining
        self.grpc.set_serving(serving)
        if self.openai is not None:
            self.openai.set_serving(serving)


async def _start_fronts(
    config: ClusterConfig,
    service: InferenceService,
    supervisor: Supervisor,
    stack: AsyncExitStack,
) -> _Fronts:
    openai = None if config.openai_port is None else await _start_openai(config, service, stack)
    return _Fronts(service, await _start_host(config, service, supervisor, stack), openai)


async def _start_replicas(
    config: ClusterConfig,
    served: ServedModel,
    tenants: Tenants,
    metrics: Metrics,
    observer: Metrics | Figures,
    stack: AsyncExitStack,
    progress: Console | None,
) -> tuple[AsyncEngine, ReplicaStarter, Supervisor]:
    """Ray, and on it every replica, each of which has given a token."""
    ranks = config.ranks_per_replica * config.num_replicas
    most = config.ranks_per_replica * config.most_replicas
    standing = config.ranks_per_replica * config.spares
    verbose = config.log_level == "debug"
    ray = await asyncio.to_thread(RayCluster, config.ray_address, most + standing, verbose=verbose)
    stack.push_async_callback(asyncio.to_thread, ray.close)
    least = ranks if config.min_tp is None else ranks // config.tp * config.min_tp
    device = ray.device(config.device, least)
    engine = AsyncEngine(
        served.spec,
        config.num_replicas,
        max_held=config.max_queued,
        prefill=config.prefill_replicas or 0,
        rebalance=config.rebalance,
        copy_prefixes=config.copy_prefixes,
        on_move=metrics.on_move,
    )
    make_fleet = functools.partial(ray_fleet, gone=ray.watch.gone, removals=ray.removals)
    spares = SparePool(lambda: make_fleet(config, device), served.checkpoint)
    starter = ReplicaStarter(
        *(config, served, device, engine, observer, progress, make_fleet, _taker(spares), tenants),
        trace_step=None if config.trace_endpoint is None else trace_step,
    )
    points = failpoints()
    start = starter.start if points is None else failing_start(points, starter.start)
    supervisor = Supervisor(
        engine,
        config.num_replicas,
        start,
        _desired(config),
        lambda: ray.free(device),
        spares if config.spares else None,
        max_replicas=config.max_replicas,
        ask_for=_asker(config, ray, device),
    )
    supervisor.on_failure = metrics.on_group_lost
    stack.push_async_callback(supervisor.close)
    await supervisor.start_all(min_tp=config.min_tp)
    return engine, starter, supervisor


def _taker(spares: SparePool) -> Callable[[bool], RayFleet | None]:
    def take(fits: bool) -> RayFleet | None:
        if fits:
            return spares.take(RayFleet)
        spares.clear()
        return None

    return take


def _asker(config: ClusterConfig, ray: RayCluster, device: Device) -> Callable[[int], None]:
    """Nobody is asked for more than an embedded instance has, which does not grow."""
    if config.ray_address is None:
        return lambda replicas: None
    each, spares = config.ranks_per_replica, config.spares
    return lambda replicas: ray.ask_for(each * (replicas + spares), device)


def _desired(config: ClusterConfig) -> Desired:
    return Desired(
        tp=config.tp,
        pp=config.pp,
        min_tp=config.min_tp or 1,
        placement=strategy(config.placement, config.pp),
        shrink_after_s=config.shrink_after_s,
        spares=config.spares,
    )


def _check_ports(config: ClusterConfig) -> None:
    """A port that is taken is found now, not when ranks have loaded."""
    check_free("host", config.host, config.port)
    if config.openai_port is not None:
        check_free("openai_host", config.openai_host, config.openai_port)
    if page := split_address(config.page or ""):
        check_free("page", *page)
    if config.metrics_port is not None:
        check_free("metrics_host", config.metrics_host, config.metrics_port)


def _silent(text: str) -> None:
    """Nobody wants to know."""


async def _open_journal(
    config: ClusterConfig,
    metrics: Metrics,
    say: Callable[[str], None],
    stack: AsyncExitStack,
    points: Failpoints | None,
) -> DurableJournal | MemoryJournal:
    """Opened before anything is started: a journal of somebody else's is refused at once."""
    sync: Sync = "full" if config.journal_sync == "full" else "normal"
    choose = functools.partial(open_journal, sync=sync, wait_s=JOURNAL_WAIT_S, say=say)
    file = await asyncio.to_thread(choose, config.journal, config.port)
    if file is None:
        return MemoryJournal(keep_s=config.journal_keep_s, keep_bytes=config.journal_keep_bytes)
    make = DurableJournal if points is None else functools.partial(FailingJournal, points)
    journal = make(
        file,
        keep_s=config.journal_keep_s,
        keep_bytes=config.journal_keep_bytes,
        on_commit=metrics.on_commit,
    )
    stack.push_async_callback(journal.close)
    return journal


async def _start_host(
    config: ClusterConfig,
    service: InferenceService,
    supervisor: Supervisor,
    stack: AsyncExitStack,
) -> GrpcHost:
    host = GrpcHost(
        service,
        host=config.host,
        port=config.port,
        tls_cert=config.tls_cert,
        tls_key=config.tls_key,
        tls_client_ca=config.tls_client_ca,
        token_file=config.token_file,
        insecure=config.insecure,
        reflection=config.reflection,
        operators=[name.strip() for name in config.operators.split(",")],
        restart=supervisor.restart_all,
        scale=supervisor.scale,
        vllm_protocol=config.vllm_protocol,
    )
    await host.start()
    service.listeners.append(host.listener)
    service.on_drain.append(lambda: host.set_serving(False))
    stack.push_async_callback(host.stop, 0.0)
    return host


async def _start_openai(
    config: ClusterConfig, service: InferenceService, stack: AsyncExitStack
) -> OpenAIHost:
    host = OpenAIHost(
        service,
        host=config.openai_host,
        port=config.openai_port or 0,
        tls_cert=config.tls_cert,
        tls_key=config.tls_key,
        tls_client_ca=config.tls_client_ca,
        token_file=config.token_file,
        insecure=config.insecure,
    )
    await host.start()
    service.listeners.append(host.listener)
    service.on_drain.append(lambda: host.set_serving(False))
    stack.push_async_callback(host.stop, 0.0)
    return host


def _serve_metrics(
    config: ClusterConfig, service: InferenceService, metrics: Metrics, stack: AsyncExitStack
) -> str:
    port = config.metrics_port or 0
    locks: dict[str, str | None] = {}
    if config.metrics_needs_tls:
        locks = {
            "tls_cert": config.tls_cert,
            "tls_key": config.tls_key,
            "tls_client_ca": config.tls_client_ca,
        }
    try:
        server: MetricsServer = metrics.serve(config.metrics_host, port, **locks)
    except OSError as error:
        raise ConfigError(
            f"metrics_host {config.metrics_host!r}, metrics_port {port}: cannot be bound: "
            f"{error.strerror}"
        ) from None
    stack.callback(server.close)
    tls, auth = ("mutual", "certificate") if config.metrics_needs_tls else ("off", "none")
    service.listeners.append(Listener(server.address, "HTTP: Prometheus", tls, auth))
    return server.address
