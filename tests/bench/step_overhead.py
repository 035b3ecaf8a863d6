"""What a step costs beyond the computation: the step loop, the sockets, the scheduler.

    python tests/bench/step_overhead.py --tp 1 --running 1 64

A replica with ranks in processes of their own, as the cluster has it, generates with so many
sequences at a time. Reported is `StepTimes.overhead_s` of the decode steps: the time between two
results that no rank spent computing.
"""

from __future__ import annotations

import argparse
import threading

import numpy as np
from rich.console import Console
from rich.table import Table

from phalanx.controller.cluster.ray_fleet import RayCluster, RayFleet
from phalanx.controller.cluster.sizing import size_group
from phalanx.controller.config import ClusterConfig
from phalanx.controller.kvcache.manager import KVCacheManager
from phalanx.controller.model import ServedModel, resolve_model
from phalanx.controller.observing import StepTimes
from phalanx.controller.replica import Replica
from phalanx.controller.scheduling.request import Request, TokenEvent
from phalanx.controller.scheduling.scheduler import Scheduler, SchedulerConfig
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


def start(config: ClusterConfig, served: ServedModel) -> tuple[RayFleet, Scheduler]:
    """Ranks that have loaded, and the scheduler of their KV pool."""
    fleet = RayFleet(
        config.tp,
        "cpu",
        placement=config.placement,
        collectives=config.collectives,
        threads=config.threads,
        replicas=1,
        start_timeout_s=config.start_timeout_s,
        step_timeout_s=config.step_timeout_s,
        silence_timeout_s=config.silence_timeout_s,
    )
    spec, memory = size_group(config, served, "cpu", fleet.reserve())
    fleet.start(spec, lambda rank, done, total: None)
    limits = SchedulerConfig(
        max_tokens_per_step=config.max_tokens_per_step,
        max_running=config.max_running,
        max_queued=config.max_queued,
        max_context=served.max_context,
        eos_token_ids=served.eos_token_ids,
        max_in_flight=config.max_in_flight,
    )
    cache = KVCacheManager(memory.cache.num_blocks, memory.cache.block_size, prefix_caching=False)
    return fleet, Scheduler(limits, cache)


def run(replica: Replica, done: threading.Semaphore, running: int, steps: int) -> None:
    """Generate `steps` tokens with `running` requests at once."""
    params = SamplingParams(max_tokens=steps, temperature=0.0, ignore_eos=True)
    for number in range(running):
        prompt = [(7 * number + place) % 1000 for place in range(PROMPT_TOKENS)]
        request = Request(
            request_id=f"{running}-{number}", prompt_token_ids=prompt, params=params, arrival=0.0
        )
        replica.add([request])
    for _ in range(running):
        done.acquire()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--running", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--steps", type=int, default=400)
    options = parser.parse_args()
    config = ClusterConfig(model=options.model, tp=options.tp, max_running=max(options.running))
    served = resolve_model(config.model)
    cluster = RayCluster(None, config.tp)
    fleet, scheduler = start(config, served)
    times, done = Times(), threading.Semaphore(0)

    def sink(events: object) -> None:
        for event in events if isinstance(events, list) else ():
            if isinstance(event, TokenEvent) and event.finish is not None:
                done.release()

    replica = Replica(
        scheduler,
        fleet,
        sink,
        max_in_flight=config.max_in_flight,
        step_timeout_s=config.step_timeout_s,
        observer=times,
    )
    replica.start()
    table = Table("running", "steps", "execute p50", "overhead p50", "overhead p99", "of a step")
    for running in options.running:
        times.steps.clear()
        run(replica, done, running, options.steps)
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
