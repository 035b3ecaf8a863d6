"""What the scheduler that gives a request away tells the one that takes it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleOutline:
    """A running sample, when its full blocks are offered."""

    sample_index: int
    token_ids: list[int]
    """Prompt and known output."""
    left: int
    """Tokens that it may get yet, at most."""
    positions: tuple[int, ...]
    """Of its leading blocks within the transfer's first part; samples of a prompt share some."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outline:
    """A request whose full blocks are offered, while it still runs."""

    tenant: str
    num_blocks: int
    """Of the transfer's first part."""
    samples: tuple[SampleOutline, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixOutline:
    """A cached prefix that is offered."""

    tenant: str
    token_ids: list[int]
    """A whole number of blocks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """Where a sample stands still, counted in tokens."""

    num_known: int
    num_computed: int
