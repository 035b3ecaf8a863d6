"""`phalanx explain`: why a request went to its replica."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from .flags import Connection, connection_flags

if TYPE_CHECKING:
    from rich.table import Table


@connection_flags
def explain(
    request_id: Annotated[str, typer.Argument(help="Of one of your latest requests.")],
    connection: Connection,
) -> None:
    """Show which replicas were compared for a request, what each would have cost, and where it
    moved while it ran.

    [bold]phalanx explain my-request-1[/bold]

    Times are predictions in milliseconds: the replica with the least sum was chosen. Only several
    replicas leave anything to decide.
    """
    from rich.console import Console

    from phalanx.controller.client import Client

    with Client(**connection.arguments()) as client:
        answer = client.explain(request_id)
    console = Console(highlight=False)
    for placement in answer.placements:
        console.print(
            f"[bold]{placement.replica_id}[/] of {placement.candidates} replicas, "
            f"for {placement.tokens} tokens" + copied_from(placement)
        )
        console.print(estimate_table(placement))
    for move in answer.moves:
        console.print(move_line(move))


def copied_from(placement: Any) -> str:
    """Where the chosen replica was to have cached tokens from, in words."""
    copied = placement.estimates[0].copied_tokens if placement.estimates else 0
    return f", {copied} of them copied from {placement.source_id}" if copied else ""


def move_line(move: Any) -> str:
    """A hand-over in words."""
    way = f"{move.reason}: from {move.source_id} to [bold]{move.target_id}[/]"
    if not move.moved:
        return f"{way} failed after {1e3 * move.seconds:.0f} ms: {move.error}"
    return (
        f"{way} with {move.bytes / 2**20:.1f} MiB of KV blocks in {1e3 * move.seconds:.0f} ms, "
        f"of which it stood still {1e3 * move.gap_s:.0f} ms"
    )


def estimate_table(placement: Any) -> Table:
    """One line a replica, the chosen one first."""
    from .terminal import plain_table

    table = plain_table()
    table.add_column("replica")
    for name in (
        "cached",
        "copied",
        "queued",
        "streams",
        "prefill",
        "load",
        "copy",
        "streams ms",
        "wait",
        "others",
        "sum",
    ):
        table.add_column(name, justify="right")
    for item in placement.estimates:
        times = (
            item.prefill_s,
            item.load_s,
            item.copy_s,
            item.streams_s,
            item.wait_s,
            item.disturbance_s,
            item.cost_s,
        )
        table.add_row(
            item.replica_id,
            str(item.cached_tokens),
            str(item.copied_tokens),
            str(item.queue_tokens),
            str(item.streams),
            *(f"{1e3 * seconds:.1f}" for seconds in times),
        )
    return table
