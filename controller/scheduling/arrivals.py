"""Requests that come from another replica, and prefixes copied from one: the target.

Tables are opened before a byte is asked for, and closed no sooner than every rank has said that it
writes no more: see `Taken`. What has come is either adopted, and runs on, or given up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from phalanx.controller.kvcache.manager import KVCacheManager
from phalanx.controller.kvcache.prefix import DigestChain
from phalanx.protos.errors import TransferFailed
from phalanx.protos.transfers import NO_BLOCK, Exchange, Take, Taken

from .outline import Outline, PrefixOutline, SampleOutline, Standing
from .planner import StepPlanner
from .request import Request

TAIL_TOKENS = 64
"""That a sample may compute between the offer of its full blocks and its standing still."""
TAIL_SHARE = 32
"""And one for so many tokens that are moved meanwhile."""


@dataclass(slots=True)
class _Arrival:
    seqs: dict[int, int]
    """Sample index to attempt."""
    tokens: dict[int, list[int]]
    chains: dict[int, DigestChain | None]
    num_parts: int
    writing: set[int]
    """Ranks that may still write into the tables."""
    here: list[int] = field(default_factory=list)
    """How many ranks have each part."""
    num_bytes: int = 0
    error: str = ""
    given_up: bool = False


class Claim(NamedTuple):
    """An attempt that has its blocks already."""

    seq: int
    num_computed: int
    chain: DigestChain | None
    """Of the tokens that were known when the transfer began."""


class Arrivals:
    """Pure books of a scheduler; whoever calls tells the ranks what is returned, at once."""

    def __init__(self, cache: KVCacheManager, planner: StepPlanner, max_context: int) -> None:
        self._cache, self._planner, self._max_context = cache, planner, max_context
        self._arrivals: dict[int, _Arrival] = {}

    def __len__(self) -> int:
        """Transfers whose tables are open and not adopted."""
        return len(self._arrivals)

    @property
    def open(self) -> frozenset[int]:
        """Those transfers."""
        return frozenset(self._arrivals)

    def tail_blocks(self, outline: Outline) -> int:
        """Blocks of a sample that can follow in the second part."""
        longest = max(len(sample.token_ids) for sample in outline.samples)
        left = max(sample.left for sample in outline.samples)
        return self._cache.blocks_for(min(TAIL_TOKENS + longest // TAIL_SHARE, left)) + 1

    def reserve(self, transfer: int, outline: Outline, source: Exchange, ranks: int) -> Take:
        """Places and blocks for a request. Raises `TransferFailed`, changing nothing, when there
        are too few."""
        if not self._planner.has_places(len(outline.samples)):
            raise TransferFailed("no place is free", later=True)
        if max(len(sample.token_ids) for sample in outline.samples) >= self._max_context:
            raise TransferFailed("the request is longer than what is served here")
        arrival = _Arrival({}, {}, {}, 2, set(range(ranks)), [0, 0])
        full, tail = [NO_BLOCK] * outline.num_blocks, list[int]()
        places: dict[int, int] = {}
        for sample in outline.samples:
            table = self._open(arrival, outline.tenant, sample, places, self.tail_blocks(outline))
            if table is None:
                for seq in arrival.seqs.values():
                    self._close(seq)
                raise TransferFailed("too few blocks are free", later=True)
            tail += table[len(sample.positions) :]
        for position, block in places.items():
            full[position] = block
        self._arrivals[transfer] = arrival
        return Take(transfer, source, [full, tail])

    def _open(
        self,
        arrival: _Arrival,
        tenant: str,
        sample: SampleOutline,
        places: dict[int, int],
        tail: int,
    ) -> list[int] | None:
        """A sample's table: what is cached here, what comes for another sample as well, the rest.

        places: position to block, of what is to come; added to.
        """
        size, count = self._cache.block_size, len(sample.positions)
        chain = self._cache.chain(tenant, sample.token_ids)
        shared = self._cache.match(chain, count * size + 1)
        for position in sample.positions[len(shared) :]:
            if position not in places:
                break
            shared.append(places[position])
        seq = self._planner.take_seq()
        table = self._cache.allocate(
            seq, chain, (count + tail) * size, cached=shared, reserve=self._planner.growth()
        )
        if table is None:
            return None
        self._planner.reserved.add(seq)
        arrival.seqs[sample.sample_index] = seq
        arrival.tokens[sample.sample_index] = sample.token_ids
        arrival.chains[sample.sample_index] = chain
        fresh = zip(sample.positions[len(shared) :], table[len(shared) : count], strict=True)
        places.update(fresh)
        return table

    def reserve_prefix(
        self, transfer: int, outline: PrefixOutline, source: Exchange, ranks: int
    ) -> Take:
        """Blocks for a prefix. Raises `TransferFailed`, changing nothing, when there are too few
        or all of it is here."""
        count = len(outline.token_ids) // self._cache.block_size
        chain = self._cache.chain(outline.tenant, outline.token_ids)
        shared = self._cache.match(chain, len(outline.token_ids) + 1)
        if chain is None or len(shared) == count:
            raise TransferFailed("there is nothing to copy")
        seq = self._planner.take_seq()
        table = self._cache.allocate(
            seq, chain, len(outline.token_ids), cached=shared, reserve=self._planner.growth()
        )
        if table is None:
            raise TransferFailed("too few blocks are free")
        self._planner.copied.add(seq)
        self._arrivals[transfer] = _Arrival({0: seq}, {}, {}, 1, set(range(ranks)), [0])
        return Take(transfer, source, [[NO_BLOCK] * len(shared) + table[len(shared) :]])

    def taken(self, rank: int, message: Taken) -> None:
        """A rank has a part, or failed."""
        arrival = self._arrivals.get(message.transfer)
        if arrival is None or rank not in arrival.writing:
            return
        arrival.num_bytes += message.num_bytes
        if message.error:
            arrival.error = arrival.error or f"rank {rank}: {message.error}"
        elif 0 <= message.part < arrival.num_parts:
            arrival.here[message.part] += 1
        if message.error or message.part == arrival.num_parts - 1:
            arrival.writing.discard(rank)
        if arrival.given_up:
            self.give_up(message.transfer)

    def arrived(self, transfer: int, part: int, ranks: int) -> int | None:
        """Bytes that came, once every rank has the part; None before. Raises `TransferFailed`."""
        arrival = self._arrivals.get(transfer)
        if arrival is None or arrival.error or arrival.given_up:
            raise TransferFailed("given up" if arrival is None else arrival.error or "given up")
        return arrival.num_bytes if arrival.here[part] == ranks else None

    def claim(
        self, transfer: int, group: Sequence[Request], standings: Mapping[int, Standing]
    ) -> dict[int, Claim]:
        """By sample index, the attempts whose tables hold what the samples of `group` have computed; the transfer
        is over with this. Raises `TransferFailed`, changing nothing, when they do not."""
        arrival = self._arrivals.get(transfer)
        if arrival is None or arrival.writing or arrival.error or arrival.given_up:
            raise TransferFailed("not all of it came")
        for request in group:
            tokens = request.prompt_token_ids + request.output_token_ids
            known = arrival.tokens.get(request.sample_index)
            standing = standings.get(request.sample_index)
            if known is None or standing is None or tokens[: len(known)] != known:
                raise TransferFailed("another request came")
            if not standing.num_computed < len(tokens) == standing.num_known < self._max_context:
                raise TransferFailed("the request has gone on meanwhile")
        del self._arrivals[transfer]
        claimed = {request.sample_index for request in group}
        for index, seq in arrival.seqs.items():
            self._planner.reserved.discard(seq)
            if index not in claimed:
                self._cache.release(seq)
        return {
            index: Claim(arrival.seqs[index], standings[index].num_computed, arrival.chains[index])
            for index in claimed
        }

    def keep_prefix(self, transfer: int) -> None:
        """Let a copied prefix be matched from now on. Raises `TransferFailed`."""
        arrival = self._arrivals.get(transfer)
        if arrival is None or arrival.writing or arrival.error or arrival.given_up:
            raise TransferFailed("not all of it came")
        del self._arrivals[transfer]
        for seq in arrival.seqs.values():
            self._cache.commit(seq, len(self._cache.table(seq)) * self._cache.block_size)
            self._close(seq)

    def give_up(self, transfer: int) -> None:
        """Close the tables as soon as no rank writes into them."""
        arrival = self._arrivals.get(transfer)
        if arrival is None:
            return
        arrival.given_up = True
        if not arrival.writing:
            del self._arrivals[transfer]
            for seq in arrival.seqs.values():
                self._close(seq)

    def _close(self, seq: int) -> None:
        self._planner.reserved.discard(seq)
        self._planner.copied.discard(seq)
        self._cache.release(seq)
