"""What a benchmark is asked to measure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from phalanx.protos.errors import ConfigError

from .workload import Span

OPEN_LOOP_WARMUP = 4


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured. With `rate` (requests a second) the loop is open, else closed with
    `concurrency` requests at a time. `lengths` is a file of recorded lengths, which takes the
    place of the two spans; so does `workload`, whose prompts are sent as well (`formats.py`), and whose
    timestamps, if it has any, say when; `speed` is how much faster they pass. Raises `ConfigError` naming the field, its value and what is allowed.
    """

    requests: int = 64
    concurrency: int = 8
    rate: float | None = None
    warmup: int | None = None
    prompt_tokens: str = "128"
    output_tokens: str = "64"
    lengths: str | None = None
    workload: str | None = None
    speed: float = 1.0
    seed: int = 0
    temperature: float = 0.0
    ignore_eos: bool = True

    def __post_init__(self) -> None:
        for name, low in (("requests", 1), ("concurrency", 1), ("warmup", 0)):
            value = getattr(self, name)
            if value is not None and value < low:
                raise ConfigError(f"{name} is {value}, allowed: at least {low}")
        if self.rate is not None and not 0 < self.rate < float("inf"):
            raise ConfigError(f"rate is {self.rate:g}, allowed: above 0 requests a second")
        if not 0 < self.speed < float("inf"):
            raise ConfigError(f"speed is {self.speed:g}, allowed: above 0")
        if self.lengths is not None and self.workload is not None:
            raise ConfigError("lengths and workload are two sources of the same: allowed is one")
        self.spans()

    def spans(self) -> tuple[Span, Span]:
        """Prompt and output lengths."""
        return (
            Span.parse("prompt_tokens", self.prompt_tokens),
            Span.parse("output_tokens", self.output_tokens),
        )

    @property
    def warmups(self) -> int:
        """Requests sent first and not counted: by default as many as run at once."""
        if self.warmup is not None:
            return self.warmup
        return self.concurrency if self.rate is None else OPEN_LOOP_WARMUP

    @property
    def params(self) -> dict[str, Any]:
        """Sampling parameters of every request."""
        return {
            "temperature": self.temperature,
            "ignore_eos": self.ignore_eos,
            "seed": self.seed,
        }
