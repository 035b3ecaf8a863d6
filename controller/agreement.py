"""What the fields of a configuration demand of each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from phalanx.protos.specs import foreign_formats

from .units import is_loopback, split_address

if TYPE_CHECKING:
    from .config import ClusterConfig


def disagreements(config: ClusterConfig) -> list[str]:
    """Each in words that name the fields and what is allowed."""
    wrong = []
    if config.min_tp is not None and config.min_tp > config.tp:
        wrong.append(f"min_tp is {config.min_tp}, allowed: 1 to tp ({config.tp})")
    if config.max_tokens_per_step < config.max_running:
        wrong.append(
            f"max_tokens_per_step is {config.max_tokens_per_step}, allowed: at least max_running "
            f"({config.max_running}), one token for each"
        )
    if (config.prefill_replicas is None) != (config.decode_replicas is None):
        wrong.append("prefill_replicas and decode_replicas are given together or not at all")
    elif config.prefill_replicas is not None and config.replicas != 1:
        wrong.append(
            f"replicas is {config.replicas}, allowed with prefill_replicas and decode_replicas: "
            "none, as those are all there are"
        )
    if config.most_replicas < config.num_replicas:
        wrong.append(
            f"max_replicas is {config.max_replicas}, allowed: at least replicas "
            f"({config.num_replicas})"
        )
    if config.disk_kv_path is not None and config.host_kv_memory is None:
        wrong.append("disk_kv_path needs host_kv_memory, where blocks go first")
    if config.host_kv_memory is not None and not config.prefix_caching:
        wrong.append("host_kv_memory needs prefix_caching")
    wrong += foreign_formats(config.dtype, config.kv_dtype, config.device)
    if (config.tls_cert is None) != (config.tls_key is None):
        wrong.append("tls_cert and tls_key are given together or not at all")
    if config.tls_client_ca is not None and config.tls_cert is None:
        wrong.append("tls_client_ca needs tls_cert and tls_key")
    page = None if config.page is None else split_address(config.page)
    if config.page is not None and page is None:
        wrong.append(f"page is {config.page!r}, allowed: HOST:PORT such as 127.0.0.1:8080, or off")
    if config.insecure:
        return wrong
    known = config.token_file is not None or config.tls_client_ca is not None
    fronts = {"host": config.host}
    if config.openai_port is not None:
        fronts["openai_host"] = config.openai_host
    if page is not None:
        fronts["page"] = page[0]
    for name, host in fronts.items():
        if not is_loopback(host) and not (config.tls_cert is not None and known):
            wrong.append(
                f"{name} is {host!r}, which other machines reach: allowed with tls_cert, "
                "tls_key and one of token_file, tls_client_ca; or with insecure"
            )
    if config.metrics_needs_tls and config.tls_client_ca is None:
        wrong.append(
            f"metrics_host is {config.metrics_host!r}, which other machines reach: allowed with "
            "tls_cert, tls_key and tls_client_ca; or with insecure"
        )
    return wrong
