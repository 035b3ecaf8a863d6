"""Prometheus metrics of a cluster: one table of names, one registry of its own.

Labels only take values from closed sets, so that no caller can grow the page.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from .kvcache.tiers import TierStats
from .movement.mover import Move
from .observing import StepTimes
from .server.security import TlsFiles, renew

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
METHODS = ("generate", "chat", "resume", "other")
OUTCOMES = (
    "stop",
    "length",
    "abort",
    "cancelled",
    "already_exists",
    "deadline_exceeded",
    "failed_precondition",
    "invalid_argument",
    "not_found",
    "permission_denied",
    "resource_exhausted",
    "unauthenticated",
    "permission_denied",
    "unavailable",
    "error",
)
QUOTAS = ("max_requests", "max_queued", "tokens_per_minute")
MOVE_OUTCOMES = tuple(
    f"{reason}_{outcome}"
    for reason in ("drain", "decode", "rebalance", "prefix")
    for outcome in ("moved", "failed")
)
PHASES = ("schedule", "execute", "update", "overhead")


@dataclass(frozen=True)
class Row:
    """One metric: its name without `phalanx_`, kind, help, label and buckets."""

    name: str
    kind: type[Counter | Gauge | Histogram]
    help: str
    label: str = ""
    buckets: tuple[float, ...] = SECONDS

    @property
    def page_name(self) -> str:
        """The name on the page: counters end in `_total` there."""
        return f"phalanx_{self.name}" + ("_total" if self.kind is Counter else "")

    def create(self, registry: CollectorRegistry) -> Any:
        """The metric, registered."""
        labels = (self.label,) if self.label else ()
        if self.kind is Histogram:
            return Histogram(
                self.page_name, self.help, labels, registry=registry, buckets=self.buckets
            )
        return self.kind(self.page_name, self.help, labels, registry=registry)


TABLE = (
    Row("requests_started", Counter, "Requests received", "method"),
    Row("requests", Counter, "Requests ended", "outcome"),
    Row("requests_open", Gauge, "Requests received and not ended"),
    Row("quota_refusals", Counter, "Requests refused for a tenant's quota", "quota"),
    Row("prompt_tokens", Counter, "Prompt tokens of ended requests"),
    Row("completion_tokens", Counter, "Tokens generated"),
    Row("time_to_first_token_seconds", Histogram, "From arrival to the first token"),
    Row("inter_token_seconds", Histogram, "Time a token, between two messages of a stream"),
    Row("queue_seconds", Histogram, "From arrival to the first step"),
    Row("request_seconds", Histogram, "From arrival to the end"),
    Row("steps", Counter, "Steps done"),
    Row("step_seconds", Counter, "Time of steps by phase", "phase"),
    Row("step_execute_seconds", Histogram, "Time that ranks spent on a step"),
    Row("step_rows", Histogram, "Sequences in a step", buckets=COUNTS),
    Row("step_tokens", Histogram, "Tokens computed in a step", buckets=COUNTS),
    Row("desired_replicas", Gauge, "Replicas that the load asks for"),
    Row("running_requests", Gauge, "Requests being computed", "replica"),
    Row("waiting_requests", Gauge, "Requests waiting for a place", "replica"),
    Row("kv_blocks", Gauge, "KV blocks in all", "replica"),
    Row("kv_blocks_free", Gauge, "KV blocks that a request could take", "replica"),
    Row("kv_use_ratio", Gauge, "Part of the KV blocks in use, 0 to 1", "replica"),
    Row("prefix_queried_tokens", Counter, "Prompt tokens looked up in the prefix cache", "replica"),
    Row("prefix_hit_tokens", Counter, "Prompt tokens found in the prefix cache", "replica"),
    Row("journal_commit_seconds", Histogram, "From a batch's begin to its being durable"),
    Row("journal_bytes", Gauge, "Bytes of requests in the journal"),
    Row("requests_recovered", Counter, "Requests taken up from an earlier controller's journal"),
    Row("groups_lost", Counter, "Groups of ranks that died, hung or did not start"),
    Row("ranks_missing", Gauge, "Ranks that replicas have fewer than they should"),
    Row("spares", Gauge, "Groups of ranks that stand by"),
    Row("moves", Counter, "Hand-overs between replicas that were tried, by outcome", "outcome"),
    Row("move_bytes", Counter, "Bytes of KV blocks that went from replica to replica"),
    Row("move_seconds", Histogram, "From the begin of a hand-over to its end"),
    Row("move_gap_seconds", Histogram, "In which a stream stood still while it was handed over"),
    Row("preemptions", Counter, "Requests sent back to wait for want of KV blocks", "replica"),
    Row("host_kv_blocks", Gauge, "KV blocks in host memory", "replica"),
    Row("disk_kv_blocks", Gauge, "KV blocks on disk", "replica"),
    Row("host_kv_hit_tokens", Counter, "Prompt tokens taken from host memory", "replica"),
    Row("disk_kv_hit_tokens", Counter, "Prompt tokens taken from disk", "replica"),
    Row("kv_loaded_bytes", Counter, "Bytes copied back into the KV pool", "replica"),
    Row("kv_stored_bytes", Counter, "Bytes copied to host memory and to disk", "replica"),
    Row("kv_load_seconds", Counter, "Time ranks spent copying back, a block at a time", "replica"),
    Row("kv_declined_tokens", Counter, "Prompt tokens recomputed as that was faster", "replica"),
    Row("kv_move_failures", Counter, "Copies that failed: damaged blocks, full disks", "replica"),
    Row("kv_refused_files", Gauge, "Files of the disk tier that were not usable", "replica"),
)


class ReplicaStats(Protocol):
    """A replica's state; the last but the tiers count since its start."""

    @property
    def running(self) -> int: ...
    @property
    def waiting(self) -> int: ...
    @property
    def blocks_total(self) -> int: ...
    @property
    def blocks_free(self) -> int: ...
    @property
    def prefix_queried(self) -> int: ...
    @property
    def prefix_hit(self) -> int: ...
    @property
    def preemptions(self) -> int: ...
    @property
    def tiers(self) -> TierStats | None: ...


CUMULATIVE = {
    "prefix_queried": "prefix_queried_tokens",
    "prefix_hit": "prefix_hit_tokens",
    "preemptions": "preemptions",
}


class Metrics:
    """Observer of the service and of the step loops. Safe to call from any thread."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._all = {row.name: row.create(self.registry) for row in TABLE}
        everything = self._all
        self._started = {name: everything["requests_started"].labels(name) for name in METHODS}
        self._ended = {name: everything["requests"].labels(name) for name in OUTCOMES}
        self._quotas = {name: everything["quota_refusals"].labels(name) for name in QUOTAS}
        self._moves = {name: everything["moves"].labels(name) for name in MOVE_OUTCOMES}
        self._open = everything["requests_open"]
        self._prompt_tokens = everything["prompt_tokens"]
        self._completion_tokens = everything["completion_tokens"]
        self._first_token = everything["time_to_first_token_seconds"]
        self._inter_token = everything["inter_token_seconds"]
        self._queue = everything["queue_seconds"]
        self._request = everything["request_seconds"]
        self._steps = everything["steps"]
        self._phases = tuple(everything["step_seconds"].labels(name) for name in PHASES)
        self._execute = everything["step_execute_seconds"]
        self._rows = everything["step_rows"]
        self._tokens = everything["step_tokens"]
        self._replicas = threading.Lock()
        self._last: dict[tuple[str, str], float] = {}

    def on_commit(self, seconds: float, size: int) -> None:
        """The journal committed a batch, and keeps so many bytes now."""
        self._all["journal_commit_seconds"].observe(seconds)
        self._all["journal_bytes"].set(size)

    def on_quota(self, quota: str) -> None:
        """A tenant's quota has refused a request; one of `QUOTAS`."""
        self._quotas[quota].inc()

    def on_recovered(self, count: int) -> None:
        """So many requests were taken up from the journal."""
        self._all["requests_recovered"].inc(count)

    def on_group_lost(self) -> None:
        """A group of ranks was lost, or did not start."""
        self._all["groups_lost"].inc()

    def set_ranks(self, missing: int, spares: int) -> None:
        """How many ranks replicas lack, and how many groups stand by."""
        self._all["ranks_missing"].set(missing)
        self._all["spares"].set(spares)

    def on_move(self, move: Move) -> None:
        """A hand-over was tried."""
        self._moves[f"{move.reason}_{move.outcome}"].inc()
        self._all["move_bytes"].inc(move.num_bytes)
        self._all["move_seconds"].observe(move.seconds)
        if move.gap_s and move.outcome == "moved":
            self._all["move_gap_seconds"].observe(move.gap_s)

    def on_start(self, method: str) -> None:
        """A request of RPC `method` ("Generate", "Chat") came in."""
        self._started.get(method.lower(), self._started["other"]).inc()
        self._open.inc()

    def on_first_token(self, seconds: float) -> None:
        """The first token left, `seconds` after the request came in."""
        self._first_token.observe(seconds)

    def on_tokens(self, count: int, gap_seconds: float) -> None:
        """A further message left with `count` tokens, `gap_seconds` after the one before it."""
        if count > 0:
            self._inter_token.observe(gap_seconds / count)

    def on_queue_time(self, seconds: float) -> None:
        """A request entered its first step after waiting so long."""
        self._queue.observe(seconds)

    def on_end(
        self, outcome: str, prompt_tokens: int, completion_tokens: int, seconds: float
    ) -> None:
        """A request ended: one of `OUTCOMES`, in any case; others count as "error"."""
        self._ended.get(outcome.lower(), self._ended["error"]).inc()
        self._open.dec()
        self._prompt_tokens.inc(prompt_tokens)
        self._completion_tokens.inc(completion_tokens)
        self._request.observe(seconds)

    def on_step(self, times: StepTimes) -> None:
        """A step of any replica is done."""
        schedule, execute, update, overhead = self._phases
        schedule.inc(times.schedule_s)
        execute.inc(times.execute_s)
        update.inc(times.update_s)
        overhead.inc(times.overhead_s)
        self._steps.inc()
        self._execute.observe(times.execute_s)
        self._rows.observe(times.rows)
        self._tokens.observe(times.tokens)

    def set_desired(self, replicas: int) -> None:
        """So many replicas the load asks for."""
        self._all["desired_replicas"].set(replicas)

    def set_replica(self, replica_id: str, stats: ReplicaStats) -> None:
        """Take over a replica's state; counts that fell mean that it started anew."""
        with self._replicas:
            self._set_replica(replica_id, stats)

    def _set_replica(self, replica_id: str, stats: ReplicaStats) -> None:
        used = stats.blocks_total - stats.blocks_free
        ratio = used / stats.blocks_total if stats.blocks_total else 0.0
        self._all["running_requests"].labels(replica_id).set(stats.running)
        self._all["waiting_requests"].labels(replica_id).set(stats.waiting)
        self._all["kv_blocks"].labels(replica_id).set(stats.blocks_total)
        self._all["kv_blocks_free"].labels(replica_id).set(stats.blocks_free)
        self._all["kv_use_ratio"].labels(replica_id).set(ratio)
        for attribute, name in CUMULATIVE.items():
            self._grow(replica_id, name, getattr(stats, attribute))
        if (tiers := stats.tiers) is not None:
            self._set_tiers(replica_id, tiers)

    def _set_tiers(self, replica_id: str, tiers: TierStats) -> None:
        self._all["host_kv_blocks"].labels(replica_id).set(tiers.host_used)
        self._all["disk_kv_blocks"].labels(replica_id).set(tiers.disk_used)
        self._all["kv_refused_files"].labels(replica_id).set(tiers.refused)
        loaded, tokens = tiers.loaded_host + tiers.loaded_disk, tiers.block_tokens
        counts = {
            "host_kv_hit_tokens": tiers.loaded_host * tokens,
            "disk_kv_hit_tokens": tiers.loaded_disk * tokens,
            "kv_loaded_bytes": loaded * tiers.block_bytes,
            "kv_stored_bytes": (tiers.stored + tiers.written) * tiers.block_bytes,
            "kv_load_seconds": tiers.load_s,
            "kv_declined_tokens": tiers.declined * tokens,
            "kv_move_failures": tiers.failed,
        }
        for name, value in counts.items():
            self._grow(replica_id, name, value)

    def _grow(self, replica_id: str, name: str, value: float) -> None:
        last = self._last.get((replica_id, name), 0)
        self._all[name].labels(replica_id).inc(value - last if value >= last else value)
        self._last[replica_id, name] = value

    def serve(
        self,
        host: str,
        port: int,
        *,
        tls_cert: str | None = None,
        tls_key: str | None = None,
        tls_client_ca: str | None = None,
    ) -> MetricsServer:
        """Publish the page on a thread; port 0 takes a free one. With `tls_client_ca`, only
        scrapers with its certificate are answered. Raises `OSError` when the port is taken."""
        server, thread = start_http_server(
            port,
            host,
            self.registry,
            certfile=tls_cert,
            keyfile=tls_key,
            client_cafile=tls_client_ca,
            client_auth_required=tls_client_ca is not None,
        )
        files = TlsFiles.of(tls_cert, tls_key, tls_client_ca)
        if files is not None:
            secured: Any = server.socket
            renew(secured.context, files)
        return MetricsServer(server, thread)


class MetricsServer:
    """The page while it is served."""

    def __init__(self, server: Any, thread: Any) -> None:
        self._server = server
        self._thread = thread

    @property
    def address(self) -> str:
        """`host:port` that is bound."""
        host, port = self._server.server_address[:2]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    def close(self) -> None:
        """Stop serving and free the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=5)
