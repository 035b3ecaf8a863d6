"""The view of all replicas' prefixes against what the replicas hold, whatever gets lost."""

from __future__ import annotations

import tracemalloc
from array import array
from collections.abc import Sequence
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from phalanx.controller.kvcache.changes import PrefixUpdate, Tier, prefix_key
from phalanx.controller.kvcache.manager import KVCacheManager
from phalanx.controller.kvcache.rates import MoveRates
from phalanx.controller.kvcache.tiers import LowerTiers
from phalanx.controller.routing.index import GlobalPrefixIndex, Lower
from phalanx.controller.routing.table import FILL, STRIDE, CompactTable
from phalanx.protos.moves import Moved

TENANTS = ["a", "b"]
TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=10)


class CountedReplica:
    """A replica's cache, driven by requests that come, grow and go."""

    def __init__(self, epoch: int, num_blocks: int) -> None:
        self.cache = KVCacheManager(num_blocks, 2, namespace=b"model")
        self.cache.track_changes(epoch)
        self.open: list[tuple[int, str, list[int]]] = []
        self.seen: list[tuple[str, list[int]]] = []
        self.next_seq = 0

    def begin(self, tenant: str, tokens: list[int]) -> None:
        chain = self.cache.chain(tenant, tokens)
        cached = self.cache.match(chain, len(tokens))
        if self.cache.allocate(self.next_seq, chain, len(tokens), cached=cached) is None:
            return
        self.cache.commit(self.next_seq, len(tokens))
        self.open.append((self.next_seq, tenant, tokens))
        self.seen.append((tenant, tokens))
        self.next_seq += 1

    def end(self, which: int, *, broken: bool) -> None:
        if self.open:
            seq, tenant, tokens = self.open.pop(which % len(self.open))
            self.cache.release(seq)
            if broken:
                self.cache.forget(self.cache.chain(tenant, tokens))

    def holds(self) -> set[int]:
        """What it would match, found by asking the cache itself, prefix by prefix."""
        held = set()
        for tenant, tokens in self.seen:
            chain = self.cache.chain(tenant, tokens)
            assert chain is not None
            for digest in chain.digests:
                only = self.cache.chain(tenant, [])
                assert only is not None
                only.digests = [digest]
                if self.cache.match(only, 3):
                    held.add(prefix_key(digest))
        return held


class IndexMachine(RuleBasedStateMachine):
    """Replicas that start anew, and a line on which updates are delayed and lost."""

    @initialize(num_blocks=st.integers(1, 8))
    def start(self, num_blocks: int) -> None:
        self.num_blocks, self.epoch = num_blocks, 0
        self.index = GlobalPrefixIndex()
        self.replicas: dict[int, CountedReplica] = {}
        self.line: dict[int, list[PrefixUpdate]] = {}
        self.ghosts: list[tuple[int, PrefixUpdate]] = []
        for number in range(3):
            self.restart(number, told=False)

    @rule(number=st.integers(0, 2), told=st.booleans())
    def restart(self, number: int, told: bool) -> None:
        self.epoch += 1
        self.replicas[number] = CountedReplica(self.epoch, self.num_blocks)
        late = self.line.setdefault(number, [])
        if told:
            self.index.drop(number)
            assert self.index.contents(number) == frozenset()
        self.ghosts += [(number, update) for update in late]
        del late[:]

    @rule(which=st.integers(0, 99))
    def haunt(self, which: int) -> None:
        """An update comes after its sender's end, maybe after those of its successor."""
        if self.ghosts:
            number, update = self.ghosts.pop(which % len(self.ghosts))
            if not self.index.apply(number, update):
                self.replicas[number].cache.list_prefixes()

    @rule(number=st.integers(0, 2), tenant=st.sampled_from(TENANTS), tokens=TOKENS)
    def begin(self, number: int, tenant: str, tokens: list[int]) -> None:
        self.replicas[number].begin(tenant, tokens)

    @rule(number=st.integers(0, 2), which=st.integers(0, 9), broken=st.booleans())
    def end(self, number: int, which: int, broken: bool) -> None:
        self.replicas[number].end(which, broken=broken)

    @rule(number=st.integers(0, 2), lost=st.sampled_from([False, False, False, True]))
    def step(self, number: int, lost: bool) -> None:
        update = self.replicas[number].cache.drain_changes()
        if update is not None and not lost:
            self.line[number].append(update)

    @rule(number=st.integers(0, 2))
    def deliver(self, number: int) -> None:
        if self.line[number] and not self.index.apply(number, self.line[number].pop(0)):
            self.replicas[number].cache.list_prefixes()

    @invariant()
    def memory_is_bounded(self) -> None:
        if hasattr(self, "index"):
            # each of the three groups alive or not yet given up
            assert len(self.index) <= 3 * self.num_blocks

    def teardown(self) -> None:
        if not hasattr(self, "index"):
            return
        for number, replica in self.replicas.items():
            # whatever was lost before is noticed with the next thing that happens
            replica.begin("a", [7, 7])
            replica.end(-1, broken=True)
            replica.begin("a", [8, 8])
            for _ in range(2):
                self.step(number, lost=False)
                while self.line[number]:
                    self.deliver(number)
        while self.ghosts:
            self.haunt(0)
        held = {number: replica.holds() for number, replica in self.replicas.items()}
        assert {number: set(self.index.contents(number)) for number in held} == held
        assert len(self.index) == len(set().union(*held.values()))


TestIndexMachine = IndexMachine.TestCase
TestIndexMachine.settings = settings(max_examples=400, stateful_step_count=40, deadline=None)


def listing(keys: list[int], epoch: int = 0, tiers: Sequence[int] = ()) -> PrefixUpdate:
    names = array("Q", keys)
    return PrefixUpdate(epoch=epoch, first=0, keys=names, added=bytes(tiers), listing=True)


@given(
    st.dictionaries(st.integers(0, 70), st.tuples(st.integers(0, 99), st.booleans()), max_size=6),
    st.integers(0, 90),
)
def test_runs_are_the_longest_from_the_start(held: dict[int, tuple[int, bool]], asked: int) -> None:
    """Replicas hold so many of the first blocks; some also what is behind, without its beginning."""
    index, keys = GlobalPrefixIndex(), [prefix_key(Random(key).randbytes(8)) for key in range(100)]
    for replica, (count, other) in held.items():
        assert index.apply(replica, listing(keys[:count] + [7] * other))
    found = index.runs(iter(keys[:asked]))
    assert [depth for depth, _ in found] == sorted({depth for depth, _ in found})
    runs = {
        replica: sum(depth for depth, holders in found if holders >> replica & 1)
        for replica in range(71)
    }
    for replica in range(71):
        assert runs[replica] == min(held.get(replica, (0, False))[0], asked)


def test_few_keys_are_asked_for_beyond_what_anybody_holds() -> None:
    index = GlobalPrefixIndex()
    index.apply(0, listing([1, 2]))
    index.apply(1, listing([1]))
    asked = iter(range(1, 99))
    assert index.runs(asked) == [(1, 0b10), (2, 0b01)]
    assert next(asked) == 4, "hashing the rest would be in vain"
    nobody = iter(range(50, 99))
    assert index.runs(nobody) == [] and next(nobody) == 51
    index.apply(2, listing(list(range(1, 70))))
    asked = iter(range(1, 999))
    assert index.runs(asked)[-1] == (69, 0b100) and next(asked) <= 70 + STRIDE


def test_a_gap_is_noticed_and_healed_by_a_listing() -> None:
    cache, index = KVCacheManager(8, 1), GlobalPrefixIndex()
    cache.track_changes(epoch=4)

    def compute(seq: int, token: int) -> PrefixUpdate:
        chain = cache.chain("a", [token])
        cache.allocate(seq, chain, 1)
        cache.commit(seq, 1)
        update = cache.drain_changes()
        assert update is not None
        return update

    assert index.apply(0, compute(0, 10))
    compute(1, 11)  # lost
    assert not index.apply(0, compute(2, 12))
    assert not index.contents(0), "better nothing than something wrong"
    assert not index.apply(0, compute(3, 13)), "still waits for the listing"
    cache.list_prefixes()
    update = cache.drain_changes()
    assert update is not None and index.apply(0, update)
    assert len(index.contents(0)) == 4
    assert index.apply(0, compute(4, 14)) and len(index.contents(0)) == 5


@given(
    st.lists(st.tuples(st.sampled_from(TENANTS), TOKENS, st.integers(0, 3)), max_size=14),
    st.integers(1, 6),
    st.integers(1, 4),
    st.integers(0, 4),
)
@settings(deadline=None)
def test_every_block_is_known_with_its_fastest_tier(
    requests: list[tuple[str, list[int], int]], num_blocks: int, host_slots: int, disk_slots: int
) -> None:
    """A replica whose ranks do every move at once; host memory and disk give up blocks as well."""
    tiers = LowerTiers(num_ranks=1, host_slots=host_slots, disk_slots=disk_slots)
    cache = KVCacheManager(num_blocks, 2, tiers=tiers, rates=MoveRates(2, 64))
    cache.track_changes(0)
    index, seen = GlobalPrefixIndex(), set[bytes]()
    index.apply(1, listing([5]))
    for seq, (tenant, tokens, stores) in enumerate(requests):
        chain = cache.chain(tenant, tokens)
        assert chain is not None
        tiers.begin_plan(stores)
        cached = cache.match(chain, len(tokens))
        if cache.allocate(seq, chain, len(tokens), cached=cached) is not None:
            cache.commit(seq, len(tokens))
            cache.release(seq)
        seen.update(chain.digests)
        for _ in range(3):
            for move in tiers.take_orders():
                tiers.settle(Moved(move.number, 0.0))
        if seq % 5 == 4:
            cache.list_prefixes()
        update = cache.drain_changes()
        assert update is None or index.apply(0, update)
        held = set(cache._index.digests())
        for digest in seen:
            expected = Tier.DEVICE if digest in held else tiers.tier(digest)
            assert index.tier(0, prefix_key(digest)) is expected
    assert index.contents(1) == {5}
    index.drop(0)
    assert len(index) == 1


def test_what_is_below_the_pool_is_counted_as_far_as_a_run_goes() -> None:
    index = GlobalPrefixIndex()
    index.apply(0, listing([1, 2, 3, 4, 5], tiers=[1, 1, 2, 2, 3]))
    index.apply(700, listing([1, 2, 4], tiers=[3, 2, 2]))
    index.apply(9, listing([1, 2, 3]))
    found, lower = index.lookup([1, 2, 3, 4, 5, 6])
    assert found == [(2, 1 << 700), (3, 1 << 9), (5, 1)]
    assert lower == {0: Lower(2, 1), 700: Lower(1, 1)}


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 3)), max_size=200), st.integers(1, 4))
@settings(deadline=None, max_examples=50)
def test_the_table_is_a_dictionary(changes: list[tuple[int, int]], spread: int) -> None:
    table, model = CompactTable(), dict[int, int]()
    keys = range(0, 21 * FILL * spread, 7)
    table.change(keys, [9] * len(keys), lambda before, mark: mark)
    model.update(dict.fromkeys(keys, 9))
    for key, value in changes:
        table.change([key], [value], lambda before, mark: mark or -1)
        if value:
            model[key] = value
        else:
            model.pop(key, None)
        assert table.get(key) == model.get(key)
    table.replace_values({9: 2, 1: None})
    model = {key: 2 if value == 9 else value for key, value in model.items() if value != 1}
    assert dict(table.items()) == model and len(table) == len(model)
    assert all(table.get(key) == value for key, value in model.items())


def test_a_block_takes_less_than_twenty_bytes() -> None:
    random, count = Random(1), 15_000
    tracemalloc.start()
    try:
        index = GlobalPrefixIndex()
        before = tracemalloc.get_traced_memory()[0]
        for replica in range(4):
            shared = [prefix_key(Random(key).randbytes(8)) for key in range(1000)]
            own = [random.getrandbits(64) for _ in range(count - 1000)]
            index.apply(replica, listing(shared + own))
        del shared, own
        used = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert used / (4 * count) < 20
