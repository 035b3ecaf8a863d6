"""One request waits for its blocks, and nobody else does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from phalanx.controller.kvcache.changes import Tier
from phalanx.controller.kvcache.manager import KVCacheManager
from phalanx.controller.kvcache.rates import MoveRates
from phalanx.controller.kvcache.tiers import LowerTiers
from phalanx.controller.scheduling.request import FinishReason, Request
from phalanx.controller.scheduling.scheduler import Scheduler, SchedulerConfig
from phalanx.protos.errors import GroupLost
from phalanx.protos.moves import Move, Moved, MoveKind, MoveReport
from phalanx.protos.sampling import SamplingParams

FIRST, SECOND = list(range(16)), [7] * 14
HOST = [Tier.HOST]


class Always(MoveRates):
    def worthwhile(self, tiers: Sequence[Tier], ahead_s: float = 0.0) -> int:
        return len(tiers)


class Loop:
    """A scheduler with one rank whose moves are done when the test says so."""

    def __init__(self, rank: Any) -> None:
        self.tiers = LowerTiers(num_ranks=1, host_slots=32)
        self.cache = KVCacheManager(10, 2, tiers=self.tiers, rates=Always(2, 64))
        config = SchedulerConfig(
            max_tokens_per_step=32,
            max_running=4,
            max_queued=9,
            max_context=20,
            eos_token_ids=(),
            reserve_tokens=0,
        )
        self.scheduler, self.rank = Scheduler(config, self.cache), rank(10, 2)
        self.moves: list[Move] = []
        self.host: dict[int, Any] = {}
        self.finished: dict[str, FinishReason] = {}
        self.cached: dict[str, int] = {}

    def add(self, name: str, prompt: list[int], max_tokens: int = 1, n: int = 1) -> None:
        params = SamplingParams(max_tokens=max_tokens, seed=1, n=n)
        self.scheduler.add(
            [
                Request(
                    request_id=name,
                    sample_index=index,
                    prompt_token_ids=list(prompt),
                    params=params,
                    tenant="a",
                    arrival=0.0,
                )
                for index in range(n)
            ]
        )

    def step(self, now: float = 0.0) -> int:
        """Rows of the step; 0 = nothing but moves, or nothing."""
        plan = self.scheduler.schedule(now)
        if plan is None:
            return 0
        for move in plan.moves:
            if move.kind is MoveKind.STORE:
                self.host[move.slot] = list(self.rank.pool[move.block])
        self.moves += plan.moves
        self.feed(self.scheduler.update(self.rank.execute(plan)))
        self.scheduler.check_integrity()
        return len(plan.rows)

    def feed(self, events: Any) -> None:
        for event in events:
            self.cached.setdefault(event.request_id, event.cached_prompt_tokens)
            if event.finish is not None:
                self.finished[event.request_id] = event.finish

    def move(self, *, error: str = "") -> None:
        """Do all moves that were ordered."""
        done, self.moves = self.moves, []
        for move in done:
            if move.kind is MoveKind.LOAD and not error:
                self.rank.pool[move.block] = list(self.host[move.slot])
        self.scheduler.moved(MoveReport([Moved(move.number, 0.01, error) for move in done]), 1.0)

    def drain(self) -> None:
        while self.scheduler.has_work or self.scheduler.awaits_moves:
            self.step()
            self.move()


@pytest.fixture
def loop(make_loop: Any) -> Loop:
    """FIRST is in host memory only: SECOND has taken the whole pool since."""
    loop = Loop(type(make_loop().rank))
    for name, prompt in (("first", FIRST), ("second", SECOND)):
        loop.add(name, prompt)
        loop.drain()
    loop.add("third", [9] * 14)
    loop.drain()
    assert not loop.cache.match(loop.cache.chain("a", FIRST), 17)
    return loop


def test_others_go_on_while_one_loads(loop: Loop) -> None:
    loop.add("again", FIRST)
    loop.add("other", [3, 1])
    assert loop.step() == 1
    assert loop.finished.keys() >= {"other"} and "again" not in loop.finished
    assert loop.step() == 0 and loop.scheduler.awaits_moves
    loop.move()
    loop.drain()
    assert loop.finished["again"] is FinishReason.LENGTH
    assert loop.cached["again"] == 14, "all but the block of the last token"


def test_who_wants_the_same_blocks_waits_for_the_same_load(loop: Loop) -> None:
    loop.add("again", FIRST)
    loop.add("too", [*FIRST, 5])
    loop.step()
    loads = [move for move in loop.moves if move.kind is MoveKind.LOAD]
    assert len(loads) == 7 and loop.scheduler.num_running == 0
    loop.move()
    loop.drain()
    assert loop.cached["again"] == loop.cached["too"] == 14


def test_what_fails_is_recomputed_and_not_tried_again(loop: Loop) -> None:
    loop.add("again", FIRST)
    loop.step()
    loop.move(error="damaged")
    loop.drain()
    assert loop.finished["again"] is FinishReason.LENGTH
    assert loop.cached["again"] == 0
    assert loop.tiers.stats().failed >= 7


def test_nobody_waits_for_a_disk_that_hangs(loop: Loop) -> None:
    loop.add("again", FIRST[:8])
    assert loop.step() == 0
    hanging, loop.moves = loop.moves, []
    for _ in range(9):
        loop.step(now=99.0)
        loop.moves.clear()
    assert loop.finished["again"] is FinishReason.LENGTH and loop.cached["again"] == 0
    loop.moves = [move for move in hanging if move.kind is MoveKind.LOAD]
    loop.move()  # late, into blocks that nobody has been given
    loop.scheduler.check_integrity()


@pytest.mark.parametrize("samples", [1, 3])
def test_a_request_can_end_while_it_loads(loop: Loop, samples: int) -> None:
    loop.add("again", FIRST, n=samples)
    loop.step()
    loop.feed(loop.scheduler.abort("again", 0))
    loop.scheduler.check_integrity()
    loop.drain()
    assert loop.cache.num_free == loop.cache.num_blocks
    assert loop.cache.match(loop.cache.chain("a", FIRST), 17), "what has come stays for others"


def test_an_answer_to_no_question_ends_the_group(loop: Loop) -> None:
    with pytest.raises(GroupLost, match="move 999, which is not open"):
        loop.scheduler.moved(MoveReport([Moved(999, 0.1)]), 0.0)


def rates(tokens_per_s: float, **seconds: float) -> MoveRates:
    """Measured so often that nothing is left of the first guesses; seconds of a block of 16."""
    measured = MoveRates(16, 2**20)
    for _ in range(400):
        measured.on_step(1, 1000, 1000 / tokens_per_s)
        measured.on_loaded(seconds.get("overhead", 0.001), 0.0)
        measured.on_moved(MoveKind.LOAD, seconds.get("host", 0.001))
        measured.on_moved(MoveKind.READ, seconds.get("disk", 0.001))
    return measured


@pytest.mark.parametrize(
    ("measured", "tiers", "expected"),
    [
        (rates(1000), [Tier.HOST] * 8, 8),
        (rates(1000, host=0.02), [Tier.HOST] * 8, 0),  # 16 ms to compute
        (rates(1000, host=0.014), [Tier.HOST] * 8, 0),  # too close to be sure
        (rates(1000, disk=0.02), [Tier.HOST] * 3 + [Tier.DISK] * 5, 3),
        (rates(1000, disk=0.02), [Tier.DISK] + [Tier.HOST] * 5, 6),  # what follows makes up for it
        (rates(1000, overhead=0.05), [Tier.HOST] * 4, 0),
        (rates(1000, overhead=0.05), [Tier.HOST] * 8, 8),
        (rates(1000), [], 0),
    ],
)
def test_a_load_is_chosen_only_where_it_is_faster(
    measured: MoveRates, tiers: list[Tier], expected: int
) -> None:
    assert measured.worthwhile(tiers) == expected


def test_loads_ahead_count_and_one_slow_moment_is_forgotten() -> None:
    measured = rates(1000)
    assert measured.worthwhile(HOST * 8, ahead_s=0.2) == 0
    slow = rates(1000, host=0.03)
    tries = 0
    while not slow.worthwhile(HOST * 8):
        tries += 1
    assert 50 < tries < 200


def test_stores_take_a_part_of_a_step(loop: Loop) -> None:
    measured = MoveRates(16, 2**20)
    for _ in range(400):
        measured.on_step(4, 4, 0.05)
        measured.on_moved(MoveKind.STORE, 0.001)
    assert measured.stores(busy=True) in (4, 5)
    for _ in range(400):
        measured.on_moved(MoveKind.STORE, 1.0)
    assert measured.stores(busy=True) == 1
