"""What a step costs beyond the computation: the step loop, the sockets, the scheduler.

    python tests/bench/step_overhead.py --tp 1 --running 1 64
    python tests/bench/step_overhead.py --running 256 --queued 0 10000

A replica with ranks in processes of their own, as the cluster has it, generates with so many
sequences at a time. Reported is `StepTimes.overhead_s` of the decode steps: the time between two
results that no rank spent computing.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import threading
import time
from collections.abc import Sequence

import numpy as np
from rich.console import Console
from rich.table import Table

from phalanx.controller.cluster.ray_cluster import RayCluster
from phalanx.controller.cluster.ray_fleet import ray_fleet
from phalanx.controller.config import ClusterConfig
from phalanx.controller.garbage import settle
from phalanx.controller.handle import ReplicaHandle
from phalanx.controller.kvcache.changes import PrefixUpdate
from phalanx.controller.model import resolve_model
from phalanx.controller.observing import StepTimes
from phalanx.controller.replica import Replica
from phalanx.controller.scheduling.request import FinishReason, Request, TokenEvent
from phalanx.controller.starting import ReplicaStarter
from phalanx.protos.errors import GroupLost
from phalanx.protos.sampling import SamplingParams

PROMPT_TOKENS = 32
WARM_UP_STEPS = 20


class Times:
    """Keeps the steps of one size."""

    def __init__(self) -> None:
        self.steps: list[StepTimes] = []

    def on_step(self, times: StepTimes) -> None:
        """A step was executed."""
        self.steps.append(times)

    def on_queue_time(self, seconds: float) -> None:
        """Not looked at."""


class Sink:
    """Stands where the engine is, and only counts the requests that have ended."""

    def __init__(self) -> None:
        self.ended = threading.Semaphore(0)

    def sink(self, events: Sequence[TokenEvent]) -> None:
        """Events of a step."""
        for event in events:
            if event.finish is not None:
                self.ended.release()

    def prefix_sink(
        self, handle: ReplicaHandle, events: Sequence[TokenEvent], update: PrefixUpdate
    ) -> None:
        """Not asked for."""

    def lost(self, handle: ReplicaHandle, error: GroupLost) -> None:
        """The replica has ended, as it does at the end of the run."""


def add(replica: Replica, name: str, prompt: Sequence[int], tokens: int) -> None:
    """One request of so many tokens."""
    params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    request = Request(request_id=name, prompt_token_ids=list(prompt), params=params, arrival=0.0)
    replica.add([request])


def run(replica: Replica, sink: Sink, times: Times, running: int, queued: int, steps: int) -> None:
    """Generate `steps` tokens with `running` requests at once, while `queued` more wait."""
    for number in range(running):
        prompt = [(7 * number + place) % 1000 for place in range(PROMPT_TOKENS)]
        add(replica, f"{running}-{queued}-{number}", prompt, steps)
    for number in range(queued):
        add(replica, f"queued-{number}", [1, 2, 3], 1)
    while replica.stats().waiting < queued:
        time.sleep(0.01)
    times.steps.clear()  # what it costs to queue them is another matter
    for _ in range(running):
        sink.ended.acquire()
    for number in range(queued):
        replica.abort(f"queued-{number}", None, FinishReason.ABORT)
    for _ in range(queued):
        sink.ended.acquire()


def summary(steps: Sequence[StepTimes], running: int, queued: int) -> dict[str, float]:
    """Of the steps in which all `running` requests, and no others, wrote a token."""
    decodes = [step for step in steps if step.rows == running == step.tokens][WARM_UP_STEPS:]
    overhead = np.array([step.overhead_s for step in decodes]) * 1e3
    execute = np.array([step.execute_s for step in decodes]) * 1e3
    p50, p99 = np.percentile(overhead, [50, 99])
    return {
        "running": running,
        "queued": queued,
        "steps": len(decodes),
        "execute_p50_ms": float(np.median(execute)),
        "overhead_p50_ms": float(p50),
        "overhead_p99_ms": float(p99),
        "overhead_share": float(overhead.sum() / (overhead.sum() + execute.sum())),
    }


def show(rows: Sequence[dict[str, float]]) -> None:
    """A table of the summaries."""
    table = Table("running", "queued", "steps", "execute p50", "overhead p50", "p99", "of a step")
    for row in rows:
        table.add_row(
            str(row["running"]),
            str(row["queued"]),
            str(row["steps"]),
            f"{row['execute_p50_ms']:.2f} ms",
            f"{row['overhead_p50_ms']:.3f} ms",
            f"{row['overhead_p99_ms']:.3f} ms",
            f"{row['overhead_share']:.1%}",
        )
    Console().print(table)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--running", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--queued", type=int, nargs="+", default=[0], help="requests that wait")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()
    config = ClusterConfig(
        model=options.model,
        tp=options.tp,
        max_running=max(options.running),
        max_queued=max(options.running) + max(options.queued) + 1,
        device="cpu",
        prefix_caching=False,
    )
    served = resolve_model(config.model)
    cluster = RayCluster(None, config.tp)
    times, sink = Times(), Sink()
    starter = ReplicaStarter(config, served, "cpu", sink, times, None, ray_fleet)
    replica = asyncio.run(starter.start(0, 0)).replica
    settle()  # as `phalanx serve` does
    rows = []
    for running in options.running:
        for queued in options.queued:
            run(replica, sink, times, running, queued, options.steps)
            rows.append(summary(times.steps, running, queued))
    replica.stop()
    cluster.close()
    if options.json:
        print(json.dumps(rows))
    else:
        show(rows)


if __name__ == "__main__":
    main()
