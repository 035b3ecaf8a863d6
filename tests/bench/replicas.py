"""Conversations over several replicas of a real model: prefixes known to the router, and not.

    python tests/bench/replicas.py --replicas 3 --rounds 2 --output build/replicas.json

Every round serves the same conversations twice, each time on fresh replicas: once placed as the
cluster places requests, once by load alone, with the same predictions but no knowledge of what is
cached where. Reported are the prompt tokens found in a cache, beside what one cache without an
end would have had, and the time to the first token.

The workload is one of many users and few replicas: eight conversations for each, so that load alone
finds a history where it is one time in three. Groups of users share instructions; each begins with a
text of 500 to 1,500 tokens, so that histories have 1,000 to 3,000, and thinks for 10 s on average
between turns. Conversations begin spread over the time that they take, so their first turns, which
nobody can have cached, do not come at once. Two cores that compute some 2,200 prompt tokens a second
each are busy for a third of the time as long as histories are found, and all of it if most are not.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from phalanx.controller.benchmark.report import date_now, machine_facts, software_versions
from phalanx.controller.cluster.ray_cluster import RayCluster
from phalanx.controller.cluster.ray_fleet import ray_fleet
from phalanx.controller.config import ClusterConfig
from phalanx.controller.engine import AsyncEngine
from phalanx.controller.kvcache.prefix import PrefixNaming
from phalanx.controller.metrics import Metrics
from phalanx.controller.model import ServedModel, resolve_model
from phalanx.controller.routing.placer import Placer
from phalanx.controller.routing.router import Decision, Request
from phalanx.controller.starting import ReplicaStarter
from phalanx.controller.supervisor import Supervisor
from phalanx.protos.sampling import SamplingParams

BLOCK_TOKENS = 16


class LoadOnly(Placer):
    """Places by predicted load, and knows no prefixes."""

    def choose(
        self,
        tenant: str,
        request_id: str,
        prompt_token_ids: Sequence[int],
        request: Request,
        naming: PrefixNaming,
        *,
        reads_cache: bool = True,
        copies: bool = True,
    ) -> Decision:
        """The decision as if nothing were cached anywhere."""
        return super().choose(
            tenant, request_id, prompt_token_ids, request, naming, reads_cache=False, copies=False
        )


@dataclass(slots=True)
class Counts:
    """What came of one round."""

    first_s: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    oracle_tokens: int = 0
    _seen: set[tuple[int, ...]] = field(default_factory=set)

    def expect(self, prompt: Sequence[int]) -> None:
        """Count what an endless cache would have of a prompt, which it then has all of, as if
        nothing took time."""
        self.prompt_tokens += len(prompt)
        for stop in range(BLOCK_TOKENS, len(prompt), BLOCK_TOKENS):
            if tuple(prompt[:stop]) not in self._seen:
                break
            self.oracle_tokens += BLOCK_TOKENS
        self.remember(prompt)

    def remember(self, tokens: Sequence[int]) -> None:
        """All of it is cached from now on."""
        stops = range(BLOCK_TOKENS, len(tokens) + 1, BLOCK_TOKENS)
        self._seen.update(tuple(tokens[:stop]) for stop in stops)


async def converse(
    engine: AsyncEngine, counts: Counts, options: argparse.Namespace, number: int
) -> None:
    """One conversation, turn after turn."""
    random = Random(number)
    shared = Random(number % options.instructions)
    tokens = [shared.randrange(1000, 20_000) for _ in range(options.instruction_tokens)]
    first_tokens = random.randint(options.first_tokens // 2, options.first_tokens * 3 // 2)
    tokens += [random.randrange(1000, 20_000) for _ in range(first_tokens)]
    await asyncio.sleep(random.uniform(0.0, options.pause * (options.turns - 1)))
    params = SamplingParams(max_tokens=options.output_tokens, temperature=0.0, ignore_eos=True)
    for turn in range(options.turns):
        if turn:
            await asyncio.sleep(random.expovariate(1 / options.pause))
        tokens += [random.randrange(1000, 20_000) for _ in range(options.turn_tokens)]
        counts.expect(tokens)
        began, first, answer = time.monotonic(), 0.0, list[int]()
        async for events in engine.submit(
            request_id=f"{number}-{turn}",
            prompt_token_ids=list(tokens),
            params=params,
            tenant="users",
            deadline=None,
        ):
            first = first or time.monotonic() - began
            counts.cached_tokens += sum(event.cached_prompt_tokens for event in events)
            answer += [token.token_id for event in events for token in event.tokens]
        counts.first_s.append(first)
        tokens += answer
        counts.remember(tokens[:-1])


async def serve(
    config: ClusterConfig, served: ServedModel, placer: Placer, options: argparse.Namespace
) -> Counts:
    """All conversations on fresh replicas."""
    engine = AsyncEngine(served.spec, config.replicas, placer)
    starter = ReplicaStarter(config, served, "cpu", engine, Metrics(), None, ray_fleet)
    supervisor = Supervisor(engine, config.replicas, starter.start)
    await supervisor.start_all()
    try:
        # a request to each replica first, so that all have been measured
        warm = Counts()
        quick = argparse.Namespace(**vars(options) | {"turns": 1, "pause": 0.01})
        await asyncio.gather(
            *(converse(engine, warm, quick, -1 - index) for index in range(2 * config.replicas))
        )
        # what is cached by now is so for the oracle as well
        counts = Counts(_seen=warm._seen)
        await asyncio.gather(
            *(converse(engine, counts, options, index) for index in range(options.conversations))
        )
    finally:
        await supervisor.close()
    return counts


def figures(counts: Counts) -> dict[str, float]:
    """What is compared."""
    p50, p95 = np.percentile(counts.first_s, [50, 95])
    return {
        "requests": len(counts.first_s),
        "hit_rate": counts.cached_tokens / counts.prompt_tokens,
        "oracle_hit_rate": counts.oracle_tokens / counts.prompt_tokens,
        "ttft_p50_s": float(p50),
        "ttft_p95_s": float(p95),
        "ttft_mean_s": float(np.mean(counts.first_s)),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--replicas", type=int, default=3)
    parser.add_argument("--conversations", type=int, default=24)
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--instructions", type=int, default=6, help="different beginnings")
    parser.add_argument("--instruction-tokens", type=int, default=512)
    parser.add_argument("--first-tokens", type=int, default=1000, help="mean of the first message")
    parser.add_argument("--turn-tokens", type=int, default=96)
    parser.add_argument("--output-tokens", type=int, default=48)
    parser.add_argument("--pause", type=float, default=10.0, help="mean seconds between turns")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    config = ClusterConfig(
        model=options.model,
        tp=1,
        threads=1,
        replicas=options.replicas,
        device="cpu",
        block_size=BLOCK_TOKENS,
        max_context=4096,
        kv_tokens=49_152,
    )
    served = resolve_model(config.model, config.max_context)
    cluster = RayCluster(None, config.replicas)
    table = Table("placed by", "requests", "hits", "of", "TTFT p50", "p95", "mean")
    rounds: list[dict[str, Any]] = []
    for _ in range(options.rounds):
        for name, placer in (("prefix and load", Placer()), ("load alone", LoadOnly())):
            found = figures(asyncio.run(serve(config, served, placer, options)))
            rounds.append({"placed_by": name, **found})
            table.add_row(
                name,
                str(found["requests"]),
                f"{found['hit_rate']:.1%}",
                f"{found['oracle_hit_rate']:.1%}",
                f"{found['ttft_p50_s'] * 1e3:.0f} ms",
                f"{found['ttft_p95_s'] * 1e3:.0f} ms",
                f"{found['ttft_mean_s'] * 1e3:.0f} ms",
            )
    cluster.close()
    Console().print(table)
    if options.output is not None:
        report = {"date": date_now(), "machine": machine_facts(), "software": software_versions()}
        settings = {key: value for key, value in vars(options).items() if key != "output"}
        text = json.dumps(report | {"settings": settings, "rounds": rounds}, indent=1)
        options.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
