"""`phalanx restart`: every replica anew, and no request lost."""

from __future__ import annotations

import time
from typing import Any

from phalanx.protos.errors import PhalanxError

from .flags import Connection, connection_flags

LOOK_EVERY_S = 0.2


@connection_flags
def restart(connection: Connection) -> None:
    """Replace every replica of a running cluster by a fresh one, one after the other.

    [bold]phalanx restart[/bold]

    Running requests go on: on another replica, or after a pause. A replica's successor starts
    beside it where there is room for both. Returns when all have been replaced.
    """
    from rich.console import Console

    from phalanx.controller.client import Client

    console = Console(highlight=False)
    with Client(**connection.arguments()) as client:
        left = client.restart_replicas()
        console.print(f"replacing {left} replicas, one after the other")
        shown = ""
        while text := _unfinished(client.cluster_state().replicas):
            if text != shown:
                console.print(text, markup=False)
            shown = text
            time.sleep(LOOK_EVERY_S)
    console.print("all replicas are new")


def _unfinished(replicas: Any) -> str:
    """What is still to be done; raises when a replica does not come up again."""
    for replica in replicas:
        if replica.state == "degraded":
            raise PhalanxError(f"{replica.replica_id} is degraded: {replica.condition}")
    waiting = [
        f"{item.replica_id}: {item.condition or item.state}"
        for item in replicas
        if item.outdated or item.state != "ready"
    ]
    return "; ".join(waiting)
