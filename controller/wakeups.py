"""One turn of the event loop for all of gRPC's completions that are there, rather than one for each.

`grpc.aio` has a thread that waits for completions. For each it puts a byte into a socket, of which
the event loop takes one byte a turn, although its first turn serves all that has come: the others
find nothing to do. Of a step that gives sixty streams a token, that is sixty turns of the loop.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from typing import Any

AT_ONCE = 65536


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
