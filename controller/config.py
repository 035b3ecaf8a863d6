"""The cluster's configuration: every field with its default, its rule and its help, in one place.

A `ClusterConfig` is made from a TOML file and from flags, validated once, and never changed.
"auto" and None are resolved into concrete values, once, when the cluster starts.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, get_args

from phalanx.protos.errors import ConfigError
from phalanx.protos.limits import DEFAULT_MAX_QUEUED_REQUESTS
from phalanx.protos.specs import DTYPE_BYTES, DType

from .agreement import disagreements
from .rules import Rule, option
from .tools.formats import FORMAT_NAMES
from .units import is_loopback
from .weightcache import INHERITED, WeightCacheFields

MIB = 2**20
DTYPES, KV_DTYPES = ("auto", *get_args(DType)), ("auto", *DTYPE_BYTES)


@dataclass(frozen=True, kw_only=True)
class ClusterConfig(WeightCacheFields):
    """How a cluster is built and served. Raises `ConfigError` listing every wrong field."""

    model: str = field(
        metadata={"rule": Rule("Model: smollm2, a folder of safetensors, or a .gguf file.")}
    )
    tp: int = option(1, "Ranks of a replica; each holds a slice of every layer.", low=1, high=1024)
    pp: int = option(
        1,
        "Pipeline stages of a replica; each holds a run of layers on TP ranks.",
        low=1,
        high=1024,
    )
    spares: int = option(
        0,
        "Groups of ranks that stand by, started but without weights, for one that is lost; each "
        "takes the places of a replica.",
        low=0,
        high=64,
        group="Advanced",
    )
    min_tp: int | None = option(
        None,
        "Fewest ranks that a stage goes on with when places for TP are gone, or starts with; auto "
        "is 1 once it has run, and TP before.",
        low=1,
        high=1024,
        unset="auto",
        group="Advanced",
    )
    shrink_after_s: float = option(
        10.0,
        "Seconds that places must be gone before a replica goes on smaller.",
        low=0,
        high=86400,
        group="Advanced",
    )
    replicas: int = option(1, "Copies of the model, each of PP x TP ranks.", low=1, high=1024)
    prefill_replicas: int | None = option(
        None,
        "Replicas for prompts alone, given with decode-replicas; they take the place of replicas.",
        low=1,
        high=1024,
        unset="off",
    )
    decode_replicas: int | None = option(
        None,
        "Replicas to which streams go with their KV blocks once their prompts are computed.",
        low=1,
        high=1024,
        unset="off",
    )
    max_replicas: int | None = option(
        None,
        "Copies that `phalanx scale` may ask for; auto is REPLICAS.",
        low=1,
        high=1024,
        unset="auto",
    )
    dtype: str = option(
        "auto",
        "Number format of weights and activations; of linear layers' weights alone: int8, on CPUs, "
        "fp8 and int4, on GPUs.",
        choices=DTYPES,
    )
    kv_dtype: str = option(
        "auto",
        "Number format of the KV cache; auto is the activations'; int8 on CPUs, fp8 on GPUs.",
        choices=KV_DTYPES,
    )
    device: str = option("auto", "Where ranks compute.", choices=("auto", "cpu", "cuda"))
    chat_template: str | None = option(
        None, "A Jinja file in place of the model's own chat template.", unset="own"
    )
    tool_parser: str = option(
        "auto",
        "How calls of tools are read from answers; auto goes by the chat template.",
        choices=("auto", *FORMAT_NAMES),
    )
    block_size: int = option(16, "Tokens of a KV block.", low=1, high=1024)
    kv_tokens: int | None = option(
        None, "Tokens that a replica's KV cache holds.", low=1, unset="auto"
    )
    memory_per_rank: int | None = option(
        None, "Memory a rank may use.", low=1, unset="auto", size=True
    )
    max_context: int | None = option(
        None, "Longest prompt plus output, in tokens; auto is the model's own.", low=1, unset="auto"
    )
    max_tokens_per_step: int = option(512, "Tokens computed in one step at most.", low=1)
    max_running: int = option(64, "Requests computed together at most.", low=1, high=65536)
    max_queued: int = option(
        DEFAULT_MAX_QUEUED_REQUESTS,
        "Requests of one tenant waiting at most; more are refused.",
        low=1,
    )
    max_bypass: int = option(
        1024,
        "Requests of other tenants that may go before a tenant's next one, whatever the shares.",
        low=0,
        group="Advanced",
    )
    aging_s: float = option(
        10.0,
        "Seconds of waiting that make up for one step of priority.",
        low=0.001,
        high=86400,
        group="Advanced",
    )
    max_in_flight: int = option(
        2,
        "Steps sent ahead of their results at most, but no fewer than stages.",
        low=1,
        high=8,
        group="Advanced",
    )
    prefix_caching: bool = option(True, "Keep the KV blocks of past prompts for reuse.")
    host_kv_memory: int | None = option(
        None,
        "Host memory of each rank for KV blocks that its pool has no room for.",
        low=1,
        unset="off",
        size=True,
        group="KV tiers",
    )
    disk_kv_path: str | None = option(
        None,
        "Folder for KV blocks that outlive the ranks; it holds what users write, transformed.",
        unset="off",
        group="KV tiers",
    )
    disk_kv_memory: int = option(
        8 * 2**30,
        "Size of each rank's part of that folder at most.",
        low=1,
        size=True,
        group="KV tiers",
    )
    state_slots: int | None = option(
        None,
        "Slots for the states of running requests and past prompts, of models with state spaces.",
        low=1,
        unset="auto",
        group="Advanced",
    )
    state_stride: int | None = option(
        None,
        "Tokens of a prompt between states that are kept, beside the one at its end.",
        low=1,
        unset="off",
        group="Advanced",
    )
    copy_prefixes: bool = option(
        True, "Copy cached prefixes between replicas where that is faster.", group="Advanced"
    )
    rebalance: bool = option(
        False,
        "Hand streams over from where requests wait to where there is room.",
        group="Advanced",
    )
    record_steps: bool = option(
        True, "Record decode steps as CUDA graphs when a GPU rank starts.", group="Advanced"
    )

    host: str = option("127.0.0.1", "Address that the gRPC service binds.", group="Listening")
    port: int = option(50051, "Its port; 0 takes a free one.", low=0, high=65535, group="Listening")
    metrics_host: str = option(
        "127.0.0.1", "Address that the Prometheus page binds.", group="Listening"
    )
    metrics_port: int | None = option(
        9400, "Its port; 0 takes a free one.", low=0, high=65535, unset="off", group="Listening"
    )
    openai_host: str = option(
        "127.0.0.1", "Address that the OpenAI-compatible HTTP front binds.", group="Listening"
    )
    openai_port: int | None = option(
        None, "Its port; 0 takes a free one.", low=0, high=65535, unset="off", group="Listening"
    )
    page: str | None = option(
        None,
        "HOST:PORT of a page to chat on and watch the cluster; port 0 takes a free one.",
        unset="off",
        group="Listening",
    )
    vllm_protocol: bool = option(
        False,
        "Serve the vLLM engine's gRPC protocol on the same port, for gateways such as smg.",
        group="Listening",
    )
    reflection: bool = option(False, "Let gRPC tools list the service.", group="Listening")

    tls_cert: str | None = option(
        None, "The service's certificate, a PEM file.", unset="off", group="Security"
    )
    tls_key: str | None = option(
        None, "The private key of the certificate, a PEM file.", unset="off", group="Security"
    )
    tls_client_ca: str | None = option(
        None, "Authority that callers' certificates must come from.", unset="off", group="Security"
    )
    token_file: str | None = option(
        None,
        "File of callers, a line tenant:sha256-of-token:role each; every call then needs a token.",
        unset="off",
        group="Security",
    )
    operators: str = option(
        "operator",
        "Tenants who may restart replicas, separated by commas; without token and TLS, all of this "
        "machine may.",
        group="Security",
    )
    tenants_file: str | None = option(
        None,
        "TOML file of what tenants may have: weights, quotas, priorities.",
        unset="off",
        group="Security",
    )
    insecure: bool = option(
        False, "Allow an address beyond this machine without TLS and token.", group="Security"
    )

    journal: str | None = option(
        "auto",
        "Folder in which accepted requests and their tokens are kept, so that a killed controller "
        "loses nothing. It holds what users write. auto is one of this user's and the port's, "
        "below XDG_STATE_HOME; none with port 0.",
        unset="off",
        group="Durability",
    )
    journal_sync: str = option(
        "normal",
        "What the journal outlives: the end of the process (normal), or of the machine (full).",
        choices=("normal", "full"),
        group="Durability",
    )
    journal_keep_s: float = option(
        600.0,
        "Seconds that an ended request is kept for callers who ask again.",
        low=0,
        high=604800,
        group="Durability",
    )
    journal_keep_bytes: int = option(
        256 * MIB, "Size up to which ended requests are kept.", low=0, size=True, group="Durability"
    )
    resume_grace_s: float = option(
        30.0,
        "Seconds that a request with an id of its caller's outlives a lost connection.",
        low=0,
        high=86400,
        group="Durability",
    )

    ray_address: str | None = option(
        None, "A running Ray cluster; embedded starts one here.", unset="embedded", group="Cluster"
    )
    placement: str = option(
        "auto",
        "How a replica's ranks, or of several stages the stages, are laid over nodes; auto keeps "
        "ranks on one node and spreads stages.",
        choices=("auto", "STRICT_PACK", "PACK", "SPREAD", "STRICT_SPREAD"),
        group="Cluster",
    )
    collectives: str = option(
        "auto",
        "How ranks add up their parts.",
        choices=("auto", "gloo", "shm", "nccl"),
        group="Cluster",
    )
    threads: int | None = option(
        None,
        "CPU threads of each rank; auto divides a machine's cores among its ranks.",
        low=1,
        high=1024,
        unset="auto",
        group="Cluster",
    )
    start_timeout_s: float = option(
        120.0, "Seconds a replica may take to start.", low=1, high=86400, group="Cluster"
    )
    step_timeout_s: float = option(
        60.0,
        "Seconds without a step's result until ranks count as hung.",
        low=0.1,
        high=86400,
        group="Cluster",
    )
    silence_timeout_s: float = option(
        3.0,
        "Seconds without a sign of life until a rank counts as lost.",
        low=1,
        high=3600,
        group="Cluster",
    )
    trace_endpoint: str | None = option(
        None,
        "OTLP collector (gRPC) that gets traces, such as http://127.0.0.1:4317; else the one of "
        "OTEL_EXPORTER_OTLP_ENDPOINT, if set.",
        unset="off",
        group="Watching",
    )
    trace_ratio: float = option(
        1.0,
        "Part of the requests that are traced, of those whose callers do not decide it.",
        low=0,
        high=1,
        group="Watching",
    )
    log_format: str = option(
        "text",
        "How log lines are written: for people, or as JSON with request ids.",
        choices=("text", "json"),
        group="Watching",
    )
    log_level: str = option(
        "info", "What is logged.", choices=("debug", "info", "warning", "error"), group="Watching"
    )

    def __post_init__(self) -> None:
        wrong = [
            text
            for name, rule in RULES.items()
            for text in rule.violations(name, KINDS[name], getattr(self, name))
        ]
        wrong = wrong or disagreements(self)
        if wrong:
            raise ConfigError("; ".join(wrong))

    @property
    def most_replicas(self) -> int:
        """Replicas that there may be at a time."""
        return self.max_replicas or self.num_replicas

    @property
    def num_replicas(self) -> int:
        """Replicas at first, of either kind."""
        if self.prefill_replicas is None or self.decode_replicas is None:
            return self.replicas
        return self.prefill_replicas + self.decode_replicas

    @property
    def ranks_per_replica(self) -> int:
        """Ranks of all stages."""
        return self.tp * self.pp

    @property
    def plans_in_flight(self) -> int:
        """Steps sent ahead of their results at most; with fewer than stages, some would idle."""
        return max(self.max_in_flight, self.pp)

    @property
    def metrics_needs_tls(self) -> bool:
        """Whether the Prometheus page must be served over mutual TLS."""
        served = self.metrics_port is not None
        return served and not is_loopback(self.metrics_host) and not self.insecure


# what is inherited comes last
_FIELDS = sorted(dataclasses.fields(ClusterConfig), key=lambda item: item.name in INHERITED)
RULES: dict[str, Rule] = {item.name: item.metadata["rule"] for item in _FIELDS}
DEFAULTS: dict[str, Any] = {
    item.name: item.default for item in _FIELDS if item.default is not dataclasses.MISSING
}
_KINDS = {"str": str, "int": int, "float": float, "bool": bool}
KINDS: dict[str, type] = {
    item.name: _KINDS[str(item.type).removesuffix(" | None")] for item in _FIELDS
}
"""Field name to the Python type of its values."""
