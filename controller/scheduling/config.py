"""The scheduler's settings."""

from __future__ import annotations

from dataclasses import dataclass

from phalanx.protos.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Bounds on what is computed together. Raises `ConfigError` when they contradict each other."""

    max_tokens_per_step: int
    """Tokens that one plan computes at most; also the largest chunk of a prompt."""
    max_running: int
    """Samples that hold KV blocks at the same time."""
    max_queued: int
    """Once this many samples wait, new requests are refused."""
    max_context: int
    """Prompt and output tokens of one sample together."""
    eos_token_ids: tuple[int, ...]
    max_in_flight: int = 2
    """Plans sent and not yet answered."""
    prefix_caching: bool = True
    max_preemptions: int = 3
    """How often one sample may lose its blocks to older ones."""
    reserve_tokens: int = 128
    """Growth of each running sample that an admission leaves room for. More means fewer
    preemptions, and fewer samples at a time."""

    def __post_init__(self) -> None:
        lowest = {
            "max_running": 1,
            "max_queued": 1,
            "max_context": 2,
            "max_in_flight": 1,
            "max_preemptions": 0,
            "reserve_tokens": 0,
            # each running sample computes one token per step, or it would stall
            "max_tokens_per_step": self.max_running,
        }
        for name, low in lowest.items():
            if (value := getattr(self, name)) < low:
                raise ConfigError(f"{name} is {value}; it must be at least {low}")
