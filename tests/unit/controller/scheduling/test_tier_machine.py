"""Random histories of a pool with host memory and disk below it, on ranks that can fail."""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from phalanx.controller.kvcache.manager import KVCacheManager
from phalanx.controller.kvcache.opening import open_tiers
from phalanx.controller.kvcache.rates import MoveRates
from phalanx.controller.scheduling.request import FinishReason, Request
from phalanx.controller.scheduling.scheduler import Scheduler, SchedulerConfig
from phalanx.protos.moves import Move, Moved, MoveKind, MoveReport
from phalanx.protos.sampling import SamplingParams
from phalanx.protos.specs import CacheSpec, TierSpec
from phalanx.protos.steps import StepPlan, StepResult

NUM_RANKS = 2
PROMPTS = [[0, 1] * 5, [0, 1, 1, 0] * 3, [1] * 9, [1, 0, 0] * 4, [0] * 7]
GARBAGE = "garbage"


class Always(MoveRates):
    """Rates by which a load is always worth it, and a plan stores up to two blocks."""

    def worthwhile(self, tiers: Any, ahead_s: float = 0.0) -> int:
        return len(tiers)

    def stores(self, *, busy: bool) -> int:
        return 2


class Hands:
    """What one rank has beside its pool: host memory, a disk, and moves that it has not done."""

    def __init__(self, rank: Any, host_slots: int, disk: dict[bytes, Any], room: int) -> None:
        self.rank, self.disk, self.room = rank, disk, room
        self.host: list[Any] = [None] * host_slots
        self.urgent: deque[Move] = deque()
        self.lazy: deque[Move] = deque()

    def execute(self, plan: StepPlan) -> StepResult:
        """Stores are done at once; nobody uses what other moves are about to read or write."""
        slots = {move.slot for move in (*self.urgent, *self.lazy)}
        filled = {move.block for move in self.urgent if move.kind is not MoveKind.STORE}
        filling = filled | {m.block for m in plan.moves if m.kind in (MoveKind.LOAD, MoveKind.READ)}
        for move in plan.moves:
            if move.kind is MoveKind.STORE:
                assert move.slot not in slots, "a slot in use is written"
                assert move.block not in filled, "a block is stored before it is filled"
                self.host[move.slot] = list(self.rank.pool[move.block])
        for row in plan.rows:
            assert filling.isdisjoint(row.new_blocks), "a block that is being filled is in use"
        for move in plan.moves:
            lazy = move.kind in (MoveKind.WRITE, MoveKind.DROP)
            (self.lazy if lazy else self.urgent).append(move)
        return self.rank.execute(plan)

    def work(self, known: dict[bytes, Any], *, fails: bool) -> MoveReport | None:
        """Do the next move."""
        if not self.urgent and not self.lazy:
            return None
        move = (self.urgent or self.lazy).popleft()
        if fails and move.kind not in (MoveKind.STORE, MoveKind.DROP):
            if move.block >= 0:
                self.rank.pool[move.block] = [GARBAGE] * self.rank.block_size
            return MoveReport([Moved(move.number, 0.1, "broken")])
        if move.kind is MoveKind.STORE:
            content = self.host[move.slot]
            # one prefix, one content: whatever has this name later is this
            assert known.setdefault(move.digest, content) == content
        elif move.kind is MoveKind.LOAD:
            assert self.host[move.slot] == known[move.digest]
            self.rank.pool[move.block] = list(self.host[move.slot])
        elif move.kind is MoveKind.WRITE:
            assert self.host[move.slot] == known[move.digest]
            self.disk[move.digest] = list(self.host[move.slot])
            assert len(self.disk) <= self.room, "more files than are allowed"
        elif move.kind is MoveKind.READ:
            if (content := self.disk.get(move.digest)) is None:
                return MoveReport([Moved(move.number, 0.1, "no such file")])
            assert content == known[move.digest]
            self.rank.pool[move.block] = list(content)
        else:
            self.disk.pop(move.digest, None)
        return MoveReport([Moved(move.number, 0.1)])


class Machine(RuleBasedStateMachine):
    """Callers, the scheduler, two ranks and their hands, in any order."""

    def __init__(self, rank: Any, caller: Any) -> None:
        super().__init__()
        self.make_rank, self.make_stream = rank, caller
        self.disks: list[dict[bytes, Any]] = [{} for _ in range(NUM_RANKS)]
        self.known: dict[bytes, Any] = {}
        self.streams: dict[tuple[str, int], Any] = {}
        self.now, self.added, self.epoch = 0.0, 0, 0

    @initialize(
        num_blocks=st.integers(4, 9),
        block_size=st.integers(1, 3),
        host_slots=st.integers(1, 16),
        disk_slots=st.integers(0, 16),
        max_running=st.integers(1, 4),
    )
    def start(self, **sizes: int) -> None:
        self.sizes = SimpleNamespace(**sizes)
        self.begin()

    def begin(self) -> None:
        sizes = self.sizes
        spec = TierSpec(host_slots=sizes.host_slots, disk_slots=sizes.disk_slots)
        reports = [
            SimpleNamespace(
                disk_slots=sizes.disk_slots,
                disk_digests=b"".join(disk),
                disk_refused=0,
                kv_bytes=0,
            )
            for disk in self.disks
        ]
        cache = CacheSpec(block_size=sizes.block_size, num_blocks=sizes.num_blocks, dtype="float32")
        tiers = open_tiers(spec, [SimpleNamespace(report=report) for report in reports], cache)
        self.cache = KVCacheManager(
            sizes.num_blocks, sizes.block_size, tiers=tiers, rates=Always(sizes.block_size, 64)
        )
        config = SchedulerConfig(
            max_tokens_per_step=sizes.max_running + 4,
            max_running=sizes.max_running,
            max_queued=99,
            max_context=20,
            eos_token_ids=(3,),
            reserve_tokens=2,
        )
        self.scheduler = Scheduler(config, self.cache, self.epoch)
        self.hands = [
            Hands(
                self.make_rank(sizes.num_blocks, sizes.block_size),
                sizes.host_slots,
                disk,
                sizes.disk_slots,
            )
            for disk in self.disks
        ]
        self.results: deque[StepResult] = deque()

    @rule(
        prompt=st.sampled_from(PROMPTS),
        length=st.integers(4, 14),
        max_tokens=st.integers(1, 6),
        n=st.sampled_from([1, 1, 1, 2]),
        tenant=st.sampled_from(["a", "a", "a", "b"]),
    )
    def add(self, prompt: list[int], length: int, max_tokens: int, n: int, tenant: str) -> None:
        prompt = prompt[: min(length, self.scheduler.max_context - 1)]
        self.added += 1
        params = SamplingParams(n=n, max_tokens=max_tokens, seed=self.added)
        group = [
            Request(
                request_id=f"r{self.added}",
                sample_index=index,
                prompt_token_ids=list(prompt),
                params=params,
                tenant=tenant,
                arrival=self.now,
            )
            for index in range(n)
        ]
        self.scheduler.add(group)
        for request in group:
            self.streams[request.key] = self.make_stream(request)

    @rule(steps=st.integers(4, 16), fails=st.sampled_from([False, False, True]))
    def run_on(self, steps: int, fails: bool) -> None:
        for _ in range(steps):
            self.plan()
            if self.results:
                self.receive()
            for rank in range(NUM_RANKS):
                self.work(rank, 2, fails and rank == 1)
            self.books_agree()

    @rule(count=st.integers(1, 3))
    def send(self, count: int) -> None:
        for _ in range(count):
            self.plan()

    def plan(self) -> bool:
        idle = not self.scheduler.in_flight and not self.scheduler.awaits_moves
        due = self.scheduler.num_running or self.scheduler.num_waiting
        plan = self.scheduler.schedule(self.now)
        assert plan is not None or not (idle and due), "there is work, and nothing is done"
        if plan is None:
            return False
        # plans are msgpack on their way; what is equal there must be equal here
        answers = [hand.execute(plan) for hand in self.hands]
        assert answers[0] == answers[1]
        self.results.append(answers[0])
        return True

    @precondition(lambda self: self.results)
    @rule()
    def receive(self) -> None:
        result = self.results.popleft()
        self.feed(self.scheduler.update(result))

    def feed(self, events: Any) -> None:
        for event in events:
            self.streams[event.request_id, event.sample_index].feed(event)

    @rule(
        rank=st.integers(0, NUM_RANKS - 1),
        count=st.integers(1, 6),
        fails=st.sampled_from([False, False, False, True]),
    )
    def work(self, rank: int, count: int, fails: bool) -> None:
        for _ in range(count):
            report = self.hands[rank].work(self.known, fails=fails)
            if report is not None:
                self.scheduler.moved(report, self.now)

    @rule(back=st.integers(0, 5))
    def abort(self, back: int) -> None:
        self.feed(self.scheduler.abort(f"r{max(self.added - back, 0)}"))

    @precondition(lambda self: self.streams)
    @rule(back=st.integers(0, 5), often=st.integers(0, 5))
    def poison(self, back: int, often: int) -> None:
        if often:
            return
        streams = list(self.streams.values())
        request = streams[max(len(streams) - 1 - back, 0)].request
        for hand in self.hands:
            hand.rank.poisoned.add((request.params.seed, request.sample_index))

    @rule(often=st.integers(0, 7), damaged=st.booleans())
    def restart(self, often: int, damaged: bool) -> None:
        """The ranks are gone, with what was on its way to the disks, or a file of one of them."""
        if often:
            return
        if damaged and self.disks[0]:
            del self.disks[0][next(iter(self.disks[0]))]
        self.streams = {}
        self.epoch += 1
        self.begin()

    @rule()
    def tick(self) -> None:
        self.now += 1

    @invariant()
    def books_agree(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        self.scheduler.check_integrity()
        assert self.cache.loads is not None
        tiers = self.cache.loads.tiers.stats()
        assert tiers.host_used <= tiers.host_total and tiers.disk_used <= tiers.disk_total

    def teardown(self) -> None:
        """In the end everybody has his tokens, and nothing is moved any more."""
        if not hasattr(self, "scheduler"):
            return
        for _ in range(4000):
            while self.plan():
                pass
            if self.results:
                self.receive()
            for rank in range(NUM_RANKS):
                self.work(rank, 4, False)
            self.books_agree()
            if not self.scheduler.has_work and not self.results and not self.scheduler.awaits_moves:
                break
        assert not self.scheduler.has_work and not self.scheduler.awaits_moves
        for stream in self.streams.values():
            assert stream.finish is not None
            stream.check(self.scheduler.max_context)
        assert all(stream.finish is not FinishReason.DEADLINE for stream in self.streams.values())
        assert self.disks[0].keys() == self.disks[1].keys()


def test_contents_are_those_of_a_lone_run_whatever_is_moved(make_loop: Any, caller: Any) -> None:
    run_state_machine_as_test(
        lambda: Machine(type(make_loop().rank), caller),
        settings=settings(
            max_examples=120,
            stateful_step_count=50,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
