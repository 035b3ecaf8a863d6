"""What wakes threads for gRPC, and how to have fewer of it.

`grpc.aio` has a thread that waits for completions. For each it puts a byte into a socket, of which
the event loop takes one byte a turn, although its first turn serves all that has come: the others
find nothing to do. Of a step that gives sixty streams a token, that is sixty turns of the loop.

What a client receives goes through two more threads since the library reads by its `event_engine`.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import socket
import sys
import threading
from collections.abc import Iterator
from typing import Any

AT_ONCE = 65536
EXPERIMENTS = "GRPC_EXPERIMENTS"
"""Read by the library when it is imported."""


class _Emptied(socket.socket):
    """Gives all that has come, whatever size was asked for; nothing where another loop was first."""

    __slots__ = ()

    def recv(self, size: int, flags: int = 0, /) -> bytes:
        try:
            return super().recv(AT_ONCE, flags)
        except BlockingIOError:
            return b""


@contextlib.contextmanager
def gathered() -> Iterator[None]:
    """Around the making of a `grpc.aio` server or channel, the first of which begins that thread.

    Where it runs already, or where the library has come to do without the socket, nothing changes.
    """
    pair, maker = socket.socketpair, threading.get_ident()

    def make(*arguments: Any, **named: Any) -> tuple[socket.socket, socket.socket]:
        read, write = pair(*arguments, **named)
        if threading.get_ident() == maker:
            read = _Emptied(fileno=read.detach())
        return read, write

    socket.socketpair = make
    try:
        yield
    finally:
        if socket.socketpair is make:
            socket.socketpair = pair


def read_plainly() -> None:
    """Load gRPC so that the thread which waits for what a client receives also reads it.

    To be called by who owns the process, as it counts for all channels in it, and before gRPC is
    imported; later it does nothing, nor where the environment says which experiments to use.
    """
    if "grpc" in sys.modules or EXPERIMENTS in os.environ:
        return
    os.environ[EXPERIMENTS] = "-event_engine_client"
    try:
        importlib.import_module("grpc")
    finally:
        del os.environ[EXPERIMENTS]  # children decide for themselves
