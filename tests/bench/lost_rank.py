"""How long streams pause when a rank is killed, with and without a group that stands by.

    python tests/bench/lost_rank.py smollm2 --tp 2 --repeats 5

Prints, for each number of spares, the longest gap between two tokens of any stream in each repeat,
in seconds. Each repeat kills one rank (SIGKILL) under running streams, whose tokens must equal
those of an undisturbed run.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import time

import psutil

from phalanx.controller.app import start_cluster
from phalanx.controller.client import AsyncClient
from phalanx.controller.config import ClusterConfig

STREAMS, TOKENS = 4, 120


def computing() -> list[psutil.Process]:
    """The ranks that have a group; spares wait for their first call."""
    children = psutil.Process().children(recursive=True)
    return [child for child in children if child.name() == "ray::RankActor.run"]


def standing() -> int:
    """Ranks that stand by."""
    children = psutil.Process().children(recursive=True)
    return sum(child.name() == "ray::RankActor" for child in children)


async def measure(args: argparse.Namespace, spares: int) -> list[float]:
    """The longest gap of each repeat."""
    config = ClusterConfig(
        model=args.model,
        tp=args.tp,
        spares=spares,
        dtype="float32",
        port=0,
        metrics_port=None,
        kv_tokens=8192,
        log_level="error",
    )
    cluster = await start_cluster(config)
    gaps: list[float] = []
    async with AsyncClient(cluster.address) as client:

        async def read(number: int, came: list[int]) -> tuple[list[int], float]:
            tokens: list[int] = []
            longest, last = 0.0, None
            params = {"temperature": 0.9, "seed": number, "ignore_eos": True}
            prompt = [5, 17, 300, number]
            async for message in client.generate(prompt, max_tokens=TOKENS, **params):
                for sample in message.samples:
                    tokens += sample.token_ids
                now = time.monotonic()
                longest, last = max(longest, now - (last or now)), now
                came[number] = len(tokens)
            return tokens, longest

        async def read_all(kill_at: int | None) -> list[tuple[list[int], float]]:
            came = [0] * STREAMS
            reading = asyncio.gather(*(read(number, came) for number in range(STREAMS)))
            while kill_at is not None and min(came) < kill_at:
                await asyncio.sleep(0.002)
            if kill_at is not None:
                random.choice(computing()).kill()
            return list(await reading)

        expected = [tokens for tokens, _ in await read_all(None)]
        for _ in range(args.repeats):
            while standing() < spares * args.tp:
                await asyncio.sleep(0.2)
            await asyncio.sleep(args.settle)
            found = await read_all(random.randint(10, TOKENS // 2))
            if [tokens for tokens, _ in found] != expected:
                raise SystemExit("the tokens differ from those of an undisturbed run")
            gaps.append(max(gap for _, gap in found))
    await cluster.stop()
    return gaps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--settle", type=float, default=6.0, help="seconds for a spare to warm")
    args = parser.parse_args()
    for spares in (0, 1):
        gaps = asyncio.run(measure(args, spares))
        shown = " ".join(f"{gap:.2f}" for gap in gaps)
        print(f"spares {spares}: median {statistics.median(gaps):.2f} s of {shown}", flush=True)


if __name__ == "__main__":
    main()
