"""`phalanx scale`: more replicas, or fewer, and no request lost."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from phalanx.protos.errors import PhalanxError

from .flags import Connection, connection_flags

LOOK_EVERY_S = 0.2


@connection_flags
def scale(
    replicas: Annotated[int, typer.Argument(min=1, help="How many there are to be.")],
    connection: Connection,
) -> None:
    """Let replicas join or leave a running cluster, within its max_replicas.

    [bold]phalanx scale 3[/bold]

    A replica that leaves takes no more requests, and those that run on it go on elsewhere. Returns
    when there are so many. Interrupting this does not stop it.
    """
    from rich.console import Console

    from phalanx.controller.client import Client

    console = Console(highlight=False)
    with Client(**connection.arguments()) as client:
        before = client.scale_replicas(replicas)
        console.print(f"from {before} to {replicas} replicas")
        shown = ""
        while True:
            states = client.cluster_state().replicas
            if len(states) == replicas and all(item.state == "ready" for item in states):
                break
            for item in states:
                if item.state == "degraded":
                    raise PhalanxError(f"{item.replica_id} is degraded: {item.condition}")
            text = "; ".join(
                f"{item.replica_id}: {item.condition or item.state}"
                for item in states
                if item.state != "ready"
            )
            if text and text != shown:
                console.print(text, markup=False)
                shown = text
            time.sleep(LOOK_EVERY_S)
    console.print(f"{replicas} replicas are ready")
