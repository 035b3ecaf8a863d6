"""The scheduler's settings."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from phalanx.controller.tenants import Tenants
from phalanx.protos.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Bounds on what is computed together. Raises `ConfigError` when they contradict each other."""

    max_tokens_per_step: int
    """Tokens that one plan computes at most; also the largest chunk of a prompt."""
    max_running: int
    """Samples that hold KV blocks at the same time."""
    max_queued: int
    """Once this many samples of a tenant wait, its new requests are refused."""
    max_context: int
    """Prompt and output tokens of one sample together."""
    eos_token_ids: tuple[int, ...]
    max_in_flight: int = 2
    """Plans sent and not yet answered."""
    attention_reach: float | None = None
    """Position in a sequence at which a token's attention takes as long as all else of it; None:
    attention is taken to cost nothing."""
    num_stages: int = 1
    """Of the ranks: so many plans are worked on at a time."""
    prefix_caching: bool = True
    max_preemptions: int = 3
    """How often one sample may lose its blocks to older ones."""
    reserve_tokens: int = 128
    """Growth of each running sample that an admission leaves room for. More means fewer
    preemptions, and fewer samples at a time."""

    max_bypass: int = 1024
    """Admissions from other tenants, past the first request of a tenant's line, that make that
    request due whatever the tenants' shares. Lower is closer to taking turns by request."""
    aging_s: float = 10.0
    """Seconds of waiting that make up for one step of priority; see `queue.due`."""
    tenants: Tenants = field(default_factory=Tenants)
    """Their weights, and bounds on what they have waiting."""

    def __post_init__(self) -> None:
        lowest = {
            "max_running": 1,
            "max_queued": 1,
            "max_context": 2,
            "max_in_flight": 1,
            "max_preemptions": 0,
            "reserve_tokens": 0,
            "max_bypass": 0,
            # each running sample computes one token per step, or it would stall
            "max_tokens_per_step": self.max_running,
        }
        for name, low in lowest.items():
            if (value := getattr(self, name)) < low:
                raise ConfigError(f"{name} is {value}; it must be at least {low}")
        if not 0.0 < self.aging_s < math.inf:
            raise ConfigError(f"aging_s is {self.aging_s}; it must be finite and above 0")
