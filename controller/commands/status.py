"""`phalanx status`: what a running cluster says of itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .flags import Connection, connection_flags

if TYPE_CHECKING:
    from rich.table import Table


@connection_flags
def status(connection: Connection) -> None:
    """Show the model, replicas, ranks, queue, KV cache and listeners of a running cluster.

    Where callers have roles, all but the model is for administrators.

    [bold]phalanx status[/bold]

    [bold]phalanx status --address 10.0.0.5:50051 --token-file token.txt[/bold]
    """
    from rich.console import Console

    from phalanx.controller.client import Client
    from phalanx.protos.errors import PermissionDenied

    console = Console(highlight=False)
    with Client(**connection.arguments()) as client:
        info = client.model_info()
        console.print(
            f"[bold]{info.name}[/] ({info.family}, {info.dtype}), context {info.max_context} "
            f"tokens, server {info.server_version}"
        )
        try:
            state = client.cluster_state()
        except PermissionDenied as error:
            console.print(str(error), style="yellow", markup=False)
            return
    console.print(f"{state.queued_requests} requests queued")
    console.print()
    console.print(replica_table(state.replicas))
    for replica in state.replicas:
        if replica.condition:
            console.print(f"{replica.replica_id}: {replica.condition}", markup=False)
    if any(replica.host_blocks_total for replica in state.replicas):
        console.print()
        console.print(tier_table(state.replicas))
    console.print()
    console.print(rank_table(state.replicas))
    if state.listeners:
        console.print()
        console.print(listener_table(state.listeners))


def replica_table(replicas: Any) -> Table:
    """One line a replica."""
    from .terminal import plain_table

    table = plain_table()
    for name in ("replica", "state"):
        table.add_column(name)
    table.add_column("TP", justify="right")
    for name in ("running", "waiting", "KV tokens", "used", "prefix hits", "preempted", "steps"):
        table.add_column(name.replace(" ", "\n"), justify="right")
    for replica in replicas:
        total = replica.kv_blocks_total
        used = total - replica.kv_blocks_free
        table.add_row(
            replica.replica_id,
            replica.state,
            _size(replica),
            str(replica.running_requests),
            str(replica.waiting_requests),
            str(total * replica.kv_block_tokens),
            _ratio(used, total),
            _ratio(replica.prefix_hit_tokens, replica.prefix_queried_tokens),
            str(replica.preemptions),
            str(replica.steps),
        )
    return table


def tier_table(replicas: Any) -> Table:
    """One line a replica: what lies below its KV pool."""
    from .terminal import plain_table

    table = plain_table()
    table.add_column("replica")
    names = ("host\ntokens", "used", "host\nhits", "disk\ntokens", "used", "disk\nhits", "failed")
    for name in names:
        table.add_column(name, justify="right")
    for replica in replicas:
        size = replica.kv_block_tokens
        table.add_row(
            replica.replica_id,
            str(replica.host_blocks_total * size),
            _ratio(replica.host_blocks_used, replica.host_blocks_total),
            str(replica.host_hit_tokens),
            str(replica.disk_blocks_total * size),
            _ratio(replica.disk_blocks_used, replica.disk_blocks_total),
            str(replica.disk_hit_tokens),
            str(replica.move_failures),
        )
    return table


def rank_table(replicas: Any) -> Table:
    """One line a rank; with its stage where there are several."""
    from .terminal import format_bytes, plain_table

    table = plain_table()
    staged = any(rank.stage for replica in replicas for rank in replica.ranks)
    stages = ["stage", "layers"] if staged else []
    for name in ("replica", "rank", *stages, "node", "device", "heads", "weights", "KV cache"):
        right = name in ("rank", "stage", "weights", "KV cache")
        table.add_column(name, justify="right" if right else "left")
    for replica in replicas:
        for rank in replica.ranks:
            layers = f"{rank.layer_start}-{rank.layer_stop - 1}"
            table.add_row(
                replica.replica_id,
                str(rank.rank),
                *([str(rank.stage), layers] if staged else []),
                rank.node,
                rank.device,
                f"{rank.head_start}-{rank.head_stop - 1}" if rank.head_stop else "none",
                format_bytes(rank.weight_bytes),
                format_bytes(rank.kv_bytes),
            )
    return table


def listener_table(listeners: Any) -> Table:
    """One line an address."""
    from .terminal import plain_table

    table = plain_table()
    for name in ("listens on", "protocol", "TLS", "callers show"):
        table.add_column(name)
    for item in listeners:
        table.add_row(item.address, item.protocol, item.tls, item.auth)
    return table


def _size(replica: Any) -> str:
    """The TP size, and what it should be where it is another one."""
    tp, desired = replica.tp, replica.tp_desired or replica.tp
    return str(tp) if tp == desired else f"{tp} of {desired}"


def _ratio(part: int, whole: int) -> str:
    return f"{part / whole:.0%}" if whole else "-"
