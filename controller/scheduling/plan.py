"""A step plan in the making, and what is remembered of it until its result comes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from phalanx.controller.kvcache.manager import KVCacheManager
from phalanx.protos.moves import Move
from phalanx.protos.steps import BlockCopy, NewSequence, Row, StateUse, StepPlan

from .sample import Sample


@dataclass(slots=True)
class PlanDraft:
    """Collects the work of one step within a budget of tokens."""

    budget: int
    """Tokens that may still be added."""
    new: list[NewSequence] = field(default_factory=list)
    copies: list[BlockCopy] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    moves: list[Move] = field(default_factory=list)
    samples: dict[int, Sample] = field(default_factory=dict)
    """Who computes, by attempt id."""
    sampling: set[int] = field(default_factory=set)
    """The attempts that sample a token."""

    def count(self, sample: Sample) -> int:
        """Tokens that the sample would compute: what remains, as far as the budget goes."""
        return min(sample.remaining, self.budget)

    def add(self, sample: Sample, new_blocks: list[int], state: StateUse | None = None) -> None:
        """Let the sample compute `count` tokens."""
        count = self.count(sample)
        self.budget -= count
        sample.num_computed += count
        self.rows.append(Row(sample.seq, count, new_blocks, state))
        self.samples[sample.seq] = sample
        if not sample.remaining:
            sample.pending += 1
            self.sampling.add(sample.seq)

    def fork(
        self,
        cache: KVCacheManager,
        seq: int,
        leader: Sample,
        sample: Sample,
        room: int,
        reserve: int,
    ) -> bool:
        """Share the leader's prompt but for its last token, whose computation gives logits."""
        shared = sample.num_prompt - 1
        fork = cache.fork(
            leader.seq, seq, sample.chain, shared_tokens=shared, num_tokens=room, reserve=reserve
        )
        if fork is None:
            return False
        if fork.copy is not None:
            self.copies.append(fork.copy)
        sample.num_computed = shared
        sample.cached_prompt_tokens = leader.cached_prompt_tokens
        return True

    def finish(self, epoch: int, step: int, finished: Sequence[int]) -> StepPlan:
        """The plan as a value. finished: attempts that the ranks may forget."""
        return StepPlan(
            epoch=epoch,
            step=step,
            finished=list(finished),
            new=self.new,
            copies=self.copies,
            rows=self.rows,
            moves=self.moves,
        )


@dataclass(frozen=True, slots=True)
class InFlight:
    """A plan that was sent and not yet answered."""

    step: int
    samples: dict[int, Sample]
    sampling: frozenset[int]
    num_tokens: int = 0
    alone: bool = False
    """Whether it is of one sample on probation."""
