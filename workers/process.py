"""A rank as a child process of the controller, without Ray: see `protos.places`.

python -P -m phalanx.workers.process
"""

from __future__ import annotations

import os
import platform
import socket
import sys

import msgspec

from phalanx.protos.places import Invitation, Place
from phalanx.protos.specs import WorkerSpec
from phalanx.protos.wire import Hello

from .machine import cpu_count, fast_bfloat16, memory_available, shared_memory_works

LOOPBACK = "127.0.0.1"


def main() -> None:
    """Say what is here, wait for the invitation, serve until told to stop."""
    answers = os.dup(1)
    os.dup2(2, 1)  # what libraries print is for people
    listener = socket.create_server((LOOPBACK, 0))
    place = Place(
        cpu_count=cpu_count(),
        memory_available=memory_available(),
        fast_bfloat16=fast_bfloat16(),
        shared_memory=shared_memory_works(),
        processor=platform.processor() or platform.machine(),
        port=int(listener.getsockname()[1]),
    )
    with os.fdopen(answers, "wb") as out:
        out.write(msgspec.json.encode(place) + b"\n")
    if line := sys.stdin.buffer.readline():  # none: the parent is gone
        _serve(msgspec.json.decode(line, type=Invitation), listener)


def _serve(invitation: Invitation, listener: socket.socket) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"

    from .group import build_engine
    from .serve import serve_rank

    own = listener if invitation.rank == 0 else None
    if own is None:
        listener.close()

    def build(spec: WorkerSpec) -> object:
        return build_engine(spec, invitation.rank, invitation, own)

    hello = Hello(invitation.rank, invitation.epoch, invitation.secret)
    host = invitation.exchange_host
    serve_rank(
        invitation.step_loop,
        hello,
        build,  # type: ignore[arg-type]
        exchange_host=host,
        own_process=True,
    )


if __name__ == "__main__":
    main()
