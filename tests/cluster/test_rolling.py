"""Replicas are restarted in turn, and the server is drained, under load: no request fails."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from phalanx.controller.app import DRAIN_S
from phalanx.controller.client import AsyncClient
from phalanx.protos.errors import InvalidArgument, Unavailable

SERVE = "from phalanx.controller.cli import main; main()"
READERS, TOKENS = 6, 120


class Load:
    """Readers who ask one request after the other, and compare each answer with the first."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client
        self._expected: dict[int, list[int]] = {}
        self._over = False
        self.answers = self.begun = 0
        self.longest_gap = 0.0

    async def ask(self, number: int) -> None:
        """One request to its end."""
        tokens: list[int] = []
        last = time.monotonic()
        params = {"temperature": 0.9 * (number % 2), "seed": number, "ignore_eos": True}
        prompt = [5, 17, 300, number]
        async for message in self._client.generate(prompt, max_tokens=TOKENS, **params):
            self.begun += not tokens
            for sample in message.samples:
                assert sample.first_token_index == len(tokens)
                tokens += sample.token_ids
            now = time.monotonic()
            self.longest_gap, last = max(self.longest_gap, now - last), now
        assert self._expected.setdefault(number, tokens) == tokens
        assert len(tokens) == TOKENS
        self.answers += 1

    async def run(self) -> None:
        """Until `end`."""

        async def read(number: int) -> None:
            while not self._over:
                await self.ask(number)

        await asyncio.gather(*map(read, range(READERS)))

    def end(self) -> None:
        """Let each reader finish what it has asked for."""
        self._over = True


class Server:
    """`phalanx serve` as a process of its own."""

    def __init__(self, model: Path, *flags: str) -> None:
        command = [sys.executable, "-c", SERVE, "serve", str(model), "--dtype", "float32"]
        command += ["--metrics-port", "off", "--kv-tokens", "8192", "--port", "0"]
        command += ["--log-level", "error", *flags]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        said = self.process.stdout or ()
        self.address = next(line.split()[2] for line in said if line.startswith("ready on "))


@pytest.fixture
def serve(tiny_llama: Callable[..., Path]) -> Iterator[Callable[..., Server]]:
    servers = []

    def start(*flags: str) -> Server:
        servers.append(Server(tiny_llama(), *flags))
        return servers[-1]

    yield start
    for server in servers:
        if server.process.poll() is None:
            server.process.terminate()
        server.process.communicate(timeout=90)


async def restart(client: AsyncClient, replicas: int) -> None:
    """A rolling restart; each of the old epochs' ranks is gone afterwards."""
    assert await client.restart_replicas() == replicas
    async with asyncio.timeout(120):
        while True:
            found = (await client.cluster_state()).replicas
            if all(item.state == "ready" and not item.outdated for item in found):
                return
            await asyncio.sleep(0.05)


async def roll(server: Server, replicas: int) -> Load:
    async with AsyncClient(server.address) as client:
        load = Load(client)
        reading = asyncio.create_task(load.run())
        while load.answers < READERS:
            await asyncio.sleep(0.05)
            assert not reading.done()
        before = load.answers
        await restart(client, replicas)
        load.end()
        await reading
        assert load.answers >= before + READERS
        # blocks of replicas that are gone are nobody's, those of the new ones are free
        for replica in (await client.cluster_state()).replicas:
            assert replica.kv_blocks_free == replica.kv_blocks_total
        return load


async def drain(server: Server) -> None:
    async with AsyncClient(server.address, reconnect_s=0) as client:
        load = Load(client)
        running = [asyncio.create_task(load.ask(number)) for number in range(READERS)]
        async with asyncio.timeout(60):
            while load.begun < READERS:
                await asyncio.sleep(0.002)
        os.kill(server.process.pid, signal.SIGTERM)
        begun = time.monotonic()
        refused = None
        while refused is None and not all(task.done() for task in running):
            try:
                await client.complete([1, 2, 3], max_tokens=1)
            except Unavailable as error:
                refused = error
        await asyncio.gather(*running)
        assert load.answers == READERS
        assert refused is None or (refused.retry_after_s or 0) > 0 or "connect" in str(refused)
    assert await asyncio.to_thread(server.process.wait, 90) == 0
    assert time.monotonic() - begun < DRAIN_S + 25


def test_a_rolling_restart_and_then_a_drain_lose_no_request(serve: Callable[..., Server]) -> None:
    """Two replicas restart in turn, each beside its successor or not as there is room."""
    server = serve("--replicas", "2")
    asyncio.run(roll(server, 2))
    asyncio.run(drain(server))


async def scale(server: Server) -> None:
    async with AsyncClient(server.address) as client:
        load = Load(client)
        reading = asyncio.create_task(load.run())
        for before, wanted in ((1, 2), (2, 1)):
            assert await client.scale_replicas(wanted) == before
            states: list[str] = []
            async with asyncio.timeout(120):
                while states != ["ready"] * wanted:
                    await asyncio.sleep(0.02)
                    assert not reading.done()
                    states = [item.state for item in (await client.cluster_state()).replicas]
            if wanted == 2:  # the one that leaves has streams by then
                async with asyncio.timeout(60):
                    while not (await client.cluster_state()).replicas[1].running_requests:
                        await asyncio.sleep(0.01)
        load.end()
        await reading
        assert load.answers >= READERS
        for count in (0, 3):
            with pytest.raises(InvalidArgument, match="max_replicas"):
                await client.scale_replicas(count)
        (replica,) = (await client.cluster_state()).replicas
        assert replica.kv_blocks_free == replica.kv_blocks_total


def test_a_replica_joins_and_leaves_under_load(serve: Callable[..., Server]) -> None:
    """From one to two and back: no request fails, and all tokens stay the same."""
    asyncio.run(scale(serve("--max-replicas", "2")))


@pytest.mark.slow
def test_streams_of_a_lone_replica_wait_while_it_restarts(serve: Callable[..., Server]) -> None:
    """New requests wait as well; nothing is refused."""
    asyncio.run(roll(serve("--tp", "2"), 1))
