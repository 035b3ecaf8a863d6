"""More than can be done is asked for: tests 21 and 22.

The load comes from `harness/arrivals.py`, a process that takes little of the machine; what it takes is
written down and counted: a goodput is compared with the peak that the rest of the cores would give.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter
from typing import Any

import psutil
import pytest
from harness.arrivals import Outcome, carry_out
from harness.running import idle, percentile
from harness.server import Topology

from phalanx.controller.client import AsyncClient
from phalanx.controller.messages import generate_request
from phalanx.protos.errors import ResourceExhausted
from phalanx.protos.v1 import serving_pb2

TOPOLOGY = Topology(flags=("--max-running", "16", "--max-queued", "16"), journal=False)
TOKENS = 120
ASK: dict[str, Any] = {"max_tokens": TOKENS, "ignore_eos": True, "temperature": 0.0}
PROMPT = [5, 6, 7]
PEAK_S = 5.0
TOGETHER = 24
"""Open at a time for the peak: as many as are computed together, and half as many that wait."""
CORES = os.cpu_count() or 1
STEP_S = 0.005
GATE = pytest.mark.bar(21)
FULL = [pytest.mark.bar(21), pytest.mark.chaos]
STORM = [pytest.mark.bar(22), pytest.mark.chaos]
QUIET = 2.0
"""Load of the machine up to which rates say anything."""
BODY = generate_request(PROMPT, "", dict(ASK)).SerializeToString()


def tokens_of(body: str) -> list[int]:
    """The tokens in an answer: messages with 5 bytes before each."""
    data, found, at = bytes.fromhex(body), [], 0
    while at < len(data):
        size = int.from_bytes(data[at + 1 : at + 5], "big")
        message = serving_pb2.GenerateResponse.FromString(data[at + 5 : at + 5 + size])
        for sample in message.samples:
            assert sample.first_token_index == len(found) or not sample.token_ids
            found += sample.token_ids
        at += 5 + size
    return found


def cpu_s(process: psutil.Process) -> float:
    """That it has used, seconds."""
    return float(sum(process.cpu_times()[:2]))


async def visit(
    client: AsyncClient, expected: tuple[int, ...], held: str, over: asyncio.Event
) -> Counter[str]:
    """What our own client meets meanwhile: a request is done or refused with a time to wait, and
    who asks for what was accepted before is let in."""
    met: Counter[str] = Counter()
    while not over.is_set():
        try:
            met["done"] += (await client.complete(PROMPT, **ASK)).token_ids == expected
        except ResourceExhausted as error:
            met["refused"] += error.retry_after_s > 0
        met["asked"] += 1
        joined = await client.complete(PROMPT, request_id=held, **ASK)
        met["joined"] += joined.token_ids == expected
        await asyncio.sleep(0.5)
    return met


async def overload(server: Any, held: str, **plan: Any) -> tuple[Outcome, Outcome, dict[str, Any]]:
    """The peak, the overload, and what else was seen."""
    process = psutil.Process(server.pid)
    async with AsyncClient(server.address, timeout=300, reconnect_s=0) as client:
        expected = (await client.complete(PROMPT, request_id=held, **ASK)).token_ids
        spent = [cpu_s(process)]
        best = await asyncio.to_thread(
            carry_out, server.address, BODY, seconds=PEAK_S, open=TOGETHER
        )
        rate, before = plan.pop("times") * best.done / best.done_s, process.memory_info().rss
        spent.append(cpu_s(process))
        sending = asyncio.create_task(
            asyncio.to_thread(carry_out, server.address, BODY, rate=rate, **plan)
        )
        over = asyncio.Event()
        visitor = asyncio.create_task(visit(client, expected, held, over))
        made = await sending
        ended = time.monotonic()
        spent.append(cpu_s(process))
        grown = process.memory_info().rss - before
        over.set()
        met = await visitor
        remains = await idle(client)
        assert (await client.complete(PROMPT, **ASK)).token_ids == expected
    assert remains.blocks_free == remains.blocks_total
    assert {tuple(tokens_of(body)) for body in (*best.answers, *made.answers)} == {expected}
    served_s = (spent[1] - spent[0]) / best.done
    each_s = (spent[2] - spent[1] - made.done * served_s) / max(len(made.refused_s), 1)
    more = {"grown": grown, "met": met, "calm_s": time.monotonic() - ended, "each_s": each_s}
    return best, made, more


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("seconds", "times", "retries", "step_s", "part"),
    [
        pytest.param(4.0, 10, 0, STEP_S, 0.9, marks=GATE, id="gate"),
        pytest.param(60.0, 10, 0, STEP_S, 0.9, marks=FULL, id="minute"),
        pytest.param(30.0, 5, 3, STEP_S, 0.8, marks=STORM, id="storm"),
        pytest.param(60.0, 10, 0, 0.0, 0.7, marks=FULL, id="minute-on-the-same-cores"),
        pytest.param(30.0, 5, 3, 0.0, 0.5, marks=STORM, id="storm-on-the-same-cores"),
    ],
)
def test_what_is_taken_is_done_and_the_rest_is_told_when_to_come(
    clusters: Any,
    seed: int,
    seconds: float,
    times: float,
    retries: int,
    step_s: float,
    part: float,
    report: Any,
) -> None:
    """With ranks that take a fixed time beside the controller's cores, as devices do, and with ranks
    on the same cores, where every refusal is taken from what could be computed."""
    quiet = os.getloadavg()[0] <= QUIET
    server, held = clusters.get(TOPOLOGY), f"{clusters.name()}-held"
    server.arm("step", action="wait", seconds=step_s, stays=True)
    plan = {"seconds": seconds, "times": times, "retries": retries, "seed": seed}
    try:
        best, made, more = asyncio.run(overload(server, held, **plan))
    finally:
        server.disarm("step")
    peak, goodput = best.done / best.done_s, made.done / made.done_s
    taken = [each.cpu_s / (each.done_s or 1.0) for each in (best, made)]
    could = peak * (CORES - taken[1]) / (CORES - taken[0])
    refused_ms = 1000 * percentile(made.refused_s, 99)
    report.note(
        22 if retries else 21,
        "overload",
        step_ms=round(1000 * step_s),
        seconds=seconds,
        peak_per_s=round(peak, 1),
        goodput_per_s=round(goodput, 1),
        part_of_peak=round(goodput / peak, 2),
        part_of_what_the_other_cores_could=round(goodput / could, 2),
        calls=made.asked,
        done=made.done,
        refused=len(made.refused_s),
        ended_otherwise=made.others,
        refused_p99_ms=round(refused_ms, 1),
        cores_of_the_load=round(taken[1], 2),
        controller_cpu_ms_of_a_refusal=round(1000 * more["each_s"], 2),
        calm_after_s=round(more["calm_s"], 1),
        grown_MiB=round(more["grown"] / 2**20),
        load_of_the_machine=round(os.getloadavg()[0], 1),
        quiet=quiet,
    )
    refusals, met = len(made.refused_s), more["met"]
    assert made.others == {} and made.done + refusals == made.asked
    assert refusals and min(made.told_ms) > 0 and made.detailed == refusals
    assert met["done"] + met["refused"] == met["asked"] == met["joined"]
    assert more["grown"] < 256 * 2**20
    if quiet:
        assert goodput >= part * could
        assert refused_ms <= 50 and more["calm_s"] <= 10
