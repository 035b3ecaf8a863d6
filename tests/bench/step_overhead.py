"""What a step costs beyond the computation: the step loop, the sockets, the scheduler.

    python tests/bench/step_overhead.py --tp 1 --running 1 64

A replica with ranks in processes of their own, as the cluster has it, generates with so many
sequences at a time. Reported is `StepTimes.overhead_s` of the decode steps: the time between two
results that no rank spent computing.
"""

from __future__ import annotations

import argparse
import asyncio
import threading
from collections.abc import Sequence

import numpy as np
from rich.console import Console
from rich.table import Table

from phalanx.controller.cluster.ray_fleet import RayCluster, ray_fleet
from phalanx.controller.config import ClusterConfig
from phalanx.controller.handle import ReplicaHandle
from phalanx.controller.kvcache.changes import PrefixUpdate
from phalanx.controller.model import resolve_model
from phalanx.controller.observing import StepTimes
from phalanx.controller.replica import Replica
from phalanx.controller.scheduling.request import Request, TokenEvent
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


def run(replica: Replica, ended: threading.Semaphore, running: int, steps: int) -> None:
    """Generate `steps` tokens with `running` requests at once."""
    params = SamplingParams(max_tokens=steps, temperature=0.0, ignore_eos=True)
    for number in range(running):
        prompt = [(7 * number + place) % 1000 for place in range(PROMPT_TOKENS)]
        request = Request(
            request_id=f"{running}-{number}", prompt_token_ids=prompt, params=params, arrival=0.0
        )
        replica.add([request])
    for _ in range(running):
        ended.acquire()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--running", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--steps", type=int, default=400)
    options = parser.parse_args()
    config = ClusterConfig(
        model=options.model,
        tp=options.tp,
        max_running=max(options.running),
        device="cpu",
        prefix_caching=False,
    )
    served = resolve_model(config.model)
    cluster = RayCluster(None, config.tp)
    times, sink = Times(), Sink()
    starter = ReplicaStarter(config, served, "cpu", sink, times, None, ray_fleet)
    replica = asyncio.run(starter.start(0, 0)).replica
    table = Table("running", "steps", "execute p50", "overhead p50", "overhead p99", "of a step")
    for running in options.running:
        times.steps.clear()
        run(replica, sink.ended, running, options.steps)
        decodes = [step for step in times.steps if step.rows == running == step.tokens]
        decodes = decodes[WARM_UP_STEPS:]
        overhead = np.array([step.overhead_s for step in decodes]) * 1e3
        execute = np.array([step.execute_s for step in decodes]) * 1e3
        p50, p99 = np.percentile(overhead, [50, 99])
        share = overhead.sum() / (overhead.sum() + execute.sum())
        table.add_row(
            str(running),
            str(len(decodes)),
            f"{np.median(execute):.2f} ms",
            f"{p50:.3f} ms",
            f"{p99:.3f} ms",
            f"{share:.1%}",
        )
    replica.stop()
    cluster.close()
    Console().print(table)


if __name__ == "__main__":
    main()
