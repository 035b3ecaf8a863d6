"""Running streams handed over: a replica that holds all of them is drained to another one.

    python tests/bench/handover.py --streams 32 --rounds 3 --output build/handover.json

Each round begins all streams on one replica, drains it once another one is there, and compares
every token with a run in which nothing moved. The gap of a moved stream is the longest time between two
of its messages around the drain, as its reader sees it; beside it stands the longest time between
two messages of the same streams in the undisturbed run.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from phalanx.controller.benchmark.report import date_now, machine_facts, software_versions
from phalanx.controller.cluster.ray_cluster import RayCluster
from phalanx.controller.cluster.ray_fleet import ray_fleet
from phalanx.controller.config import ClusterConfig
from phalanx.controller.engine import AsyncEngine
from phalanx.controller.handle import ReplicaHandle
from phalanx.controller.metrics import Metrics
from phalanx.controller.model import ServedModel, resolve_model
from phalanx.controller.starting import ReplicaStarter
from phalanx.protos.sampling import SamplingParams


@dataclass
class Reader:
    """One stream, read."""

    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    """When each message came."""

    def gap(self, since: float = 0.0, until: float = float("inf")) -> float:
        """The longest time between two messages, of those that reach into [since, until]."""
        pairs = zip(self.times, self.times[1:], strict=False)
        gaps = [b - a for a, b in pairs if b >= since and a <= until]
        return max(gaps, default=0.0)


async def read(engine: AsyncEngine, name: str, number: int, options: Any, reader: Reader) -> None:
    """One request: every other one greedy, the others sampled."""
    prompt = [1000 + (7 * number + 13 * place) % 5000 for place in range(options.prompt_tokens)]
    params = SamplingParams(
        max_tokens=options.output_tokens,
        temperature=0.9 * (number % 2),
        seed=number,
        ignore_eos=True,
    )
    async for events in engine.submit(
        request_id=name, prompt_token_ids=prompt, params=params, tenant="users", deadline=None
    ):
        reader.times.append(time.monotonic())
        reader.tokens += [token.token_id for event in events for token in event.tokens]


async def stream_all(
    engine: AsyncEngine, label: str, options: Any, target: ReplicaHandle | None = None
) -> tuple[list[Reader], dict[str, float]]:
    """All streams at once; in their midst `target` joins, and the other replica is drained."""
    readers = [Reader() for _ in range(options.streams)]
    figures: dict[str, float] = {}
    async with asyncio.TaskGroup() as tasks:
        for number, reader in enumerate(readers):
            tasks.create_task(read(engine, f"{label}-{number}", number, options, reader))
        if target is not None:
            while min(len(reader.tokens) for reader in readers) < options.before:
                await asyncio.sleep(0.01)
            [source] = engine.replicas
            await engine.adopt(target)
            began = time.monotonic()
            report = await engine.drain(source.index)
            figures = {
                "began": began,
                "ended": time.monotonic(),
                "moved": report.moved,
                "recomputed": report.recomputed,
            }
    return readers, figures


async def measure(config: ClusterConfig, served: ServedModel, options: Any) -> list[dict[str, Any]]:
    """The rounds, to and fro between two slots."""
    rounds: list[dict[str, Any]] = []
    engine = AsyncEngine(served.spec, config.replicas, copy_prefixes=False)
    starter = ReplicaStarter(config, served, "cpu", engine, Metrics(), None, ray_fleet)
    source = await starter.start(0, 0)
    await engine.adopt(source)
    try:
        calm, _ = await stream_all(engine, "calm", options)
        for number in range(options.rounds):
            target = await starter.start((number + 1) % 2, number + 1)
            moved, drained = await stream_all(engine, f"round-{number}", options, target)
            rounds.append(compare(engine, calm, moved, drained))
            await asyncio.to_thread(source.replica.stop)
            source = target
    finally:
        for handle in engine.replicas:
            await asyncio.to_thread(handle.replica.stop)
    return rounds


def compare(
    engine: AsyncEngine, calm: list[Reader], moved: list[Reader], drained: dict[str, float]
) -> dict[str, Any]:
    """What a drain did to the streams."""
    since, until = drained["began"], drained["ended"] + 1.0
    for kept in engine.moves():
        if kept.move.error:
            print(kept.request_id, kept.move)
    done = [kept.move for kept in engine.moves() if kept.move.reason == "drain"]
    done = [move for move in done if move.outcome == "moved"][-int(drained["moved"]) :]
    gaps = [reader.gap(since, until) for reader in moved]
    usual = [reader.gap() for reader in calm]
    p50, p95 = np.percentile(gaps, [50, 95])
    return {
        "streams": len(moved),
        "moved": int(drained["moved"]),
        "recomputed": int(drained["recomputed"]),
        "lost": sum(len(a.tokens) != len(b.tokens) for a, b in zip(calm, moved, strict=True)),
        "other_tokens": sum(a.tokens != b.tokens for a, b in zip(calm, moved, strict=True)),
        "errors": len({kept.move.error for kept in engine.moves()} - {""}),
        "drain_s": drained["ended"] - drained["began"],
        "mib": sum(move.num_bytes for move in done) / 2**20,
        "gap_p50_s": float(p50),
        "gap_p95_s": float(p95),
        "calm_gap_p95_s": float(np.percentile(usual, 95)),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--streams", type=int, default=32, help="all on one replica")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=160)
    parser.add_argument("--before", type=int, default=24, help="tokens before the drain")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    config = ClusterConfig(
        model=options.model,
        tp=1,
        threads=1,
        replicas=2,
        device="cpu",
        max_context=1024,
        kv_tokens=32_768,
        max_running=64,
    )
    served = resolve_model(config.model, config.max_context)
    cluster = RayCluster(None, config.replicas)
    rounds = asyncio.run(measure(config, served, options))
    cluster.close()
    table = Table(*rounds[0])
    for found in rounds:
        table.add_row(*(f"{v:.3f}" if isinstance(v, float) else str(v) for v in found.values()))
    Console(width=150).print(table)
    if options.output is not None:
        report = {"date": date_now(), "machine": machine_facts(), "software": software_versions()}
        settings = {key: value for key, value in vars(options).items() if key != "output"}
        text = json.dumps(report | {"settings": settings, "rounds": rounds}, indent=1)
        options.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
