"""A rank's life: connect, say hello, load, execute plans until told to stop."""

from __future__ import annotations

import socket
from collections.abc import Callable

from phalanx.protos.errors import GroupLost, PhalanxError
from phalanx.protos.specs import WorkerSpec
from phalanx.protos.steps import StepPlan
from phalanx.protos.wire import Failed, Hello, Progress, Start, Stop, encode, read_to_rank

from .engine import Engine

PROGRESS_MESSAGES = 100
"""About how many progress messages a rank sends while loading."""


def serve_rank(
    address: tuple[str, int],
    hello: Hello,
    build: Callable[[WorkerSpec], Engine],
) -> None:
    """Connect to the step loop at `address` and serve it until it says `Stop`.

    `build` makes the engine from its spec (group, threads and kernels are its business). An
    error is told to the step loop before it is raised here.
    """
    with socket.create_connection(address) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(encode(hello))
        try:
            _serve(connection, hello.rank, build)
        except PhalanxError as error:
            _tell(connection, type(error).__name__, str(error))
            raise
        except Exception as error:
            _tell(connection, "GroupLost", f"{type(error).__name__}: {error}")
            raise


def _tell(connection: socket.socket, kind: str, message: str) -> None:
    try:
        connection.sendall(encode(Failed(kind, message)))
    except OSError:
        return  # the step loop is gone; the raised error is all that is left to say


def _serve(connection: socket.socket, rank: int, build: Callable[[WorkerSpec], Engine]) -> None:
    start = read_to_rank(connection)
    if isinstance(start, Stop):
        return
    if not isinstance(start, Start):
        raise GroupLost(f"{type(start).__name__} came before Start")
    engine = build(start.spec)
    told = 0

    def progress(done: int, total: int) -> None:
        nonlocal told
        if done * PROGRESS_MESSAGES >= told * total:
            told = done * PROGRESS_MESSAGES // max(total, 1) + 1
            connection.sendall(encode(Progress(done, total)))

    connection.sendall(encode(engine.load(progress)))
    while isinstance(message := read_to_rank(connection), StepPlan):
        result = engine.step(message)
        if rank == 0:
            connection.sendall(encode(result))
    if not isinstance(message, Stop):
        raise GroupLost(f"{type(message).__name__} came instead of a plan")
