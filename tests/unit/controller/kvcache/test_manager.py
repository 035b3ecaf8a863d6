"""Block tables, sharing and eviction, seen from outside."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from phalanx.controller.kvcache.blocks import IntegrityError
from phalanx.controller.kvcache.manager import KVCacheManager
from phalanx.controller.kvcache.prefix import DigestChain


def filled(cache: KVCacheManager, seq: int, tokens: list[int], tenant: str = "a") -> list[int]:
    """Open a table for `tokens`, and count all of them as computed."""
    chain = cache.chain(tenant, tokens)
    blocks = cache.allocate(seq, chain, len(tokens), cached=cache.match(chain, len(tokens)))
    assert blocks is not None
    cache.commit(seq, len(tokens))
    return blocks


def matched(cache: KVCacheManager, tokens: list[int], tenant: str = "a") -> list[int]:
    return cache.match(cache.chain(tenant, tokens), len(tokens))


def test_the_map_of_blocks() -> None:
    cache = KVCacheManager(6, 2)
    shared, own = filled(cache, 0, [1, 2, 3, 4, 5])[:2], filled(cache, 1, [1, 2, 3, 4, 6])[2]
    idle = filled(cache, 2, [7, 8])
    cache.release(2)
    states = cache.block_map()
    assert [states[block] for block in shared] == [3, 3]
    assert (states[own], states[idle[0]]) == (2, 1)
    assert sorted(states) == [0, 1, 2, 2, 3, 3]


def test_a_table_grows_block_by_block() -> None:
    cache = KVCacheManager(4, 2)
    assert len(cache.allocate(0, None, 3) or []) == 2
    assert cache.append(0, 4) == []
    assert len(cache.append(0, 5) or []) == 1
    assert cache.append(0, 9) is None
    assert (len(cache.table(0)), cache.num_free) == (3, 1)
    cache.release(0)
    assert cache.num_free == 4


def test_a_refused_allocation_changes_nothing() -> None:
    cache = KVCacheManager(4, 2)
    filled(cache, 0, [1, 2, 3, 4])
    chain = cache.chain("a", [1, 2, 3, 4, 5, 6, 7])
    hit = cache.match(chain, 7)
    assert len(hit) == 2
    assert cache.allocate(1, chain, 7, cached=hit, reserve=1) is None
    assert cache.sequences == {0}
    cache.check_integrity()
    assert cache.allocate(1, chain, 7, cached=hit) is not None


def test_reviving_idle_blocks_counts_against_the_free_ones() -> None:
    cache = KVCacheManager(3, 2)
    filled(cache, 0, [1, 2, 3, 4])
    cache.release(0)
    assert (cache.num_free, cache.num_cached) == (3, 2)
    chain = cache.chain("a", [1, 2, 3, 4, 5])
    hit = cache.match(chain, 5)
    assert cache.allocate(1, chain, 7, cached=hit) is None, "two idle and one free are three"
    assert cache.allocate(1, chain, 5, cached=hit) is not None
    assert cache.num_free == 0


def test_the_last_token_is_never_matched() -> None:
    cache = KVCacheManager(8, 2)
    blocks = filled(cache, 0, [1, 2, 3, 4])
    assert matched(cache, [1, 2, 3, 4]) == blocks[:1]
    assert matched(cache, [1, 2, 3, 4, 9]) == blocks


def test_only_blocks_that_are_full_known_and_computed_are_matched() -> None:
    cache = KVCacheManager(8, 2)
    chain = cache.chain("a", [1, 2, 3, 4, 5])
    blocks = cache.allocate(0, chain, 8)
    assert blocks is not None and chain is not None
    longer = [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert matched(cache, longer) == []
    cache.commit(0, 3)
    assert matched(cache, longer) == blocks[:1]
    cache.commit(0, 8)
    assert matched(cache, longer) == blocks[:2], "token 5 is alone in its block"
    chain.feed([6])
    cache.commit(0, 8)
    assert matched(cache, longer) == blocks[:3]


def test_tenants_do_not_see_each_other() -> None:
    cache = KVCacheManager(8, 2)
    filled(cache, 0, [1, 2, 3], tenant="a")
    assert matched(cache, [1, 2, 3], tenant="a")
    for other in ("b", "", "a\0", "aa", "\ud800"):
        assert not matched(cache, [1, 2, 3], tenant=other)


def test_the_least_recently_used_block_is_evicted_first() -> None:
    cache = KVCacheManager(4, 1)
    for seq, token in enumerate([1, 2, 3]):
        filled(cache, seq, [token])
    for seq in (1, 0, 2):
        cache.release(seq)
    filled(cache, 3, [2, 9])  # uses 2's block again, and the last free one
    cache.release(3)

    def known() -> list[int]:
        return [token for token in (1, 2, 3) if matched(cache, [token, 0])]

    assert known() == [1, 2, 3]
    for seq, expected in ((10, [2, 3]), (11, [2]), (12, [2])):
        assert cache.allocate(seq, None, 1) is not None
        assert known() == expected
    assert not matched(cache, [2, 9, 0])[1:], "the end of a prefix goes before its start"


def test_a_prefix_is_evicted_from_its_end() -> None:
    cache = KVCacheManager(3, 1)
    filled(cache, 0, [1, 2, 3])
    cache.release(0)
    for seq, left in ((1, 2), (2, 1), (3, 0)):
        cache.allocate(seq, None, 1)
        assert len(matched(cache, [1, 2, 3, 4])) == left


@pytest.mark.parametrize(("shared", "copied"), [(5, True), (4, False), (0, False)])
def test_a_fork_shares_full_blocks_and_copies_the_partial_one(shared: int, copied: bool) -> None:
    cache = KVCacheManager(16, 2)
    parent = cache.allocate(0, None, 7)
    fork = cache.fork(0, 1, None, shared_tokens=shared, num_tokens=7)
    assert parent is not None and fork is not None
    full = shared // 2
    assert fork.blocks[:full] == parent[:full]
    assert not set(fork.blocks[full:]) & set(parent)
    assert len(fork.blocks) == 4
    if copied:
        assert fork.copy is not None
        assert (fork.copy.source, fork.copy.target) == (parent[full], fork.blocks[full])
    else:
        assert fork.copy is None
    assert cache.num_free == 16 - 4 - (4 - full)
    cache.release(0)
    assert set(cache.table(1)) == set(fork.blocks)
    cache.release(1)
    assert cache.num_free == 16


def test_a_fork_that_does_not_fit_changes_nothing() -> None:
    cache = KVCacheManager(5, 2)
    cache.allocate(0, None, 7)
    assert cache.fork(0, 1, None, shared_tokens=5, num_tokens=7) is None
    assert cache.fork(0, 1, None, shared_tokens=6, num_tokens=7, reserve=1) is None
    cache.check_integrity()
    assert cache.fork(0, 1, None, shared_tokens=6, num_tokens=7) is not None


def test_forgotten_content_is_not_matched_and_its_blocks_come_back() -> None:
    cache = KVCacheManager(4, 2)
    filled(cache, 0, [1, 2, 3, 4])
    chain = cache.chain("a", [1, 2, 3, 4])
    cache.forget(chain)
    assert not matched(cache, [1, 2, 3, 4, 5])
    cache.release(0)
    assert (cache.num_free, cache.num_cached) == (4, 0)

    filled(cache, 1, [1, 2, 3, 4])
    cache.release(1)
    assert cache.num_cached == 2
    cache.forget(chain)
    cache.check_integrity()
    assert (cache.num_free, cache.num_cached) == (4, 0)


def test_caching_off_keeps_nothing() -> None:
    cache = KVCacheManager(4, 2, prefix_caching=False)
    assert cache.chain("a", [1, 2]) is None
    cache.allocate(0, None, 4)
    cache.commit(0, 4)
    cache.release(0)
    assert (cache.num_free, cache.num_cached) == (4, 0)


def test_misuse_is_refused() -> None:
    cache = KVCacheManager(4, 2)
    cache.allocate(0, None, 2)
    with pytest.raises(IntegrityError):
        cache.allocate(0, None, 2)
    for num_blocks, block_size in ((0, 1), (1, 0)):
        with pytest.raises(ValueError, match="at least 1"):
            KVCacheManager(num_blocks, block_size)


def test_a_lost_reference_is_noticed() -> None:
    cache = KVCacheManager(4, 2)
    (block,) = cache.allocate(0, None, 2) or []
    cache._pool.drop(block)
    with pytest.raises(IntegrityError):
        cache.check_integrity()


@dataclass
class Table:
    """A sequence as the ranks would keep it."""

    tenant: str
    tokens: list[int]
    chain: DigestChain | None
    computed: int
    blocks: list[int] = field(default_factory=list)


class TablesHoldWhatTheyClaim(RuleBasedStateMachine):
    """Slots remember the tenant and the whole prefix of the token that was written there."""

    @initialize(num_blocks=st.integers(2, 10), block_size=st.integers(1, 3))
    def start(self, num_blocks: int, block_size: int) -> None:
        self.cache, self.size = KVCacheManager(num_blocks, block_size), block_size
        self.slots: dict[tuple[int, int], tuple[str, tuple[int, ...]]] = {}
        self.tables: dict[int, Table] = {}
        self.next_seq = 0

    def compute(self, table: Table, until: int) -> None:
        for position in range(table.computed, until):
            place = table.blocks[position // self.size], position % self.size
            self.slots[place] = table.tenant, tuple(table.tokens[: position + 1])
        table.computed = until

    def pick(self, index: int) -> tuple[int, Table]:
        return list(self.tables.items())[index % len(self.tables)]

    @rule(
        tenant=st.sampled_from("ab"),
        tokens=st.lists(st.integers(0, 1), min_size=1, max_size=9),
        reserve=st.integers(0, 2),
    )
    def allocate(self, tenant: str, tokens: list[int], reserve: int) -> None:
        chain = self.cache.chain(tenant, tokens)
        cached = self.cache.match(chain, len(tokens))
        free = self.cache.num_free
        blocks = self.cache.allocate(
            self.next_seq, chain, len(tokens), cached=cached, reserve=reserve
        )
        if blocks is None:
            assert free < self.cache.blocks_for(len(tokens)) + reserve
            return
        assert self.cache.num_free >= reserve
        computed = len(cached) * self.size
        self.tables[self.next_seq] = Table(tenant, tokens, chain, computed, blocks)
        self.next_seq += 1

    @precondition(lambda self: self.tables)
    @rule(index=st.integers(0, 9), count=st.integers(1, 4), commit=st.booleans())
    def advance(self, index: int, count: int, commit: bool) -> None:
        seq, table = self.pick(index)
        self.compute(table, min(table.computed + count, len(table.tokens)))
        if commit:
            self.cache.commit(seq, table.computed)

    @precondition(lambda self: self.tables)
    @rule(index=st.integers(0, 9), token=st.integers(0, 1))
    def append(self, index: int, token: int) -> None:
        seq, table = self.pick(index)
        added = self.cache.append(seq, len(table.tokens) + 1)
        if added is None:
            assert self.cache.num_free == 0
            return
        table.blocks += added
        table.tokens = [*table.tokens, token]
        if table.chain is not None:
            table.chain.feed([token])

    @precondition(lambda self: self.tables)
    @rule(index=st.integers(0, 9))
    def fork(self, index: int) -> None:
        parent, table = self.pick(index)
        shared = min(table.computed, len(table.tokens) - 1)
        tokens = table.tokens[: shared + 1]
        chain = None if table.chain is None else table.chain.branch(tokens)
        fork = self.cache.fork(
            parent, self.next_seq, chain, shared_tokens=shared, num_tokens=len(tokens)
        )
        if fork is None:
            return
        if fork.copy is not None:
            for offset in range(self.size):
                content = self.slots.pop((fork.copy.source, offset), None)
                if content is not None:
                    self.slots[fork.copy.source, offset] = content
                    self.slots[fork.copy.target, offset] = content
        self.tables[self.next_seq] = Table(table.tenant, tokens, chain, shared, fork.blocks)
        self.next_seq += 1

    @precondition(lambda self: self.tables)
    @rule(index=st.integers(0, 9), broken=st.booleans())
    def release(self, index: int, broken: bool) -> None:
        seq, table = self.pick(index)
        del self.tables[seq]
        self.cache.release(seq)
        if broken:
            self.cache.forget(table.chain)
            assert self.cache.match(table.chain, len(table.tokens) + 1) == []

    @invariant()
    def every_table_reads_its_own_prefix(self) -> None:
        if not hasattr(self, "cache"):
            return
        self.cache.check_integrity()
        for seq, table in self.tables.items():
            assert list(self.cache.table(seq)) == table.blocks
            for position in range(table.computed):
                place = table.blocks[position // self.size], position % self.size
                assert self.slots[place] == (table.tenant, tuple(table.tokens[: position + 1]))

    def teardown(self) -> None:
        for seq in list(getattr(self, "tables", ())):
            self.cache.release(seq)
        if hasattr(self, "cache"):
            self.cache.check_integrity()
            assert self.cache.num_free == self.cache.num_blocks


TestTablesHoldWhatTheyClaim = TablesHoldWhatTheyClaim.TestCase
TestTablesHoldWhatTheyClaim.settings = settings(
    max_examples=200, stateful_step_count=40, deadline=None
)
