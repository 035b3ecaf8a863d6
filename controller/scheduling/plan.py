"""A step plan in the making, and what is remembered of it until its result comes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from phalanx.controller.kvcache.manager import KVCacheManager
from phalanx.protos.moves import Move
from phalanx.protos.steps import BlockCopy, NewSequence, Row, StateUse, StepPlan

from .sample import Sample

NEAR = 0.25
"""Of the reach: up to there, attention is not counted."""


@dataclass(slots=True)
class PlanDraft:
    """Collects the work of one step within a budget of tokens."""

    budget: int
    """Tokens that may still be added."""
    reach: float | None = None
    """See `SchedulerConfig.attention_reach`."""
    new: list[NewSequence] = field(default_factory=list)
    copies: list[BlockCopy] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    moves: list[Move] = field(default_factory=list)
    samples: dict[int, Sample] = field(default_factory=dict)
    """Who computes, by attempt id."""
    sampling: set[int] = field(default_factory=set)
    """The attempts that sample a token."""

    def count(self, sample: Sample) -> int:
        """Tokens that the sample would compute: what remains, as far as the budget goes. Where
        others wait for the same step, a token far on in a prompt counts for more than one."""
        most, reach = min(sample.remaining, self.budget), self._reach(sample)
        if reach is None or most <= 1:
            return most
        # the n tokens from position p on cost n + n (p + n / 2) / reach; they are to fit
        far = reach + sample.num_computed
        fitting = math.sqrt(far * far + 2 * reach * self.budget) - far
        return min(most, max(int(fitting), 1))

    def _cost(self, sample: Sample, count: int) -> int:
        """Of the budget."""
        reach = self._reach(sample)
        if reach is None or count <= 1:
            return count
        return min(math.ceil(count * (1 + (sample.num_computed + count / 2) / reach)), self.budget)

    def _reach(self, sample: Sample) -> float | None:
        """None: its attention is not counted. Near the beginning of a prompt it is not worth it."""
        if self.reach is None or not self.rows or sample.num_computed < NEAR * self.reach:
            return None
        return self.reach

    def add(self, sample: Sample, new_blocks: list[int], state: StateUse | None = None) -> None:
        """Let the sample compute `count` tokens."""
        count = self.count(sample)
        self.budget -= self._cost(sample, count)
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
