"""Streams and the replicas under them, the replicas played by the test."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import pytest

from phalanx.controller.engine import AsyncEngine
from phalanx.controller.handle import ReplicaHandle
from phalanx.controller.scheduling.request import FinishReason, Request, TokenEvent
from phalanx.controller.scheduling.scheduler import SchedulerStats
from phalanx.controller.stream import SET_ASIDE_AFTER_LOSSES
from phalanx.protos.errors import (
    AlreadyExists,
    GroupLost,
    ResourceExhausted,
    SetAside,
    Unavailable,
)
from phalanx.protos.sampling import SamplingParams
from phalanx.protos.specs import DecoderSpec, RopeSpec
from phalanx.protos.steps import SampledToken

MODEL = DecoderSpec(
    family="llama",
    num_layers=1,
    hidden_size=8,
    intermediate_size=8,
    num_heads=2,
    num_kv_heads=1,
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


class NoTransfers:
    """Of a replica whose ranks exchange no blocks."""

    exchange = None

    def withdraw(self, transfer: int) -> None:
        pass

    def give_up(self, transfer: int) -> None:
        pass


class PlayedReplica:
    """Holds what it was given; gives tokens when told to: token i of a sample is 10 + i."""

    transfers = NoTransfers()

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self.requests: dict[tuple[str, int], Request] = {}
        self.lost: GroupLost | None = None
        self.refusal: ResourceExhausted | None = None
        self.aborted: list[str] = []

    def stats(self) -> SchedulerStats:
        return STATS

    def add(self, group: Sequence[Request], *, readmitted: bool = False) -> None:
        for request in group:
            if self.refusal is not None and not readmitted:
                self._send(request, finish=FinishReason.ERROR, error=self.refusal)
                continue
            self.requests[request.key] = request
            if request.params.max_tokens == 1:
                self.step(request.key)

    def abort(self, request_id: str, sample_index: int | None, reason: FinishReason) -> None:
        self.aborted.append(request_id)
        for key in [key for key in self.requests if key[0] == request_id]:
            if sample_index in (None, key[1]):
                self._send(self.requests.pop(key), finish=reason)

    def step(self, *keys: tuple[str, int]) -> None:
        """One more token for these samples, or for all."""
        for key in keys or list(self.requests):
            request = self.requests[key]
            token = 10 + len(request.output_token_ids)
            request.output_token_ids.append(token)
            done = len(request.output_token_ids) == request.params.max_tokens
            finish = FinishReason.LENGTH if done else None
            self._send(request, SampledToken(0, token), finish=finish)
            if done:
                del self.requests[key]

    def _send(self, request: Request, *tokens: SampledToken, **fields: Any) -> None:
        first = len(request.output_token_ids) - len(tokens)
        event = TokenEvent(
            request_id=request.request_id,
            sample_index=request.sample_index,
            first_index=first,
            tokens=tokens,
            **fields,
        )
        self._engine.sink([event])


class Scene:
    """An engine, its played replicas, and what each reader has got."""

    def __init__(self, slots: int) -> None:
        self.engine = AsyncEngine(MODEL, slots)
        self.replicas: dict[int, PlayedReplica] = {}
        self._handles: dict[int, ReplicaHandle] = {}

    async def start(self, index: int) -> PlayedReplica:
        replica = PlayedReplica(self.engine)
        handle = ReplicaHandle(index, replica, [], 16)  # type: ignore[arg-type]
        self.replicas[index], self._handles[index] = replica, handle
        await self.engine.adopt(handle)
        return replica

    async def lose(self, index: int) -> None:
        error = GroupLost("rank 1: the peer closed its connection")
        self.replicas[index].lost = error
        self.engine.lost(self._handles[index], error)
        await settle()

    def ask(self, name: str = "a", **changes: Any) -> tuple[list[TokenEvent], asyncio.Task[None]]:
        values = {"max_tokens": 6, "temperature": 0.0} | changes
        events: list[TokenEvent] = []

        async def read() -> None:
            async for batch in self.engine.submit(
                request_id=name,
                prompt_token_ids=[1, 2, 3],
                params=SamplingParams(**values),
                tenant="default",
                deadline=None,
            ):
                events.extend(batch)

        return events, asyncio.create_task(read())


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def tokens(events: Sequence[TokenEvent], sample: int = 0) -> list[int]:
    """The tokens of a sample; each must come at its place."""
    found: list[int] = []
    for event in events:
        if event.sample_index == sample:
            assert event.first_index == len(found)
            found += [token.token_id for token in event.tokens]
    return found


def play(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(work(), 20))


def test_a_stream_goes_on_at_another_replica_where_it_stood() -> None:
    async def work() -> None:
        scene = Scene(2)
        first, second = await scene.start(0), await scene.start(1)
        events, task = scene.ask(n=2)
        await settle()
        first.step()
        first.step()
        await scene.lose(0)
        assert [request.output_token_ids for request in second.requests.values()] == [[10, 11]] * 2
        for _ in range(4):
            second.step()
        await task
        for sample in (0, 1):
            assert tokens(events, sample) == [10, 11, 12, 13, 14, 15]
        assert sum(event.finish is not None for event in events) == 2

    play(work)


def test_without_a_live_replica_streams_wait_and_new_requests_are_refused() -> None:
    async def work() -> None:
        scene = Scene(1)
        first = await scene.start(0)
        events, task = scene.ask()
        await settle()
        first.step()
        await scene.lose(0)
        assert not scene.engine.serving
        with pytest.raises(Unavailable):
            await scene.ask("b")[1]
        again = await scene.start(0)
        await settle()
        for _ in range(5):
            again.step()
        await task
        assert tokens(events) == [10, 11, 12, 13, 14, 15]

    play(work)


def test_late_events_of_a_lost_replica_are_nobodys() -> None:
    async def work() -> None:
        scene = Scene(2)
        first, second = await scene.start(0), await scene.start(1)
        events, task = scene.ask()
        await settle()
        await scene.lose(0)
        first.step()  # a zombie
        await settle()
        for _ in range(6):
            second.step()
        await task
        assert tokens(events) == [10, 11, 12, 13, 14, 15]

    play(work)


def test_a_full_queue_refuses_new_requests_and_never_those_accepted_before() -> None:
    async def work() -> None:
        scene = Scene(2)
        first, second = await scene.start(0), await scene.start(1)
        events, task = scene.ask()
        await settle()
        first.step()
        second.refusal = first.refusal = ResourceExhausted("the queue is full", 1.0)
        with pytest.raises(ResourceExhausted):
            await scene.ask("b")[1]
        await scene.lose(0)
        for _ in range(5):
            second.step()
        await task
        assert tokens(events) == [10, 11, 12, 13, 14, 15]

    play(work)


def test_a_request_whose_ranks_die_again_and_again_is_set_aside_and_others_are_not() -> None:
    async def work() -> None:
        scene = Scene(1)
        replica = await scene.start(0)
        _, poison_task = scene.ask("poison")
        innocent, innocent_task = scene.ask("innocent", max_tokens=40)
        await settle()
        for _ in range(SET_ASIDE_AFTER_LOSSES + 3):
            suspects = [r for r in replica.requests.values() if r.params.max_tokens == 6]
            if not suspects:
                break
            await scene.lose(0)
            replica = await scene.start(0)
            await settle()
        while not innocent_task.done():
            scene.engine.tick(0.0)
            await settle()
            for key, request in list(replica.requests.items()):
                if request.params.max_tokens == 40:
                    replica.step(key)
        await innocent_task
        assert len(tokens(innocent)) == 40
        with pytest.raises(SetAside):
            await poison_task
        with pytest.raises(SetAside):  # nor does it kill again under another name
            await scene.ask("again")[1]
        _, other = scene.ask("other", max_tokens=7)
        await settle()
        other.cancel()

    play(work)


def test_a_reader_that_leaves_frees_its_request_at_once() -> None:
    async def work() -> None:
        scene = Scene(1)
        replica = await scene.start(0)
        _, task = scene.ask()
        await settle()
        [(name, _)] = replica.requests
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await settle()
        assert name in replica.aborted
        events, again = scene.ask()  # the id is free at once
        await settle()
        for _ in range(6):
            replica.step()
        await again
        assert len(tokens(events)) == 6

    play(work)


def test_ids_are_taken_while_a_request_runs_and_per_tenant() -> None:
    async def work() -> None:
        scene = Scene(1)
        await scene.start(0)
        _, task = scene.ask("same")
        await settle()
        with pytest.raises(AlreadyExists):
            await scene.ask("same")[1]
        assert not scene.engine.abort("same", "somebody else")
        assert scene.engine.abort("same", "default")
        await task

    play(work)


def test_abort_works_while_no_replica_has_the_request() -> None:
    async def work() -> None:
        scene = Scene(1)
        await scene.start(0)
        events, task = scene.ask()
        await settle()
        await scene.lose(0)
        assert scene.engine.abort("a", "default")
        await task
        assert events[-1].finish is FinishReason.ABORT

    play(work)
