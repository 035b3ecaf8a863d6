"""The blocks of one sequence, in order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from phalanx.protos.steps import BlockCopy

from .prefix import DigestChain


@dataclass(slots=True)
class Table:
    """One sequence's blocks, in order; the first `num_committed` have been offered to the index."""

    blocks: list[int]
    chain: DigestChain | None
    num_committed: int
    goals: frozenset[int] = frozenset()
    """Numbers of leading blocks whose state is to be kept."""


class Fork(NamedTuple):
    """A forked table, and the copy that the plan must order if a block was only partly shared."""

    blocks: list[int]
    copy: BlockCopy | None
