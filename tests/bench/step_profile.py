"""Step times of the real engine, as a profile for `phalanx simulate`.

    python tests/bench/step_profile.py --model smollm2 --tp 1 --output build/profile.json
    phalanx simulate --profile build/profile.json

Prompts are computed alone, in chunks of several sizes; then streams in batches of several sizes.
The profile is the least-squares fit, in relative errors, of ``base_s + tokens * token_s + streams *
stream_s`` to the steps' medians, none of the three below zero; how far it is off is reported.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

import msgspec
import numpy as np
from rich.console import Console
from rich.table import Table

from phalanx.controller.observing import StepTimes
from phalanx.controller.offline import Offline
from phalanx.controller.simulation.profile import Profile

LEAST_S = 1e-9
WARM_UP_STEPS = 3

Point = tuple[int, int]
"""Prompt tokens of a step, and streams."""


class Steps:
    """Keeps the steps that were executed."""

    def __init__(self) -> None:
        self.seen: list[StepTimes] = []

    def on_step(self, times: StepTimes) -> None:
        """A step was executed."""
        self.seen.append(times)

    def on_queue_time(self, seconds: float) -> None:
        """Not looked at."""


def seconds_of(steps: Sequence[StepTimes], rows: int, tokens: int) -> list[float]:
    """Of the steps with so many rows and tokens, but for the first ones."""
    found = [
        step.execute_s + step.overhead_s
        for step in steps
        if (step.rows, step.tokens) == (rows, tokens)
    ]
    return found[WARM_UP_STEPS:]


def fit(seconds: Mapping[Point, float]) -> tuple[float, float, float]:
    """(base_s, token_s, stream_s), each above zero, that come nearest in relative terms.

    One that would be below zero is left out, and the others are fitted again.
    """
    rows = np.array([[1.0, tokens, streams] for tokens, streams in seconds])
    target = np.array(list(seconds.values()))
    kept = [0, 1, 2]
    while True:
        scaled = rows[:, kept] / target[:, None]
        found = np.linalg.lstsq(scaled, np.ones(len(target)), rcond=None)[0]
        if (found > 0).all() or len(kept) == 1:
            break
        del kept[int(found.argmin())]
    whole = np.full(3, LEAST_S)
    whole[kept] = np.maximum(found, LEAST_S)
    base_s, token_s, stream_s = map(float, whole)
    return base_s, token_s, stream_s


def measure(model: Offline, steps: Steps, options: argparse.Namespace) -> dict[Point, float]:
    """Median seconds of steps by their size."""
    found: dict[Point, float] = {}
    for chunk in options.chunks:
        steps.seen.clear()
        for number in range(options.repeats + WARM_UP_STEPS):
            prompt = [(number * 31 + place * 7) % 1000 + 1 for place in range(chunk)]
            model.generate(prompt, max_tokens=1, temperature=0.0, ignore_eos=True)
        found[chunk, 0] = median(seconds_of(steps.seen, 1, chunk))
    for streams in options.streams:
        steps.seen.clear()
        prompts = [[number + 1] * options.context for number in range(streams)]
        tokens = options.repeats + WARM_UP_STEPS + 1
        model.generate(prompts, max_tokens=tokens, temperature=0.0, ignore_eos=True)
        if measured := seconds_of(steps.seen, streams, streams):
            found[0, streams] = median(measured)
    return found


def main() -> None:
    """Measure, fit, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--max-running", type=int, default=64)
    parser.add_argument("--max-tokens-per-step", type=int, default=512)
    parser.add_argument("--kv-tokens", type=int, default=65_536)
    parser.add_argument("--chunks", type=int, nargs="+", default=[32, 128, 256, 512])
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--context", type=int, default=128, help="tokens before each stream")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    steps = Steps()
    settings = {name: getattr(options, name) for name in ("tp", "max_running", "kv_tokens")}
    settings["max_tokens_per_step"] = options.max_tokens_per_step
    with Offline(options.model, observer=steps, prefix_caching=False, **settings) as model:
        found = measure(model, steps, options)
    base_s, token_s, stream_s = fit(found)
    profile = Profile(
        base_s=base_s,
        token_s=token_s,
        stream_s=stream_s,
        tokens_per_step=options.max_tokens_per_step,
        places=options.max_running,
        kv_tokens=options.kv_tokens,
    )
    table = Table("prompt tokens", "streams", "measured", "profile", "off by")
    for (tokens, streams), measured in found.items():
        said = profile.step_s(tokens, streams)
        off = said / measured - 1
        table.add_row(
            str(tokens),
            str(streams),
            f"{measured * 1e3:.2f} ms",
            f"{said * 1e3:.2f} ms",
            f"{off:+.0%}",
        )
    Console().print(table)
    if options.output is not None:
        options.output.write_bytes(msgspec.json.format(msgspec.json.encode(profile)) + b"\n")


if __name__ == "__main__":
    main()
