"""What the supervisor does about replicas, which are played: they answer at once, and die when told."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from phalanx.controller.cluster import recovery
from phalanx.controller.cluster.fleet import RankFacts
from phalanx.controller.cluster.recovery import CRASH_LOOP, Desired
from phalanx.controller.engine import AsyncEngine
from phalanx.controller.handle import ReplicaHandle
from phalanx.controller.scheduling.probation import Computing
from phalanx.controller.scheduling.request import FinishReason, Request, TokenEvent
from phalanx.controller.scheduling.scheduler import SchedulerStats
from phalanx.controller.supervisor import Supervisor
from phalanx.protos.errors import GroupLost, ModelError, Unavailable
from phalanx.protos.sampling import SamplingParams
from phalanx.protos.specs import DecoderSpec, LoadReport, RopeSpec
from phalanx.protos.steps import SampledToken

MODEL = DecoderSpec(
    family="llama",
    num_layers=1,
    hidden_size=8,
    intermediate_size=8,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    vocab_size=100,
    max_context=64,
    norm_eps=1e-5,
    rope=RopeSpec(rotary_dim=4),
)
STATS = SchedulerStats(
    running=0,
    waiting=0,
    blocks_total=4,
    blocks_free=4,
    blocks_cached=0,
    prefix_queried=0,
    prefix_hit=0,
    preemptions=0,
    steps=0,
)
REPORT = LoadReport(
    rank=0, weight_bytes=1, kv_bytes=1, tensors_used=1, tensors_ignored=[], kernels="played"
)


class NoTransfers:
    """Of a replica whose ranks exchange no blocks."""

    exchange = None

    def withdraw(self, transfer: int) -> None:
        pass

    def give_up(self, transfer: int) -> None:
        pass


class PlayedReplica:
    """Gives a request of one token its token; others wait until it dies or stops."""

    transfers = NoTransfers()
    computing = Computing(frozenset())

    def __init__(self, world: World, index: int) -> None:
        self.world, self.index = world, index
        self.lost: GroupLost | None = None
        self.requests: list[Request] = []
        self.handle: ReplicaHandle

    def stats(self) -> SchedulerStats:
        return STATS

    def add(self, group: Sequence[Request], *, readmitted: bool = False) -> None:
        for request in group:
            if request.params.max_tokens == 1:
                self.finish(request)
            else:
                self.requests.append(request)

    def finish(self, request: Request) -> None:
        event = TokenEvent(
            request_id=request.request_id,
            sample_index=request.sample_index,
            first_index=0,
            tokens=(SampledToken(0, 7),),
            finish=FinishReason.LENGTH,
        )
        self.world.engine.sink([event])

    def abort(self, *arguments: Any) -> None: ...

    def die(self, error: GroupLost) -> None:
        if self.lost is None:
            self.lost = error
            self.world.engine.lost(self.handle, error)

    def stop(self) -> None:
        self.world.log.append(f"stop {self.index} epoch {self.world.epochs[self]}")
        self.die(GroupLost("the replica was stopped"))


class World:
    """An engine, its supervisor, and the places that there are."""

    def __init__(self, replicas: int, desired: Desired, free: dict[str, int]) -> None:
        self.free = free
        self.log: list[str] = []
        self.epochs: dict[PlayedReplica, int] = {}
        self.replicas: dict[int, PlayedReplica] = {}
        self.failure: Exception | None = None
        self.stillborn = False
        """Whether the next group is lost before anybody takes it in."""
        self.takes_all = False
        """Whether a group that starts leaves no place free."""
        self.engine = AsyncEngine(MODEL, replicas)
        self.supervisor = Supervisor(
            self.engine, replicas, self.start, desired, lambda: dict(self.free), max_replicas=3
        )
        self.gate = asyncio.Event()
        """Groups start while it is set."""
        self.gate.set()

    async def start(self, index: int, epoch: int, tp: int | None = None) -> ReplicaHandle:
        self.log.append(f"start {index} epoch {epoch} tp {tp}")
        await self.gate.wait()
        if self.failure is not None:
            raise self.failure
        if self.takes_all:
            self.free = dict.fromkeys(self.free, 0)
        facts = [
            RankFacts(rank=rank, node="n", device="cpu", report=REPORT, place="a")
            for rank in range(tp or 1)
        ]
        replica = PlayedReplica(self, index)
        replica.handle = ReplicaHandle(index, replica, facts, 16)  # type: ignore[arg-type]
        self.replicas[index], self.epochs[replica] = replica, epoch
        if self.stillborn:
            self.stillborn = False
            replica.die(GroupLost("rank 0: gone at once"))
        return replica.handle

    def states(self) -> list[tuple[str, int, str]]:
        replicas = self.engine.snapshot().replicas
        return [(item.state, item.tp, item.condition) for item in replicas]

    def ask(self, name: str, max_tokens: int) -> asyncio.Task[list[TokenEvent]]:
        async def read() -> list[TokenEvent]:
            params = SamplingParams(max_tokens=max_tokens)
            submitted = self.engine.submit(
                request_id=name, prompt_token_ids=[1], params=params, tenant="t", deadline=None
            )
            return [event async for batch in submitted for event in batch]

        return asyncio.create_task(read())


async def until(check: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not check():
            await asyncio.sleep(0.005)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FIRST_BACKOFF_S", "STEADY_S", "QUIET_WAIT_S", "LOOK_FOR_MORE_S", "LOOK_AGAIN_S"):
        monkeypatch.setattr(recovery, name, 0.01)


def play(
    scene: Callable[[World], Any],
    replicas: int = 1,
    desired: Desired | None = None,
    free: dict[str, int] | None = None,
) -> None:
    async def run() -> None:
        world = World(replicas, desired or Desired(), {"a": 8} if free is None else free)
        await world.supervisor.start_all()
        watching = asyncio.create_task(world.supervisor.run())
        await scene(world)
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        await world.supervisor.close()

    asyncio.run(run())


def test_a_crash_loop_is_degraded_with_its_cause_and_new_requests_are_sent_away() -> None:
    async def scene(world: World) -> None:
        world.failure = ModelError("the checkpoint lacks model.norm.weight")
        world.replicas[0].die(GroupLost("rank 1: silent; Ray says of rank 1: pid 7, ip 10.0.0.1"))
        await until(lambda: world.states()[0][0] == "degraded")
        words = f"lost {CRASH_LOOP} times, last: the checkpoint lacks model.norm.weight"
        assert world.states() == [("degraded", 0, words)]
        with pytest.raises(Unavailable) as caught:
            await world.ask("late", 5)
        assert caught.value.retry_after_s

    play(scene)


def test_what_ray_says_of_a_death_is_for_the_log_alone() -> None:
    async def scene(world: World) -> None:
        world.failure = GroupLost("rank 0 died; Ray says of rank 0: pid 7, ip 10.0.0.1")
        world.replicas[0].die(GroupLost("rank 1: silent; Ray says of rank 1: pid 7"))
        await until(lambda: "last: rank 0 died" in world.states()[0][2])
        assert "Ray" not in world.states()[0][2]

    play(scene)


def test_requests_wait_for_a_replica_that_is_on_its_way() -> None:
    async def scene(world: World) -> None:
        world.free = {"a": 0}
        world.replicas[0].die(GroupLost("rank 0: gone"))
        await until(lambda: world.engine.holding)
        asked = world.ask("early", 1)
        await asyncio.sleep(0.05)
        assert not asked.done()
        world.free = {"a": 1}
        [event] = await asked
        assert event.finish is FinishReason.LENGTH

    play(scene)


def test_a_group_shrinks_without_its_places_and_grows_when_it_is_quiet() -> None:
    async def scene(world: World) -> None:
        running = world.ask("long", 9)
        await until(lambda: bool(world.replicas[0].requests))
        world.free, world.takes_all = {"a": 3}, True
        world.replicas[0].die(GroupLost("rank 3: gone"))
        await until(lambda: world.states()[0] == ("ready", 3, "places for tp 4 are gone"))
        await until(lambda: bool(world.replicas[0].requests))  # it goes on there
        assert world.supervisor.ranks_missing == 1
        world.free = {"a": 1}
        world.replicas[0].finish(world.replicas[0].requests[0])
        await running
        await until(lambda: world.states()[0] == ("ready", 4, ""))
        assert world.log == [
            "start 0 epoch 1 tp 4",
            "start 0 epoch 2 tp 3",
            "stop 0 epoch 2",
            "start 0 epoch 3 tp 4",
        ]

    play(scene, desired=Desired(tp=4, shrink_after_s=0.0), free={"a": 4})


def test_a_rolling_restart_moves_streams_and_blames_nobody() -> None:
    async def scene(world: World) -> None:
        running = [world.ask(f"r{number}", 9) for number in range(4)]
        await until(lambda: sum(len(item.requests) for item in world.replicas.values()) == 4)
        for _ in range(4):  # more often than a request may be lost by deaths
            before = dict(world.replicas)
            assert world.supervisor.restart_all() == 2
            await until(lambda: not any(item.outdated for item in world.engine.snapshot().replicas))
            assert all(world.replicas[index] is not before[index] for index in before)
        for replica in world.replicas.values():
            for request in replica.requests:
                replica.finish(request)
        answers = await asyncio.gather(*running)
        assert [events[-1].finish for events in answers] == [FinishReason.LENGTH] * 4

    play(scene, replicas=2)


@pytest.mark.parametrize(
    ("free", "expected"),
    [
        ({"a": 1}, ["start 0 epoch 2 tp 1", "stop 0 epoch 1"]),
        ({"a": 0}, ["stop 0 epoch 1", "start 0 epoch 2 tp 1"]),
    ],
)
def test_a_successor_starts_first_where_there_is_room(
    free: dict[str, int], expected: list[str]
) -> None:
    async def scene(world: World) -> None:
        world.supervisor.restart_all()
        await until(lambda: len(world.log) == 3 and world.states() == [("ready", 1, "")])
        assert world.log[1:] == expected

    play(scene, free=free)


def test_a_replica_whose_successor_does_not_start_runs_on() -> None:
    async def scene(world: World) -> None:
        world.failure = GroupLost("a rank did not start")
        world.supervisor.restart_all()
        await until(lambda: len(world.log) > 2)
        assert world.engine.serving
        assert world.states() == [("ready", 1, "to be restarted")]
        world.failure = None
        await until(lambda: world.states() == [("ready", 1, "")])

    play(scene)


def test_a_successor_that_is_lost_before_it_is_taken_in_is_replaced_as_well() -> None:
    async def scene(world: World) -> None:
        running = world.ask("long", 9)
        await until(lambda: bool(world.replicas[0].requests))
        world.stillborn = True
        world.supervisor.restart_all()
        await until(lambda: world.states() == [("ready", 1, "")] and len(world.log) >= 4)
        world.replicas[0].finish(world.replicas[0].requests[0])
        assert (await running)[-1].finish is FinishReason.LENGTH

    play(scene)


READY = ("ready", 1, "")


@pytest.mark.parametrize("lost", [0, 1])
def test_replicas_leave_while_one_restarts(lost: int) -> None:
    """Whether that one is to leave or to stay, its streams and the others' go on."""

    async def scene(world: World) -> None:
        running = [world.ask(f"r{number}", 9) for number in range(4)]
        await until(lambda: sum(len(item.requests) for item in world.replicas.values()) == 4)
        world.gate.clear()
        world.replicas[lost].die(GroupLost("rank 0: gone"))
        await until(lambda: len(world.log) == 3)
        assert world.supervisor.scale(1) == 2
        await asyncio.sleep(0.05)
        assert len(world.states()) == 2 and world.engine.serving
        world.gate.set()
        await until(lambda: world.states() == [READY])
        await until(lambda: len(world.replicas[0].requests) >= 4)
        world.engine.lost(world.replicas[1].handle, GroupLost("said late"))
        for request in world.replicas[0].requests[-4:]:
            world.replicas[0].finish(request)
        answers = await asyncio.gather(*running)
        assert [events[-1].finish for events in answers] == [FinishReason.LENGTH] * 4

    play(scene, replicas=2)


def test_a_replica_is_lost_while_it_leaves() -> None:
    async def scene(world: World) -> None:
        running = [world.ask(f"r{number}", 9) for number in range(2)]
        await until(lambda: sum(len(item.requests) for item in world.replicas.values()) == 2)
        world.supervisor.scale(1)
        await asyncio.sleep(0)
        world.replicas[1].die(GroupLost("rank 0: gone"))
        await until(lambda: world.states() == [READY])
        await until(lambda: len(world.replicas[0].requests) >= 2)
        assert not any(line.startswith("start 1 epoch 3") for line in world.log)
        for request in world.replicas[0].requests[-2:]:
            world.replicas[0].finish(request)
        await asyncio.gather(*running)

    play(scene, replicas=2)


def test_replicas_join_while_one_fails() -> None:
    async def scene(world: World) -> None:
        world.failure = GroupLost("a rank did not start")
        world.replicas[1].die(GroupLost("rank 0: gone"))
        await until(lambda: len(world.log) >= 4)
        assert world.supervisor.scale(3) == 2
        await until(lambda: any(line.startswith("start 2") for line in world.log))
        assert world.engine.serving, "the one that runs is left alone"
        world.failure = None
        await until(lambda: world.states() == [READY] * 3)
        assert sum(line.startswith("start 0") for line in world.log) == 1

    play(scene, replicas=2)
