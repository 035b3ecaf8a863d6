"""How fast a replica computes, measured from its steps."""

from __future__ import annotations

from typing import NamedTuple

from phalanx.controller.kvcache.changes import Tier
from phalanx.controller.kvcache.rates import MoveRates
from phalanx.controller.observing import Observer, StepTimes

KEEP = 0.9
"""What a further step leaves of the weight of those before it."""
KEEP_POINTS = 0.99
"""The same for how steps depend on the number of streams, which takes more of them to be seen."""
LEAST = 0.1
"""Of a step, the part that its prompts are taken to need at least; of a mean number of streams, what
its variance has to be for a line to be fitted."""


class Pace(NamedTuple):
    """A replica's speed; None where nothing was measured yet."""

    tokens_per_s: float | None = None
    """Prompt tokens computed in a second, beside what the step would take without them."""
    step_s: float | None = None
    """Seconds of a step in which streams only get their next token."""
    stream_s: float | None = None
    """What one stream more adds to a step, seconds."""
    host_token_s: float | None = None
    """Seconds to bring a token's keys and values back from host memory."""
    disk_token_s: float | None = None
    """The same from disk."""
    base_s: float = 0.0
    """Seconds of a step that computes next to nothing."""

    @property
    def below(self) -> tuple[float | None, float | None]:
        """The last two, in the order of tiers."""
        return self.host_token_s, self.disk_token_s


class _Line:
    """Least squares over the latest points (number of streams, seconds)."""

    def __init__(self) -> None:
        self._weight = self._x = self._y = self._xx = self._xy = 0.0
        self.slope = self.intercept = 0.0

    def saw(self, streams: int, seconds: float) -> None:
        """One point more. As long as all have nearly the same number of streams, the line is the
        one through zero; it never falls, and never begins below zero."""
        self._weight = KEEP_POINTS * self._weight + 1.0
        share = 1.0 / self._weight
        off_x, off_y = streams - self._x, seconds - self._y
        self._x += share * off_x
        self._y += share * off_y
        self._xx += share * (off_x * (streams - self._x) - self._xx)
        self._xy += share * (off_x * (seconds - self._y) - self._xy)
        most = self._y / self._x
        enough = self._xx > LEAST * self._x
        self.slope = min(max(self._xy / self._xx, 0.0), most) if enough else most
        self.intercept = self._y - self.slope * self._x


class PaceMeter:
    """An observer of steps that measures, and passes everything on to another one.

    A step is taken to last ``base_s + streams * stream_s + tokens / tokens_per_s``: the first two by
    least squares over steps in which streams only get their next token, the last from what steps
    with prompts take beyond that. All weigh the latest steps most. Steps of at least two tokens a
    row count as prompt work; what is between says little of either. `pace` is replaced as a whole,
    so that another thread may read it.
    """

    def __init__(self, inner: Observer, rates: MoveRates | None = None) -> None:
        """rates: of the tiers below the pool, if there are any."""
        self._inner, self._rates = inner, rates
        self._prefill_tokens = self._prefill_s = 0.0
        self._fit = _Line()
        self.pace = self._pace(None, None)

    def _pace(self, rate: float | None, step_s: float | None) -> Pace:
        host_s = disk_s = None
        if self._rates is not None:
            host_s, disk_s = (self._rates.token_s(tier) for tier in (Tier.HOST, Tier.DISK))
        stream_s = None if step_s is None else self._fit.slope
        return Pace(rate, step_s, stream_s, host_s, disk_s, self._fit.intercept)

    def on_step(self, times: StepTimes) -> None:
        """A step was executed."""
        self._inner.on_step(times)
        self.saw(times.rows, times.tokens, times.execute_s + times.overhead_s)

    def saw(self, rows: int, tokens: int, seconds: float) -> None:
        """A step with so many rows and tokens took so long."""
        pace = self.pace
        if not rows or seconds <= 0.0:
            return
        if tokens >= 2 * rows:
            # sums, not a mean of ratios: a short chunk must not count as much as a full one
            beside_s = self._fit.intercept + self._fit.slope * (rows - 1)
            self._prefill_tokens = KEEP * self._prefill_tokens + tokens - rows + 1
            self._prefill_s = KEEP * self._prefill_s + max(seconds - beside_s, LEAST * seconds)
            self.pace = self._pace(self._prefill_tokens / self._prefill_s, pace.step_s)
        elif tokens == rows:
            self._fit.saw(rows, seconds)
            self.pace = self._pace(pace.tokens_per_s, _mean(pace.step_s, seconds))

    def on_queue_time(self, seconds: float) -> None:
        """A request waited this long for its first step."""
        self._inner.on_queue_time(seconds)


def _mean(before: float | None, value: float) -> float:
    return value if before is None else KEEP * before + (1.0 - KEEP) * value
