"""What the runs amount to: medians, spreads, ratios of the same round, and the goals."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from peers.systems import our_name
from peers.workloads import COLD, FIRST, LONG, PREFILL, SHARED, SINGLE, STREAMS, Workload

Value = float | None


@dataclass
class Figures:
    """Everything measured so far. `runs[workload][system][round]` is a driver's answer."""

    runs: dict[str, dict[str, dict[int, dict[str, Any]]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(dict))
    )
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    start_s: dict[str, float] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    limits: list[dict[str, float]] = field(default_factory=list)
    forms: dict[str, dict[str, Any]] = field(default_factory=dict)
    agreement: dict[str, int] = field(default_factory=dict)
    scheduler: list[dict[str, Any]] = field(default_factory=list)

    def values(self, workload: Workload, system: str) -> dict[int, float]:
        """Round to the workload's metric."""
        runs = self.runs.get(workload.name, {}).get(system, {})
        return {number: workload.value(answer) for number, answer in runs.items()}

    def median(self, workload: Workload, system: str) -> Value:
        """Over the rounds; None when there was none."""
        values = self.values(workload, system).values()
        return statistics.median(values) if values else None

    def ratio(self, workload: Workload, system: str, other: str) -> Value:
        """How much better `system` is: the median of ratios of the same round, where both ran in
        one; else the ratio of medians."""
        ours, theirs = self.values(workload, system), self.values(workload, other)
        both = sorted(set(ours) & set(theirs))
        if not ours or not theirs:
            return None
        if both:
            ratio = statistics.median(ours[number] / theirs[number] for number in both)
        else:
            ratio = statistics.median(ours.values()) / statistics.median(theirs.values())
        return 1 / ratio if workload.metric == FIRST else ratio

    def limit(self, name: str) -> Value:
        """The best that the machine has shown."""
        return max((item[name] for item in self.limits), default=None)

    def bandwidth_share(self, system: str) -> Value:
        """Weights read a second while one stream is written, as a part of what the machine reads."""
        weights, limit = (
            self.facts.get(system, {}).get("weight_bytes"),
            self.limit("read_bytes_per_s"),
        )
        runs = self.runs.get(SINGLE.name, {}).get(system, {}).values()
        if not weights or not limit or not runs:
            return None
        rates = [
            (SINGLE.output - 1) / (answer["seconds"] - answer["first_s"][0]) for answer in runs
        ]
        return statistics.median(rates) * weights / limit


@dataclass(frozen=True)
class Goal:
    """A goal and what was reached; `least`: more is better."""

    text: str
    wanted: float
    reached: Value
    least: bool = True

    @property
    def met(self) -> bool | None:
        """None: not measured."""
        if self.reached is None:
            return None
        return self.reached >= self.wanted if self.least else self.reached <= self.wanted


BFLOAT16, INT8, SPLIT = (
    our_name(*form) for form in (("bfloat16", 1), ("int8", 1), ("bfloat16", 2))
)
VLLM, LLAMA, SERVED = "vLLM CPU", "llama.cpp", f"{BFLOAT16}, gRPC"


def goals(figures: Figures) -> list[Goal]:
    """The project's goals for speed on CPUs."""
    ratio: Callable[..., Value] = figures.ratio
    limit, tail = figures.scheduler, None
    cold, shared = figures.median(COLD, BFLOAT16), figures.median(SHARED, BFLOAT16)
    if limit:
        tail = max(row["overhead_p99_ms"] for row in limit)
    flat = None
    if len(limit) > 1:
        flat = limit[-1]["overhead_p50_ms"] / limit[0]["overhead_p50_ms"]
    served = ratio(STREAMS, SERVED, f"{BFLOAT16}, beside gRPC")
    start = figures.facts.get(SERVED, {}).get("serve_first_token_s")
    return [
        Goal("single stream, bfloat16, against vLLM CPU", 2.0, ratio(SINGLE, BFLOAT16, VLLM)),
        Goal(
            "single stream, bfloat16, part of the read bandwidth",
            0.75,
            figures.bandwidth_share(BFLOAT16),
        ),
        Goal("single stream, int8, against llama.cpp's best", 1.3, ratio(SINGLE, INT8, LLAMA)),
        Goal("64 streams, bfloat16, against vLLM CPU", 1.5, ratio(STREAMS, BFLOAT16, VLLM)),
        Goal("64 streams, int8, against vLLM CPU bfloat16", 2.2, ratio(STREAMS, INT8, VLLM)),
        Goal("prefill 64 x 128, against vLLM CPU", 1.2, ratio(PREFILL, BFLOAT16, VLLM)),
        Goal("prefill 1 x 4096, against vLLM CPU", 1.2, ratio(LONG, BFLOAT16, VLLM)),
        Goal("64 streams through gRPC, against offline", 0.9, served),
        Goal(
            "first token with 1k tokens shared, against cold",
            0.15,
            None if cold is None or shared is None else shared / cold,
            least=False,
        ),
        Goal("step overhead p99, ms, 256 running, 0 and 10,000 queued", 1.0, tail, least=False),
        Goal("the same, p50 with 10,000 queued against none", 1.25, flat, least=False),
        Goal(
            "2 ranks against 1 with 2 threads, single stream", 0.85, ratio(SINGLE, SPLIT, BFLOAT16)
        ),
        Goal("2 ranks against 1 with 2 threads, 64 streams", 0.85, ratio(STREAMS, SPLIT, BFLOAT16)),
        Goal("phalanx serve to the first token, s", 12.0, start, least=False),
    ]
