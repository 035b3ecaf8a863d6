"""Completions of gRPC that are served together: nobody's are forgotten, and sockets of others are
as they were."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest

from phalanx.controller.client import AsyncClient, Client
from phalanx.controller.wakeups import gathered

WORDS = "the quick brown fox jumps over the lazy dog while forty-two geese say hello to the world"


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


@pytest.mark.parametrize("given", [None, "", "-tcp_frame_size_tuning"])
def test_a_process_that_reads_plainly_reads(
    given: str | None, serve: Callable[..., Any], say: Callable[..., Any], words: list[int]
) -> None:
    """And its environment is as it was, for its children."""
    program = """
import os, sys
from phalanx.controller.wakeups import read_plainly
read_plainly()
from phalanx.controller.client import Client
with Client(sys.argv[1]) as client:
    print(client.complete("the quick").text, os.environ.get("GRPC_EXPERIMENTS"), sep="|")
"""
    environment = {name: os.environ[name] for name in os.environ if name != "GRPC_EXPERIMENTS"}
    if given is not None:
        environment["GRPC_EXPERIMENTS"] = given

    async def main() -> str:
        async with serve(say(words)) as served:
            command = [sys.executable, "-c", program, served.address]
            done = await asyncio.to_thread(
                subprocess.run, command, env=environment, capture_output=True, text=True, timeout=60
            )
            assert done.stderr == ""
            return str(done.stdout)

    assert asyncio.run(main()) == f"{WORDS}|{given}\n"


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
