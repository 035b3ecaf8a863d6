"""Nobody makes others wait: a long prompt among short chats, a greedy tenant, shares by weight;
tests 24 and 25."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from harness.arrivals import Outcome, carry_out
from harness.running import percentile
from harness.scenarios import REAL
from harness.server import Topology

from phalanx.controller.client import AsyncClient
from phalanx.controller.messages import generate_request

QUIET = 2.0
"""Load of the machine up to which times say anything."""
GREEDY = {"ignore_eos": True, "temperature": 0.0}
LONG = Topology(
    REAL,
    flags=("--kv-tokens", "16384", "--max-tokens-per-step", "48", "--max-running", "32"),
    journal=False,
)
LONG_PROMPT = 8000
SHORTS = 16


async def read(client: AsyncClient, prompt: Sequence[int], tokens: int) -> list[tuple[float, int]]:
    """When each token came, and which."""
    found: list[tuple[float, int]] = []
    async for message in client.generate(list(prompt), max_tokens=tokens, **GREEDY):
        now = time.monotonic()
        found += [(now, token) for sample in message.samples for token in sample.token_ids]
    return found


def gaps(stream: Sequence[tuple[float, int]], since: float, until: float) -> list[float]:
    """Between messages in this time."""
    times = sorted({at for at, _ in stream if since <= at <= until})
    return [later - at for at, later in itertools.pairwise(times)]


async def among(server: Any) -> tuple[list[float], list[float], list[int]]:
    """Gaps alone, gaps beside the long prompt, and tokens of each short one meanwhile."""
    async with AsyncClient(server.address, timeout=1200) as client:
        prompts = [[50 + number, *range(100, 120)] for number in range(SHORTS)]
        alone = await asyncio.gather(*(read(client, prompt, 100) for prompt in prompts))
        shorts = [asyncio.create_task(read(client, prompt, 400)) for prompt in prompts]
        await asyncio.sleep(1.0)
        began = time.monotonic()
        [first] = await read(client, [7 + place % 5000 for place in range(LONG_PROMPT)], 1)
        beside = await asyncio.gather(*shorts)
        for one, other in zip(alone, beside, strict=True):
            assert [token for _, token in other[:100]] == [token for _, token in one]
        during = (began, first[0])
        counts = [sum(began <= at <= first[0] for at, _ in stream) for stream in beside]
        quiet = [gap for stream in alone for gap in gaps(stream, 0.0, time.monotonic())]
        return quiet, [gap for stream in beside for gap in gaps(stream, *during)], counts


@pytest.mark.bar(24)
@pytest.mark.chaos
@pytest.mark.timeout(1800)
def test_short_chats_go_on_beside_a_long_prompt(clusters: Any, report: Any) -> None:
    server, quiet = clusters.get(LONG), os.getloadavg()[0] <= QUIET
    alone, beside, counts = asyncio.run(among(server))
    ratio = percentile(beside, 99) / percentile(alone, 99)
    report.note(
        24,
        "a prompt of 8000 tokens among 16 chats",
        gap_p99_alone_ms=round(1000 * percentile(alone, 99)),
        gap_p99_beside_ms=round(1000 * percentile(beside, 99)),
        ratio=round(ratio, 2),
        tokens_meanwhile=sorted(counts),
        quiet=quiet,
    )
    # a stream has a token in every step; some had all of theirs before the prompt was done
    assert min(counts) >= min(LONG_PROMPT // (48 - SHORTS), 400 - 100) // 2
    assert max(counts) <= 1.2 * min(counts)
    assert not quiet or ratio <= 2


# --- tenants ---

TENANTS = {"greedy": "token-of-greedy", "modest": "token-of-modest"}
PROMPT = list(range(100, 228))
ASKED = 40


@pytest.fixture(scope="module")
def token_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tenants") / "tokens"
    lines = [f"{who}:{hashlib.sha256(key.encode()).hexdigest()}" for who, key in TENANTS.items()]
    path.write_text("\n".join(lines) + "\n")
    return path


def body(tokens: int) -> bytes:
    return generate_request(PROMPT, "", {"max_tokens": tokens, **GREEDY}).SerializeToString()


async def ask_now_and_then(address: str, count: int) -> tuple[list[float], set[tuple[int, ...]]]:
    """The modest tenant: times to the first token, and its answers."""
    times, answers = list[float](), set[tuple[int, ...]]()
    async with AsyncClient(address, token=TENANTS["modest"], timeout=600) as client:
        for _ in range(count):
            asked = time.monotonic()
            stream = await read(client, PROMPT, 8)
            times.append(stream[0][0] - asked)
            answers.add(tuple(token for _, token in stream))
            await asyncio.sleep(0.25)
    return times, answers


@pytest.mark.bar(25)
@pytest.mark.chaos
@pytest.mark.timeout(1800)
def test_a_greedy_tenant_does_not_double_anothers_time_to_the_first_token(
    clusters: Any, report: Any, token_file: Path
) -> None:
    flags = ("--token-file", str(token_file), "--max-running", "16", "--no-prefix-caching")
    server, quiet = clusters.get(Topology(REAL, flags=flags)), os.getloadavg()[0] <= QUIET

    async def run() -> tuple[Outcome, list[float], list[float]]:
        alone, answers = await ask_now_and_then(server.address, ASKED)
        plan = {"seconds": 60.0, "open": 100, "token": TENANTS["greedy"]}
        greedy = asyncio.create_task(asyncio.to_thread(carry_out, server.address, body(64), **plan))
        await asyncio.sleep(5.0)
        beside, more = await ask_now_and_then(server.address, ASKED)
        assert answers == more and len(answers) == 1
        return await greedy, alone, beside

    greedy, alone, beside = asyncio.run(run())
    ratio = percentile(beside, 95) / percentile(alone, 95)
    report.note(
        25,
        "a greedy tenant",
        first_token_p95_alone_ms=round(1000 * percentile(alone, 95)),
        first_token_p95_beside_ms=round(1000 * percentile(beside, 95)),
        ratio=round(ratio, 2),
        done_by_the_greedy_one=greedy.done,
        quiet=quiet,
    )
    assert greedy.others == {} and not greedy.refused_s and greedy.done > ASKED
    # a request of the greedy one waits for those before it, one of the modest one for a step or two
    assert percentile(beside, 95) < 60.0 * 100 / greedy.done / 4
    assert not quiet or ratio <= 2


@pytest.mark.bar(25)
@pytest.mark.chaos
@pytest.mark.timeout(600)
def test_tenants_get_tokens_by_their_weights(clusters: Any, report: Any, token_file: Path) -> None:
    weights = token_file.with_name("tenants.toml")
    weights.write_text("[tenants.greedy]\nweight = 3.0\n[tenants.modest]\nweight = 1.0\n")
    flags = ("--token-file", str(token_file), "--tenants-file", str(weights), "--max-running", "16")
    server = clusters.get(Topology(flags=flags, journal=False))

    async def run() -> list[Outcome]:
        plan = {"seconds": 30.0, "open": 48}
        sent = (
            asyncio.to_thread(carry_out, server.address, body(40), token=token, **plan)
            for token in TENANTS.values()
        )
        return list(await asyncio.gather(*sent))

    done = [outcome.in_time for outcome in asyncio.run(run())]
    share = done[0] / sum(done)
    report.note(25, "weights 3 and 1", done=done, share=round(share, 3))
    assert sum(done) >= 100
    assert abs(share - 0.75) <= 0.1 * 0.75
