"""What the attempts amount to: percentiles, throughput, and every failure."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .load import Attempt


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """A sample of times, in seconds."""

    count: int
    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Percentile of an ascending sample, interpolated linearly between neighbours
    (Hyndman and Fan's type 7)."""
    place = (len(ordered) - 1) * percent / 100
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def summarise(values: Iterable[float | None]) -> Summary | None:
    """The sample's summary, without its Nones; None when nothing is left."""
    ordered = sorted(value for value in values if value is not None)
    if not ordered:
        return None
    return Summary(
        count=len(ordered),
        mean=math.fsum(ordered) / len(ordered),
        p50=percentile(ordered, 50),
        p90=percentile(ordered, 90),
        p95=percentile(ordered, 95),
        p99=percentile(ordered, 99),
        max=ordered[-1],
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """Times are of completed requests; throughput counts their tokens over the whole duration,
    from the first request due to the last end. `statuses` counts all, failures included."""

    duration_s: float
    sent: int
    completed: int
    short: int
    statuses: dict[str, int]
    errors: dict[str, str]
    prompt_tokens: int
    output_tokens: int
    time_to_first_token_s: Summary | None
    inter_token_latency_s: Summary | None
    time_per_output_token_s: Summary | None
    latency_s: Summary | None
    send_delay_s: Summary | None
    """How late the client sent requests; more than a little means that it was itself too slow."""

    @property
    def failed(self) -> int:
        """Requests without a proper end."""
        return self.sent - self.completed

    @property
    def requests_per_s(self) -> float:
        """Completed requests a second."""
        return self._rate(self.completed)

    @property
    def prompt_tokens_per_s(self) -> float:
        """Tokens read a second."""
        return self._rate(self.prompt_tokens)

    @property
    def output_tokens_per_s(self) -> float:
        """Tokens written a second."""
        return self._rate(self.output_tokens)

    def _rate(self, count: int) -> float:
        return count / self.duration_s if self.duration_s > 0 else 0.0

    def as_json(self) -> dict[str, Any]:
        """All of it as JSON values."""
        return dataclasses.asdict(self) | {
            "failed": self.failed,
            "requests_per_s": self.requests_per_s,
            "prompt_tokens_per_s": self.prompt_tokens_per_s,
            "output_tokens_per_s": self.output_tokens_per_s,
        }


def measure(attempts: Sequence[Attempt]) -> Results:
    """Results of at least one attempt."""
    good = [item for item in attempts if item.ok]
    errors: dict[str, str] = {}
    for item in attempts:
        if not item.ok:
            errors.setdefault(item.status, item.error)
    return Results(
        duration_s=max(item.end_s for item in attempts) - min(item.due_s for item in attempts),
        sent=len(attempts),
        completed=len(good),
        short=sum(item.short for item in good),
        statuses=dict(Counter(item.status for item in attempts)),
        errors=errors,
        prompt_tokens=sum(item.prompt_tokens for item in good),
        output_tokens=sum(item.output_tokens for item in good),
        time_to_first_token_s=summarise(item.time_to_first_token_s for item in good),
        inter_token_latency_s=summarise(
            value for item in good for value in item.inter_token_latencies_s()
        ),
        time_per_output_token_s=summarise(item.time_per_output_token_s for item in good),
        latency_s=summarise(item.latency_s for item in good),
        send_delay_s=summarise(item.sent_s - item.due_s for item in attempts),
    )
