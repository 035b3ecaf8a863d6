"""How fast a replica computes, measured from its steps."""

from __future__ import annotations

from dataclasses import dataclass

from phalanx.controller.kvcache.changes import Tier
from phalanx.controller.kvcache.rates import MoveRates
from phalanx.controller.observing import Observer, StepTimes

KEEP = 0.9
"""What a further step leaves of the weight of those before it."""


@dataclass(frozen=True, slots=True)
class Pace:
    """A replica's speed; None where nothing was measured yet."""

    tokens_per_s: float | None = None
    """Prompt tokens computed in a second."""
    step_s: float | None = None
    """Seconds of a step in which streams only get their next token."""
    stream_s: float | None = None
    """The share of one stream in such a step, seconds."""
    host_token_s: float | None = None
    """Seconds to bring a token's keys and values back from host memory."""
    disk_token_s: float | None = None
    """The same from disk."""

    @property
    def below(self) -> tuple[float | None, float | None]:
        """The last two, in the order of tiers."""
        return self.host_token_s, self.disk_token_s


class PaceMeter:
    """An observer of steps that measures, and passes everything on to another one.

    The means are exponential ones. Steps of at least two tokens a row count as prompt work; steps
    of one token a row are those of streams; what is between says little of either. `pace` is
    replaced as a whole, so that another thread may read it.
    """

    def __init__(self, inner: Observer, rates: MoveRates | None = None) -> None:
        """rates: of the tiers below the pool, if there are any."""
        self._inner, self._rates = inner, rates
        self._prefill_tokens = self._prefill_s = 0.0
        self.pace = self._pace(None, None, None)

    def _pace(self, rate: float | None, step_s: float | None, stream_s: float | None) -> Pace:
        if self._rates is None:
            return Pace(rate, step_s, stream_s)
        host_s, disk_s = (self._rates.token_s(tier) for tier in (Tier.HOST, Tier.DISK))
        return Pace(rate, step_s, stream_s, host_s, disk_s)

    def on_step(self, times: StepTimes) -> None:
        """A step was executed."""
        self._inner.on_step(times)
        seconds, pace = times.execute_s + times.overhead_s, self.pace
        if not times.rows or seconds <= 0.0:
            return
        if times.tokens >= 2 * times.rows:
            # sums, not a mean of ratios: a short chunk must not count as much as a full one
            self._prefill_tokens = KEEP * self._prefill_tokens + times.tokens
            self._prefill_s = KEEP * self._prefill_s + seconds
            rate = self._prefill_tokens / self._prefill_s
            self.pace = self._pace(rate, pace.step_s, pace.stream_s)
        elif times.tokens == times.rows:
            step_s = _mean(pace.step_s, seconds)
            stream_s = _mean(pace.stream_s, seconds / times.rows)
            self.pace = self._pace(pace.tokens_per_s, step_s, stream_s)

    def on_queue_time(self, seconds: float) -> None:
        """A request waited this long for its first step."""
        self._inner.on_queue_time(seconds)


def _mean(before: float | None, value: float) -> float:
    return value if before is None else KEEP * before + (1.0 - KEEP) * value
