"""The cluster's configuration: every field with its default, its rule and its help, in one place.

A `ClusterConfig` is made from a TOML file and from flags, validated once, and never changed.
"auto" and None are resolved into concrete values, once, when the cluster starts.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from phalanx.protos.errors import ConfigError
from phalanx.protos.limits import DEFAULT_MAX_QUEUED_REQUESTS
from phalanx.protos.specs import DTYPE_BYTES, DType, foreign_formats

MIB = 2**20
BYTE_UNITS = {"": 1, "B": 1, "KIB": 2**10, "MIB": MIB, "GIB": 2**30, "TIB": 2**40}
BYTE_UNITS |= {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
DTYPES, KV_DTYPES = ("auto", *get_args(DType)), ("auto", *DTYPE_BYTES)


@dataclass(frozen=True)
class Rule:
    """What a field allows, and how it is described.

    `choices` or the closed range `low` to `high` bound the value. `unset` is the word that means
    None in a file or flag ("auto", "off"); fields without one are never None. `size` accepts
    texts such as "2GiB".
    """

    help: str
    choices: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None
    unset: str = ""
    size: bool = False
    group: str = "Engine"

    @property
    def allowed(self) -> str:
        """The allowed values, in words."""
        if self.choices:
            return "one of " + ", ".join(self.choices)
        if self.high is not None:
            text = f"{self.low:g} to {self.high:g}"
        elif self.low is not None:
            text = f"at least {self.low:g}"
        else:
            text = "a text"
        text += " bytes, such as 2GiB" if self.size else ""
        return f"{text}, or {self.unset}" if self.unset else text


def _option(default: Any, help: str, **rule: Any) -> Any:
    return field(default=default, metadata={"rule": Rule(help, **rule)})


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """How a cluster is built and served. Raises `ConfigError` listing every wrong field."""

    model: str = field(
        metadata={"rule": Rule("Model: smollm2, a folder of safetensors, or a .gguf file.")}
    )
    tp: int = _option(1, "Ranks of a replica; each holds a slice of every layer.", low=1, high=1024)
    pp: int = _option(
        1,
        "Pipeline stages of a replica; each holds a run of layers on TP ranks.",
        low=1,
        high=1024,
    )
    replicas: int = _option(1, "Copies of the model, each of PP x TP ranks.", low=1, high=1024)
    dtype: str = _option(
        "auto",
        "Number format of weights and activations; of linear layers' weights alone: int8, on CPUs, "
        "fp8 and int4, on GPUs.",
        choices=DTYPES,
    )
    kv_dtype: str = _option(
        "auto",
        "Number format of the KV cache; auto is the activations'; int8 on CPUs, fp8 on GPUs.",
        choices=KV_DTYPES,
    )
    device: str = _option("auto", "Where ranks compute.", choices=("auto", "cpu", "cuda"))
    block_size: int = _option(16, "Tokens of a KV block.", low=1, high=1024)
    kv_tokens: int | None = _option(
        None, "Tokens that a replica's KV cache holds.", low=1, unset="auto"
    )
    memory_per_rank: int | None = _option(
        None, "Memory a rank may use.", low=1, unset="auto", size=True
    )
    max_context: int | None = _option(
        None, "Longest prompt plus output, in tokens; auto is the model's own.", low=1, unset="auto"
    )
    max_tokens_per_step: int = _option(512, "Tokens computed in one step at most.", low=1)
    max_running: int = _option(64, "Requests computed together at most.", low=1, high=65536)
    max_queued: int = _option(
        DEFAULT_MAX_QUEUED_REQUESTS, "Requests waiting at most; more are refused.", low=1
    )
    max_in_flight: int = _option(
        2,
        "Steps sent ahead of their results at most, but no fewer than stages.",
        low=1,
        high=8,
        group="Advanced",
    )
    prefix_caching: bool = _option(True, "Keep the KV blocks of past prompts for reuse.")
    state_slots: int | None = _option(
        None,
        "Slots for the states of running requests and past prompts, of models with state spaces.",
        low=1,
        unset="auto",
        group="Advanced",
    )
    state_stride: int | None = _option(
        None,
        "Tokens of a prompt between states that are kept, beside the one at its end.",
        low=1,
        unset="off",
        group="Advanced",
    )
    record_steps: bool = _option(
        True, "Record decode steps as CUDA graphs when a GPU rank starts.", group="Advanced"
    )

    host: str = _option("127.0.0.1", "Address that the gRPC service binds.", group="Listening")
    port: int = _option(
        50051, "Its port; 0 takes a free one.", low=0, high=65535, group="Listening"
    )
    metrics_host: str = _option(
        "127.0.0.1", "Address that the Prometheus page binds.", group="Listening"
    )
    metrics_port: int | None = _option(
        9400, "Its port; 0 takes a free one.", low=0, high=65535, unset="off", group="Listening"
    )
    openai_host: str = _option(
        "127.0.0.1", "Address that the OpenAI-compatible HTTP front binds.", group="Listening"
    )
    openai_port: int | None = _option(
        None, "Its port; 0 takes a free one.", low=0, high=65535, unset="off", group="Listening"
    )
    reflection: bool = _option(False, "Let gRPC tools list the service.", group="Listening")

    tls_cert: str | None = _option(
        None, "The service's certificate, a PEM file.", unset="off", group="Security"
    )
    tls_key: str | None = _option(
        None, "The private key of the certificate, a PEM file.", unset="off", group="Security"
    )
    tls_client_ca: str | None = _option(
        None, "Authority that callers' certificates must come from.", unset="off", group="Security"
    )
    token_file: str | None = _option(
        None,
        "File of callers, a line tenant:sha256-of-token each; every call then needs a token.",
        unset="off",
        group="Security",
    )
    insecure: bool = _option(
        False, "Allow an address beyond this machine without TLS and token.", group="Security"
    )

    journal: str | None = _option(
        None,
        "Folder in which accepted requests and their tokens are kept, so that a killed controller "
        "loses nothing. It holds what users write.",
        unset="off",
        group="Durability",
    )
    journal_sync: str = _option(
        "normal",
        "What the journal outlives: the end of the process (normal), or of the machine (full).",
        choices=("normal", "full"),
        group="Durability",
    )
    journal_keep_s: float = _option(
        600.0,
        "Seconds that an ended request is kept for callers who ask again.",
        low=0,
        high=604800,
        group="Durability",
    )
    journal_keep_bytes: int = _option(
        256 * MIB, "Size up to which ended requests are kept.", low=0, size=True, group="Durability"
    )
    resume_grace_s: float = _option(
        30.0,
        "Seconds that a request with an id of its caller's outlives a lost connection.",
        low=0,
        high=86400,
        group="Durability",
    )

    ray_address: str | None = _option(
        None, "A running Ray cluster; embedded starts one here.", unset="embedded", group="Cluster"
    )
    placement: str = _option(
        "auto",
        "How a replica's ranks, or of several stages the stages, are laid over nodes; auto keeps "
        "ranks on one node and spreads stages.",
        choices=("auto", "STRICT_PACK", "PACK", "SPREAD", "STRICT_SPREAD"),
        group="Cluster",
    )
    collectives: str = _option(
        "auto",
        "How ranks add up their parts.",
        choices=("auto", "gloo", "shm", "nccl"),
        group="Cluster",
    )
    threads: int | None = _option(
        None,
        "CPU threads of each rank; auto divides a machine's cores among its ranks.",
        low=1,
        high=1024,
        unset="auto",
        group="Cluster",
    )
    start_timeout_s: float = _option(
        120.0, "Seconds a replica may take to start.", low=1, high=86400, group="Cluster"
    )
    step_timeout_s: float = _option(
        60.0,
        "Seconds without a step's result until ranks count as hung.",
        low=0.1,
        high=86400,
        group="Cluster",
    )
    silence_timeout_s: float = _option(
        3.0,
        "Seconds without a sign of life until a rank counts as lost.",
        low=1,
        high=3600,
        group="Cluster",
    )
    log_level: str = _option(
        "info", "What is logged.", choices=("debug", "info", "warning", "error"), group="Cluster"
    )

    def __post_init__(self) -> None:
        wrong = [text for item in RULES for text in _check_field(item, getattr(self, item))]
        wrong = wrong or self._check_together()
        if wrong:
            raise ConfigError("; ".join(wrong))

    def _check_together(self) -> list[str]:
        """What fields demand of each other."""
        wrong = []
        if self.max_tokens_per_step < self.max_running:
            wrong.append(
                f"max_tokens_per_step is {self.max_tokens_per_step}, allowed: at least max_running "
                f"({self.max_running}), one token for each"
            )
        wrong += foreign_formats(self.dtype, self.kv_dtype, self.device)
        if (self.tls_cert is None) != (self.tls_key is None):
            wrong.append("tls_cert and tls_key are given together or not at all")
        if self.tls_client_ca is not None and self.tls_cert is None:
            wrong.append("tls_client_ca needs tls_cert and tls_key")
        if self.insecure:
            return wrong
        known = self.token_file is not None or self.tls_client_ca is not None
        fronts = {"host": self.host}
        if self.openai_port is not None:
            fronts["openai_host"] = self.openai_host
        for name, host in fronts.items():
            if not is_loopback(host) and not (self.tls_cert is not None and known):
                wrong.append(
                    f"{name} is {host!r}, which other machines reach: allowed with tls_cert, "
                    "tls_key and one of token_file, tls_client_ca; or with insecure"
                )
        if self.metrics_needs_tls and self.tls_client_ca is None:
            wrong.append(
                f"metrics_host is {self.metrics_host!r}, which other machines reach: allowed with "
                "tls_cert, tls_key and tls_client_ca; or with insecure"
            )
        return wrong

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
        return (
            self.metrics_port is not None
            and not is_loopback(self.metrics_host)
            and not self.insecure
        )


RULES: dict[str, Rule] = {
    item.name: item.metadata["rule"] for item in dataclasses.fields(ClusterConfig)
}
DEFAULTS: dict[str, Any] = {
    item.name: item.default
    for item in dataclasses.fields(ClusterConfig)
    if item.default is not dataclasses.MISSING
}
_KINDS = {"str": str, "int": int, "float": float, "bool": bool}
KINDS: dict[str, type] = {
    item.name: _KINDS[str(item.type).removesuffix(" | None")]
    for item in dataclasses.fields(ClusterConfig)
}
"""Field name to the Python type of its values."""


def _check_field(name: str, value: object) -> list[str]:
    rule, kind = RULES[name], KINDS[name]
    if value is None and rule.unset:
        return []
    is_bool = isinstance(value, bool)
    fits = isinstance(value, (int, float) if kind is float else kind) and is_bool == (kind is bool)
    if fits and isinstance(value, str):
        fits = value in rule.choices if rule.choices else value != ""
    elif fits and isinstance(value, int | float) and not is_bool:
        fits = (rule.low is None or rule.low <= value) and (rule.high is None or value <= rule.high)
    allowed = "true or false" if kind is bool else rule.allowed
    return [] if fits else [f"{name} is {value!r}, allowed: {allowed}"]


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a socket bound to `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def parse_bytes(text: str) -> int:
    """Bytes from a text such as "8GiB", "512 MB" or "1073741824". Raises `ValueError`."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if match is None or match[2].upper() not in BYTE_UNITS:
        raise ValueError(f"{text!r} is not a number of bytes such as 8GiB")
    return int(float(match[1]) * BYTE_UNITS[match[2].upper()])


def parse_value(name: str, value: object) -> object:
    """The value of field `name` as a file or a flag writes it, in the field's own type.

    What cannot be read is returned as it is, for `ClusterConfig` to refuse.
    """
    rule, kind = RULES[name], KINDS[name]
    if not isinstance(value, str):
        return float(value) if kind is float and type(value) is int else value
    if rule.unset and value == rule.unset:
        return None
    if kind not in (int, float):
        return value
    try:
        return parse_bytes(value) if rule.size else kind(value)
    except ValueError:
        return value


def read_config_file(path: Path) -> dict[str, object]:
    """The fields of a TOML file, whose keys are the names of `ClusterConfig`'s fields."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"config file {path}: cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {path}: not TOML: {error}") from None
    unknown = sorted(set(table) - set(RULES))
    if unknown:
        raise ConfigError(
            f"config file {path}: {', '.join(unknown)}: no such field; allowed: {', '.join(RULES)}"
        )
    return table


def load_config(file: Path | None, flags: Mapping[str, object]) -> ClusterConfig:
    """Defaults, then the file, then the flags that are not None; the last one wins.

    Raises `ConfigError` for an unreadable file, an unknown field or a wrong value.
    """
    fields = read_config_file(file) if file else {}
    fields |= {name: value for name, value in flags.items() if value is not None}
    if "model" not in fields:
        raise ConfigError(f"model is missing, allowed: {RULES['model'].help}")
    values: dict[str, Any] = {name: parse_value(name, value) for name, value in fields.items()}
    return ClusterConfig(**values)
