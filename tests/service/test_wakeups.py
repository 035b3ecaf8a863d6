"""Completions of gRPC that are served together: nobody's are forgotten, and sockets of others are
as they were."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable
from typing import Any

from phalanx.controller.client import AsyncClient, Client
from phalanx.controller.wakeups import gathered


def test_other_threads_get_ordinary_sockets_meanwhile() -> None:
    made: list[tuple[socket.socket, socket.socket]] = []
    with gathered():
        thread = threading.Thread(target=lambda: made.append(socket.socketpair()))
        thread.start()
        thread.join()
    made.append(socket.socketpair())
    for read, write in made:
        with read, write:
            write.send(b"three")
            assert read.recv(1) == b"t"


def test_loops_of_several_threads_share_the_library(
    serve: Callable[..., Any], say: Callable[..., Any], words: list[int]
) -> None:
    """Whichever loop is first at the socket serves what has come for all of them."""

    async def main() -> None:
        async with serve(say(words)) as served:

            async def read_all() -> list[list[int]]:
                async with AsyncClient(address=served.address) as client:
                    asked = [client.complete("the quick") for _ in range(8)]
                    return [list(done.token_ids) for done in await asyncio.gather(*asked)]

            def alone() -> list[int]:
                with Client(address=served.address) as client:
                    return list(client.complete("the quick").token_ids)

            threads = [asyncio.to_thread(asyncio.run, read_all()) for _ in range(3)]
            answers = await asyncio.gather(read_all(), *threads, asyncio.to_thread(alone))
            assert answers == [*[[words] * 8] * 4, words]

    asyncio.run(main())
