"""Who owns which block: block tables, shared prefixes, forks.

Tables only grow at the end, and blocks are shared by counting references. Nothing here touches
memory of a device: the ranks hold the blocks and execute plans strictly in order. That order is
what makes two things safe:

- A released block may be handed out at once. The plan that writes its new content comes after
  every plan that reads the old.
- A block may be matched as soon as the plan that computes it has been made, before it is answered.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from phalanx.protos.steps import BlockCopy

from .blocks import BlockPool, require
from .changes import ChangeLog, PrefixUpdate
from .prefix import DigestChain, PrefixIndex, PrefixNaming


@dataclass(slots=True)
class _Table:
    """One sequence's blocks, in order; the first `num_committed` have been offered to the index."""

    blocks: list[int]
    chain: DigestChain | None
    num_committed: int


class Fork(NamedTuple):
    """A forked table, and the copy that the plan must order if a block was only partly shared."""

    blocks: list[int]
    copy: BlockCopy | None


class KVCacheManager:
    """The pool of one replica. Sequences are named by the attempt id `seq` of the step plans.

    A block is in exactly one of three states::

        free --allocate / append / fork--> referenced (1 or more tables) --release--> free
                                            ^    | its content is indexed
                                      match |    v
                                           idle cached --evicted, least recently used--> referenced

    namespace: names what the KV entries depend on besides the tokens (the model); hashed in.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        prefix_caching: bool = True,
        namespace: bytes = b"",
    ) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"{num_blocks} blocks of {block_size} tokens: both must be at least 1")
        self.block_size = block_size
        self.naming = PrefixNaming(block_size, namespace)
        self._prefix_caching = prefix_caching
        self._pool = BlockPool(num_blocks)
        self._index = PrefixIndex()
        self._tables: dict[int, _Table] = {}
        self._log: ChangeLog | None = None

    @property
    def num_blocks(self) -> int:
        """Blocks in all."""
        return self._pool.num_blocks

    @property
    def num_free(self) -> int:
        """Blocks that can be handed out: the free ones and the idle cached ones."""
        return self._pool.num_free + self._index.num_idle

    @property
    def num_cached(self) -> int:
        """Idle blocks whose content is kept in case it is wanted again."""
        return self._index.num_idle

    @property
    def sequences(self) -> frozenset[int]:
        """The sequences that have a table, for audits."""
        return frozenset(self._tables)

    def table(self, seq: int) -> tuple[int, ...]:
        """The blocks of a sequence, in order."""
        return tuple(self._tables[seq].blocks)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold this many tokens."""
        return -(-num_tokens // self.block_size)

    def chain(self, tenant: str, token_ids: Sequence[int]) -> DigestChain | None:
        """The digests of a tenant's tokens; None when prefix caching is off."""
        if not self._prefix_caching:
            return None
        return self.naming.chain(tenant, token_ids)

    def match(self, chain: DigestChain | None, num_tokens: int) -> list[int]:
        """The longest run of cached blocks at the start of the chain; changes nothing.

        The last of `num_tokens` tokens is never covered: computing it is what gives logits.
        """
        cached: list[int] = []
        if chain is None:
            return cached
        for digest in chain.digests[: max(num_tokens - 1, 0) // self.block_size]:
            block = self._index.find(digest)
            if block is None:
                break
            cached.append(block)
        return cached

    def allocate(
        self,
        seq: int,
        chain: DigestChain | None,
        num_tokens: int,
        *,
        cached: Sequence[int] = (),
        reserve: int = 0,
    ) -> list[int] | None:
        """Open a table with room for `num_tokens`, starting with the matched blocks `cached`.

        Returns all blocks of the table, or None, changing nothing, when fewer than `reserve`
        blocks would stay free. chain: None = the blocks are not offered to the prefix index.
        """
        self._refuse_second_table(seq)
        fresh = self.blocks_for(num_tokens) - len(cached)
        # an idle block that is matched is no longer free either
        revived = sum(self._pool.references(block) == 0 for block in cached)
        if fresh + revived + reserve > self.num_free:
            return None
        for block in cached:
            self._share(block)
        blocks = [*cached, *self._take(fresh)]
        self._tables[seq] = _Table(blocks, chain, len(cached))
        return list(blocks)

    def append(self, seq: int, num_tokens: int) -> list[int] | None:
        """Grow a table to hold `num_tokens`: the added blocks, or None, changing nothing."""
        table = self._tables[seq]
        missing = max(self.blocks_for(num_tokens) - len(table.blocks), 0)
        if missing > self.num_free:
            return None
        added = self._take(missing)
        table.blocks += added
        return added

    def fork(
        self,
        parent: int,
        seq: int,
        chain: DigestChain | None,
        *,
        shared_tokens: int,
        num_tokens: int,
        reserve: int = 0,
    ) -> Fork | None:
        """Open a table that shares the parent's first `shared_tokens`, with room for `num_tokens`.

        Blocks that lie wholly below `shared_tokens` are shared; the one across the border is
        copied, because both sequences will write into it::

            parent  | block a | block b | c: prompt end, later tokens |
            child   | block a | block b | d: copy of c                | ...
                                             ^ shared_tokens

        The copy may also bring tokens that the parent has computed since: the child overwrites
        them before it reads so far. The parent must have computed its first `shared_tokens` in
        earlier plans. Returns None, changing nothing, when fewer than `reserve` blocks would stay
        free.
        """
        self._refuse_second_table(seq)
        source = self._tables[parent].blocks
        full, partial = divmod(shared_tokens, self.block_size)
        fresh = self.blocks_for(num_tokens) - full
        if fresh + reserve > self.num_free:
            return None
        for block in source[:full]:
            self._share(block)
        added = self._take(fresh)
        self._tables[seq] = _Table([*source[:full], *added], chain, full)
        copy = BlockCopy(source[full], added[0]) if partial else None
        return Fork(list(self._tables[seq].blocks), copy)

    def commit(self, seq: int, num_computed: int) -> None:
        """Offer the full blocks among the first `num_computed` tokens to the prefix index.

        Only blocks whose tokens are all known to the sequence's chain are indexed. The computing
        plan must have been made: a later plan may match the block.
        """
        table = self._tables[seq]
        if table.chain is None:
            return
        digests = table.chain.digests
        for index in range(table.num_committed, min(num_computed // self.block_size, len(digests))):
            self._index.insert(digests[index], table.blocks[index])
            table.num_committed = index + 1

    def release(self, seq: int) -> None:
        """Close a table. Blocks that nobody else refers to become free, or idle if indexed."""
        # last block first: of a prefix that is no longer used, the end is evicted before the
        # start, without which the end could not be matched
        for block in reversed(self._tables.pop(seq).blocks):
            if self._pool.drop(block):
                if self._index.holds(block):
                    self._index.retire(block)
                else:
                    self._pool.free(block)

    def forget(self, chain: DigestChain | None) -> None:
        """Make the chain's content unmatchable: a rank reported it as broken (NaN)."""
        for digest in () if chain is None else chain.digests:
            block = self._index.forget(digest)
            if block is not None:
                self._pool.free(block)

    def track_changes(self, epoch: int) -> None:
        """Record from now on which prefixes come and go, for `drain_changes`."""
        self._log = self._index.track_changes(epoch)

    def drain_changes(self) -> PrefixUpdate | None:
        """The prefixes that came and went since the last call; None if there are none."""
        return None if self._log is None else self._index.drain()

    def list_prefixes(self) -> None:
        """Let the next `drain_changes` list everything that is indexed."""
        if self._log is not None:
            self._log.ask_listing()

    def check_integrity(self) -> None:
        """Raise `IntegrityError` unless every block is accounted for exactly once. O(blocks)."""
        references: Counter[int] = Counter()
        for seq, table in self._tables.items():
            require(
                len(set(table.blocks)) == len(table.blocks), f"sequence {seq} has a block twice"
            )
            require(table.num_committed <= len(table.blocks), f"sequence {seq} committed too much")
            references.update(table.blocks)
        free, idle = self._pool.free_blocks(), self._index.idle_blocks()
        for block in range(self.num_blocks):
            require(
                self._pool.references(block) == references[block],
                f"block {block} counts {self._pool.references(block)} references, "
                f"{references[block]} tables hold it",
            )
            states = (block in free) + (block in idle) + (references[block] > 0)
            require(states == 1, f"block {block} is in {states} states")
            require(block not in free or not self._index.holds(block), f"{block} free but indexed")

    def _refuse_second_table(self, seq: int) -> None:
        require(seq not in self._tables, f"sequence {seq} already has a table")

    def _share(self, block: int) -> None:
        self._index.revive(block)
        self._pool.refer(block)

    def _take(self, count: int) -> list[int]:
        """`count` blocks, referenced once; idle ones are evicted only when no other is free."""
        for _ in range(count - self._pool.num_free):
            self._pool.free(self._index.evict())
        return [self._pool.take() for _ in range(count)]
