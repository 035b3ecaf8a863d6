"""What the page plots: a sample a second, of the last minutes."""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import Protocol

from phalanx.controller.benchmark.results import percentile
from phalanx.controller.observing import StepTimes

KEPT_SAMPLES = 300
KEPT_VALUES = 4096
"""Latencies of one sample; of more, the latest ones count."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """What happened since the sample before. Rates are a second's, times in seconds; None where
    nothing was measured."""

    time_s: float
    """When it was taken, seconds since the epoch."""
    output_tokens: float
    computed_tokens: float
    """Prompt tokens and those fed back."""
    steps: float
    first_token_p50_s: float | None
    first_token_p95_s: float | None
    inter_token_p50_s: float | None
    inter_token_p95_s: float | None
    ended: float
    running: int
    waiting: int


class Books(Protocol):
    """Whom everything is passed on to."""

    def on_start(self, method: str) -> None: ...
    def on_first_token(self, seconds: float) -> None: ...
    def on_tokens(self, count: int, gap_seconds: float) -> None: ...
    def on_queue_time(self, seconds: float) -> None: ...
    def on_step(self, times: StepTimes) -> None: ...
    def on_end(
        self, outcome: str, prompt_tokens: int, completion_tokens: int, seconds: float
    ) -> None: ...


class Figures:
    """An observer of the service and of the step loops that keeps samples, and passes everything
    on to another one. Safe to call from any thread."""

    def __init__(self, inner: Books) -> None:
        self._inner = inner
        self._lock = threading.Lock()
        self._samples: deque[Sample] = deque(maxlen=KEPT_SAMPLES)
        self._since = time.monotonic()
        self._clear()

    def _clear(self) -> None:
        self._output = self._computed = self._steps = self._ended = 0
        self._first: deque[float] = deque(maxlen=KEPT_VALUES)
        self._gaps: deque[float] = deque(maxlen=KEPT_VALUES)

    def on_start(self, method: str) -> None:
        """A request came in."""
        self._inner.on_start(method)

    def on_first_token(self, seconds: float) -> None:
        """A first token left."""
        self._inner.on_first_token(seconds)
        with self._lock:
            self._first.append(seconds)

    def on_tokens(self, count: int, gap_seconds: float) -> None:
        """A further message left with `count` tokens."""
        self._inner.on_tokens(count, gap_seconds)
        if count > 0:
            with self._lock:
                self._gaps.append(gap_seconds / count)

    def on_queue_time(self, seconds: float) -> None:
        """A request entered its first step."""
        self._inner.on_queue_time(seconds)

    def on_step(self, times: StepTimes) -> None:
        """A step of any replica is done."""
        self._inner.on_step(times)
        with self._lock:
            self._steps += 1
            self._computed += times.tokens
            self._output += times.new_tokens

    def on_end(
        self, outcome: str, prompt_tokens: int, completion_tokens: int, seconds: float
    ) -> None:
        """A request ended."""
        self._inner.on_end(outcome, prompt_tokens, completion_tokens, seconds)
        with self._lock:
            self._ended += 1

    @property
    def samples(self) -> list[Sample]:
        """The samples that are kept, the oldest first."""
        return list(self._samples)

    def take(self, running: int, waiting: int) -> Sample:
        """Make a sample of what came since the last one, and keep it."""
        now = time.monotonic()
        with self._lock:
            seconds = max(now - self._since, 1e-3)
            self._since = now
            first, gaps = sorted(self._first), sorted(self._gaps)
            sample = Sample(
                time_s=time.time(),
                output_tokens=self._output / seconds,
                computed_tokens=self._computed / seconds,
                steps=self._steps / seconds,
                first_token_p50_s=percentile(first, 50) if first else None,
                first_token_p95_s=percentile(first, 95) if first else None,
                inter_token_p50_s=percentile(gaps, 50) if gaps else None,
                inter_token_p95_s=percentile(gaps, 95) if gaps else None,
                ended=self._ended / seconds,
                running=running,
                waiting=waiting,
            )
            self._clear()
        self._samples.append(sample)
        return sample
