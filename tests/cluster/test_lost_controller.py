"""The controller is killed while its streams run, and started again with the same journal."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from phalanx.controller.client import AsyncClient

STREAMS = 16
TOKENS = 100
SERVE = "from phalanx.controller.cli import main; main()"


class Server:
    """`phalanx serve` as a process of its own, on one port and one journal."""

    def __init__(self, model: Path, journal: Path) -> None:
        self._command = [sys.executable, "-c", SERVE, "serve", str(model), "--tp", "2"]
        self._command += ["--dtype", "float32", "--metrics-port", "off", "--kv-tokens", "4096"]
        self._command += ["--max-tokens-per-step", "64", "--log-level", "error"]
        self._command += ["--journal", str(journal)]
        self._port = "0"
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> str:
        """Its address, once it is ready."""
        command = [*self._command, "--port", self._port]
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        said = []
        for line in self._process.stdout or ():
            said.append(line)
            if line.startswith("ready on "):
                address = line.split()[2]
                self._port = address.rpartition(":")[2]
                return address
        raise AssertionError("".join(said))

    def kill(self) -> None:
        """SIGKILL; returns when its ranks are gone as well."""
        if self._process is None:
            raise AssertionError("it was not started")
        family = psutil.Process(self._process.pid).children(recursive=True)
        ranks = [item for item in family if item.name().startswith("ray::RankActor")]
        os.kill(self._process.pid, signal.SIGKILL)
        self._process.communicate()
        assert len(ranks) == 2
        _, left = psutil.wait_procs(ranks, timeout=30)
        assert [item for item in left if item.status() != psutil.STATUS_ZOMBIE] == []

    def stop(self) -> None:
        """SIGTERM; nothing to do for one that is not there."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            self._process.communicate(timeout=60)


@dataclass
class Answer:
    """What a reader has got of one sample."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[float] = field(default_factory=list)
    end: tuple[int, str] = (0, "")


Answers = dict[tuple[int, int], Answer]


def asked(number: int) -> dict[str, Any]:
    """Greedy and drawn, with penalties, log-probabilities, stop strings and several samples."""
    params: dict[str, Any] = {"max_tokens": TOKENS, "seed": number, "ignore_eos": True}
    params["temperature"] = 0.9 if number % 2 else 0.0
    if number % 3 == 0:
        params |= {"repetition_penalty": 1.1, "frequency_penalty": 0.3, "logprobs": 2}
    if number % 4 == 3:
        params["n"] = 2
    if number % 5 == 0:
        params |= {"stop": ["e", "qu"], "min_tokens": TOKENS // 2}
    return params


async def read(client: AsyncClient, number: int, answers: Answers) -> None:
    """One stream, by a loop as a user writes it."""
    prompt = [5 + (number * 31 + place) % 400 for place in range(100)]
    async for message in client.generate(prompt, **asked(number)):
        for sample in message.samples:
            answer = answers.setdefault((number, sample.index), Answer())
            if sample.token_ids:
                assert sample.first_token_index == len(answer.tokens)
            answer.tokens += sample.token_ids
            answer.text += sample.text
            answer.logprobs += [item.token.logprob for item in sample.logprobs]
            if sample.finish_reason:
                assert answer.end == (0, "")
                answer.end = (sample.finish_reason, sample.stop_reason)


async def read_all(client: AsyncClient, answers: Answers) -> None:
    await asyncio.gather(*(read(client, number, answers) for number in range(STREAMS)))


async def tokens_come(answers: Answers, count: int) -> None:
    """Return when so many tokens have come, over all streams."""
    async with asyncio.timeout(60):
        while sum(len(answer.tokens) for answer in answers.values()) < count:
            await asyncio.sleep(0.002)


@pytest.fixture
def server(tiny_llama: Callable[..., Path], tmp_path: Path) -> Iterator[Server]:
    made = Server(tiny_llama(), tmp_path / "journal")
    yield made
    made.stop()


async def disturb(server: Server, kills: tuple[int, ...]) -> None:
    """Kill it whenever so many tokens have come since the last time; compare the answers."""
    address = await asyncio.to_thread(server.start)
    async with AsyncClient(address, timeout=400) as client:
        expected: Answers = {}
        await read_all(client, expected)
        answers: Answers = {}
        reading = asyncio.create_task(read_all(client, answers))
        seen = 0
        for count in kills:
            await tokens_come(answers, seen + count)
            await asyncio.to_thread(server.kill)
            assert not reading.done()
            await asyncio.to_thread(server.start)
            seen = sum(len(answer.tokens) for answer in answers.values())
        await reading
        assert answers == expected
        assert {answer.end[0] for answer in answers.values()} == {1, 2}
        await all_free(client)


async def all_free(client: AsyncClient) -> None:
    ends = time.monotonic() + 20
    while time.monotonic() < ends:
        [replica] = (await client.cluster_state()).replicas
        if replica.kv_blocks_free == replica.kv_blocks_total:
            return
        await asyncio.sleep(0.05)
    raise AssertionError("blocks are still held")


def test_a_killed_controller_loses_nothing(server: Server) -> None:
    """In the midst of decoding: no token lost, repeated or changed, and no rank left behind."""
    asyncio.run(disturb(server, (300,)))


@pytest.mark.slow
def test_kills_during_prefill_and_twice_in_a_row_lose_nothing(server: Server) -> None:
    """After the first token most prompts are not computed yet; then again, just restarted."""
    asyncio.run(disturb(server, (1, 1, 200)))
