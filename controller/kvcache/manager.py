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
from collections.abc import Iterable, Iterator, Sequence

from phalanx.protos.steps import BlockCopy, StateUse

from .blocks import BlockPool, require
from .changes import ChangeLog, PrefixUpdate, Tier
from .loading import BlockLoads
from .prefix import DigestChain, PrefixIndex, PrefixNaming
from .rates import MoveRates
from .states import StateSlots
from .tables import Fork, Table
from .tiers import LowerTiers


class KVCacheManager:
    """The pool of one replica. Sequences are named by the attempt id `seq` of the step plans.

    A block is in exactly one of three states::

        free --allocate / append / fork--> referenced (1 or more tables) --release--> free
                                            ^    | its content is indexed
                                      match |    v
                                           idle cached --evicted, least recently used--> referenced

    namespace: names what the KV entries depend on besides the tokens (the model); hashed in.
    num_states: slots of the state pool, of a model with state spaces. Its sequences hold a slot
    beside their blocks, and begin only where the state is known: see `states.py`. States are kept
    at the end of a prompt, where it parts from others', and every `state_stride` tokens, 0 = not.
    tiers, rates: what lies below the pool and how fast it is, both or none; not with states.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        prefix_caching: bool = True,
        namespace: bytes = b"",
        num_states: int = 0,
        state_stride: int = 0,
        tiers: LowerTiers | None = None,
        rates: MoveRates | None = None,
    ) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"{num_blocks} blocks of {block_size} tokens: both must be at least 1")
        self.block_size = block_size
        self.naming = PrefixNaming(block_size, namespace)
        self._prefix_caching = prefix_caching
        self._pool = BlockPool(num_blocks)
        self._index = PrefixIndex()
        self._tables: dict[int, Table] = {}
        self._log: ChangeLog | None = None
        self._states = StateSlots(num_states) if num_states else None
        self._state_stride = self.blocks_for(state_stride)
        self.loads: BlockLoads | None = None
        if tiers is not None and rates is not None:
            self.loads = BlockLoads(tiers, rates, self._index, self, block_size)
            tiers.on_change = self._on_lower_change

    @property
    def states(self) -> StateSlots | None:
        """Who owns the slots of the state pool, if there is one."""
        return self._states

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

        The last of `num_tokens` tokens is never covered: computing it is what gives logits. With
        states, the run ends where one was kept.
        """
        cached = self._indexed(chain, num_tokens)
        if self._states is not None and chain is not None:
            while cached and not self._states.holds(chain.digests[len(cached) - 1]):
                cached.pop()
        return cached

    def _indexed(self, chain: DigestChain | None, num_tokens: int) -> list[int]:
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
        if fresh + revived + reserve > self.num_free or not self._has_state_room:
            return None
        goals = self._goals(chain)
        for block in cached:
            self.share(block)
        blocks = [*cached, *self.take(fresh)]
        self._tables[seq] = Table(blocks, chain, len(cached), goals)
        if self._states is not None:
            known = chain.digests[len(cached) - 1] if chain is not None and cached else None
            self._states.open(seq, known)
        return list(blocks)

    @property
    def _has_state_room(self) -> bool:
        return self._states is None or self._states.has_room

    def _goals(self, chain: DigestChain | None) -> frozenset[int]:
        """Where a prompt ends, and where it parts from others, whose state was not kept there."""
        if self._states is None or chain is None:
            return frozenset()
        end = (chain.num_tokens - 1) // self.block_size
        return frozenset((end, len(self._indexed(chain, chain.num_tokens))))

    def use_states(
        self, seq: int, first: int, last: int, *, forks_at: int | None = None
    ) -> StateUse | None:
        """What a row for the sequence's tokens [first, last) does with slots of the state pool.

        forks_at: tokens whose state is kept for forks of this sequence.
        """
        if self._states is None:
            return None
        table, size, stride = self._tables[seq], self.block_size, self._state_stride
        digests = [] if table.chain is None else table.chain.digests
        wanted: dict[int, bytes | int] = {}
        if forks_at is not None and first < forks_at <= last:
            wanted[forks_at - first] = seq
        for count in range(first // size + 1, min(last // size, len(digests)) + 1):
            if count in table.goals or (stride and count % stride == 0):
                wanted[count * size - first] = digests[count - 1]
        return self._states.use(seq, sorted(wanted.items(), key=lambda item: item[0]))

    def settle_states(self) -> None:
        """The plan is made: the states that it keeps may be begun from."""
        if self._states is not None:
            self._states.settle()

    def can_fork(self, parent: int) -> bool:
        """Whether a fork of this sequence can begin where `forks_at` said."""
        return self._states is None or self._states.holds(parent)

    def append(self, seq: int, num_tokens: int) -> list[int] | None:
        """Grow a table to hold `num_tokens`: the added blocks, or None, changing nothing."""
        table = self._tables[seq]
        missing = max(self.blocks_for(num_tokens) - len(table.blocks), 0)
        if missing > self.num_free:
            return None
        added = self.take(missing)
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
        if fresh + reserve > self.num_free or not self._has_state_room:
            return None
        for block in source[:full]:
            self.share(block)
        added = self.take(fresh)
        self._tables[seq] = Table([*source[:full], *added], chain, full)
        if self._states is not None:
            self._states.open(seq, parent)
        copy = BlockCopy(source[full], added[0]) if partial else None
        return Fork(list(self._tables[seq].blocks), copy)

    def hold(self, name: int, blocks: Iterable[int]) -> None:
        """Open a table, of no sequence, that refers once more to blocks which are in use or idle;
        `release` ends it. name: negative, lest it be an attempt's."""
        self._refuse_second_table(name)
        held = list(blocks)
        for block in held:
            self.share(block)
        self._tables[name] = Table(held, None, len(held))

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
        if self._states is not None:
            self._states.release(seq)
        # last block first: of a prefix that is no longer used, the end is evicted before the
        # start, without which the end could not be matched
        for block in reversed(self._tables.pop(seq).blocks):
            self.let_go(block)

    def forget(self, chain: DigestChain | None) -> None:
        """Make the chain's content unmatchable: a rank reported it as broken (NaN)."""
        for digest in () if chain is None else chain.digests:
            if self.loads is not None:
                self.loads.forget(digest)
                self.loads.tiers.forget(digest, self._index.find(digest))
            block = self._index.forget(digest)
            if block is not None:
                self._pool.free(block)
            if self._states is not None:
                self._states.forget(digest)

    def track_changes(self, epoch: int) -> None:
        """Record from now on which prefixes come and go, for `drain_changes`."""
        self._log = self._index.track_changes(epoch)

    def drain_changes(self) -> PrefixUpdate | None:
        """The prefixes that came and went since the last call; None if there are none."""
        return None if self._log is None else self._log.drain(self._held)

    def _held(self) -> Iterator[tuple[bytes, Tier]]:
        """All that is cached in any tier, with the fastest."""
        for digest in self._index.digests():
            yield digest, Tier.DEVICE
        for digest, tier in self.loads.tiers.contents() if self.loads is not None else ():
            if self._index.find(digest) is None:
                yield digest, tier

    def _on_lower_change(self, digest: bytes) -> None:
        if self._log is not None and self.loads is not None and self._index.find(digest) is None:
            self._log.record(digest, self.loads.tiers.tier(digest))

    def list_prefixes(self) -> None:
        """Let the next `drain_changes` list everything that is indexed."""
        if self._log is not None:
            self._log.ask_listing()

    def block_map(self) -> bytes:
        """A byte for each block: 0 free, 1 idle cached, 2 one sequence's, 3 shared. O(blocks)."""
        states = bytearray(min(count + 1, 3) if count else 0 for count in self._pool.counts())
        for block in self._index.idle:
            states[block] = 1
        return bytes(states)

    def check_integrity(self) -> None:
        """Raise `IntegrityError` unless every block is accounted for exactly once. O(blocks)."""
        if self._states is not None:
            self._states.check_integrity()
            require(self._states.sequences == self._tables.keys(), "states without tables")
        references: Counter[int] = Counter()
        for seq, table in self._tables.items():
            require(
                len(set(table.blocks)) == len(table.blocks), f"sequence {seq} has a block twice"
            )
            require(table.num_committed <= len(table.blocks), f"sequence {seq} committed too much")
            references.update(table.blocks)
        if self.loads is not None:
            self.loads.check_integrity()
            references.update(self.loads.references)
        free, idle = self._pool.free_blocks(), self._index.idle_blocks()
        for block in range(self.num_blocks):
            require(
                self._pool.references(block) == references[block],
                f"block {block} counts {self._pool.references(block)} references, "
                f"{references[block]} tables and loads hold it",
            )
            states = (block in free) + (block in idle) + (references[block] > 0)
            require(states == 1, f"block {block} is in {states} states")
            require(block not in free or not self._index.holds(block), f"{block} free but indexed")

    def _refuse_second_table(self, seq: int) -> None:
        require(seq not in self._tables, f"sequence {seq} already has a table")

    def share(self, block: int) -> None:
        """One more reference to an indexed block."""
        self._index.revive(block)
        self._pool.refer(block)

    def take(self, count: int) -> list[int]:
        """`count` blocks, referenced once; idle ones are evicted only when no other is free.

        Precondition: so many are free. Whoever takes blocks outside of a table lets them go.
        """
        for _ in range(count - self._pool.num_free):
            block, digest = self._index.evict()
            if self.loads is not None:
                self.loads.tiers.evict(digest, block)
                self._on_lower_change(digest)
            self._pool.free(block)
        return [self._pool.take() for _ in range(count)]

    def let_go(self, block: int) -> None:
        """One reference less. The block is idle or free if it was the last."""
        if not self._pool.drop(block):
            return
        if not self._index.holds(block):
            self._pool.free(block)
            return
        self._index.retire(block)
        if self.loads is not None:
            self.loads.tiers.offer(self._index.digest(block), block)
