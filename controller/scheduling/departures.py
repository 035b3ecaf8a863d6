"""Requests on their way to another replica, and prefixes that another one copies: the source.

Blocks that are offered have a reference of the transfer's own, so that they stay as they are
whatever becomes of their sequence, until the transfer is withdrawn::

    offer      full blocks are offered, the samples run on
    freeze     they get no further rows; what they computed since is offered too
    settled    the results of their last rows are here: nothing of them will change
    withdraw   no offer stands any more; samples that have not ended run on
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from phalanx.controller.kvcache.manager import KVCacheManager
from phalanx.protos.errors import TransferFailed
from phalanx.protos.transfers import MAX_POSITIONS, NO_BLOCK, Offer, Withdraw

from .outline import Outline, PrefixOutline, SampleOutline, Standing
from .planner import StepPlanner
from .sample import Sample, State


@dataclass(slots=True)
class _Departure:
    samples: list[tuple[Sample, int, int]] = field(default_factory=list)
    """With the attempt and the number of blocks that were offered."""
    holds: list[int] = field(default_factory=list)
    frozen: bool = False


class Departures:
    """Pure books of a scheduler; whoever calls tells the ranks what is returned, at once."""

    def __init__(
        self,
        cache: KVCacheManager,
        planner: StepPlanner,
        requests: Mapping[str, Mapping[int, Sample]],
    ) -> None:
        """requests: the scheduler's, as they are."""
        self._cache, self._planner, self._requests = cache, planner, requests
        self._departures: dict[int, _Departure] = {}

    def __len__(self) -> int:
        """Transfers that are not withdrawn."""
        return len(self._departures)

    def offer(self, transfer: int, request_id: str) -> tuple[Outline, Offer]:
        """Offer the full blocks of a request. Raises `TransferFailed` when it does not run."""
        samples = list(self._requests.get(request_id, {}).values())
        if not samples or any(s.state is not State.RUNNING or s.followers for s in samples):
            raise TransferFailed("not all samples of the request run")
        if any(sample.wants_prompt_logprobs for sample in samples):
            raise TransferFailed("its prompt is still being scored")
        departure, blocks = _Departure(), dict[int, int]()
        outlines = []
        for sample in samples:
            full = sample.num_computed // self._cache.block_size
            table = self._cache.table(sample.seq)[:full]
            for block in table:
                blocks.setdefault(block, len(blocks))
            departure.samples.append((sample, sample.seq, full))
            request = sample.request
            outline = SampleOutline(
                sample_index=request.sample_index,
                token_ids=request.prompt_token_ids + request.output_token_ids,
                left=sample.limit - sample.num_known,
                positions=tuple(blocks[block] for block in table),
            )
            outlines.append(outline)
        offer = self._offer(transfer, departure, 0, list(blocks))
        tenant = samples[0].request.tenant
        return Outline(tenant=tenant, num_blocks=len(blocks), samples=tuple(outlines)), offer

    def offer_prefix(
        self, transfer: int, tenant: str, token_ids: Sequence[int]
    ) -> tuple[PrefixOutline, Offer]:
        """Offer what is cached of a prompt. Raises `TransferFailed` when nothing is."""
        blocks = self._cache.match(self._cache.chain(tenant, token_ids), len(token_ids))
        if not blocks:
            raise TransferFailed("the prefix is not cached")
        offer = self._offer(transfer, _Departure(), 0, blocks)
        tokens = list(token_ids[: len(blocks) * self._cache.block_size])
        return PrefixOutline(tenant=tenant, token_ids=tokens), offer

    def freeze(self, transfer: int, tail: int) -> Offer:
        """Let the samples stand still and offer the rest of their blocks, `tail` positions for
        each. Raises `TransferFailed`, changing nothing, when one was preempted or has more."""
        departure = self._departures.get(transfer)
        if departure is None or departure.frozen:
            raise TransferFailed("the request is not about to leave")
        blocks: list[int] = []
        for sample, seq, offered in departure.samples:
            rest: tuple[int, ...] = ()
            if sample.state is not State.ENDED:
                if sample.state is not State.RUNNING or sample.seq != seq:
                    raise TransferFailed("a sample lost its blocks meanwhile")
                rest = self._cache.table(seq)[offered : self._cache.blocks_for(sample.num_computed)]
            if len(rest) > tail:
                raise TransferFailed(f"{len(rest)} blocks are left to move, {tail} can be")
            blocks += [*rest, *[NO_BLOCK] * (tail - len(rest))]
        offer = self._offer(transfer, departure, 1, blocks)
        departure.frozen = True
        for sample, _, _ in departure.samples:
            if sample.state is State.RUNNING:
                sample.state = State.LEAVING
        return offer

    def settled(self, transfer: int) -> dict[int, Standing] | None:
        """Where the frozen samples that have not ended stand, by index; None: results are due."""
        departure = self._departures.get(transfer)
        if departure is None or not departure.frozen:
            raise TransferFailed("the transfer was withdrawn")
        left = [sample for sample, _, _ in departure.samples if sample.state is State.LEAVING]
        if any(sample.pending for sample in left):
            return None
        return {
            sample.request.sample_index: Standing(
                num_known=sample.num_known, num_computed=sample.num_computed
            )
            for sample in left
        }

    def withdraw(self, transfer: int) -> Withdraw | None:
        """End a transfer, if it is known."""
        departure = self._departures.pop(transfer, None)
        if departure is None:
            return None
        for sample, _, _ in departure.samples:
            if sample.state is State.LEAVING:
                sample.state = State.RUNNING
        for hold in departure.holds:
            self._cache.release(hold)
            self._planner.held.discard(hold)
        return Withdraw(transfer)

    def _offer(self, transfer: int, departure: _Departure, part: int, blocks: list[int]) -> Offer:
        if len(blocks) > MAX_POSITIONS:
            raise TransferFailed(f"{len(blocks)} blocks, at most {MAX_POSITIONS} are moved")
        hold = -1 - 2 * transfer - part
        self._cache.hold(hold, {block for block in blocks if block != NO_BLOCK})
        self._planner.held.add(hold)
        departure.holds.append(hold)
        self._departures[transfer] = departure
        return Offer(transfer, part, blocks)
