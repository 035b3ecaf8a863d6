"""Schedulers whose ranks hand blocks to each other, and engines over replicas, driven by hand."""

from __future__ import annotations

import asyncio
import dataclasses
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from phalanx.controller.engine import AsyncEngine
from phalanx.controller.handle import ReplicaHandle
from phalanx.controller.scheduling.probation import Computing
from phalanx.controller.scheduling.request import FinishReason, Request, TokenEvent
from phalanx.controller.scheduling.scheduler import SchedulerStats
from phalanx.protos.errors import GroupLost, ResourceExhausted
from phalanx.protos.sampling import SamplingParams
from phalanx.protos.specs import DecoderSpec, RopeSpec
from phalanx.protos.steps import SampledToken, StepPlan
from phalanx.protos.transfers import Offer, Take, Withdraw

RANKS = 2


class Side:
    """A scheduler, and a rank that executes plans and messages in the order of their sending."""

    def __init__(self, loop: Any) -> None:
        self.scheduler, self.rank, self.cache = loop.scheduler, loop.rank, loop.cache
        self.inbox: deque[Any] = deque()
        self.results: deque[Any] = deque()
        self.offered: dict[tuple[int, int], list[int]] = {}
        self.takes: dict[int, Take] = {}

    def plan(self) -> None:
        plan = self.scheduler.schedule(0.0)
        if plan is not None:
            self.inbox.append(plan)

    def execute(self) -> None:
        match message := self.inbox.popleft():
            case StepPlan():
                self.results.append(self.rank.execute(message))
            case Offer():
                self.offered[message.transfer, message.part] = message.blocks
            case Withdraw():
                for part in (0, 1):
                    self.offered.pop((message.transfer, part), None)
            case Take():
                self.takes[message.transfer] = message


@dataclasses.dataclass
class Transfer:
    """What the mover, and the copying ranks, know of one."""

    number: int
    source: Side
    target: Side
    base: str = ""
    """Of the request; none for a prefix."""
    outline: Any = None
    reserved: bool = False
    frozen: bool = False
    over: bool = False
    """Given up or done, as far as the mover is concerned."""
    withdrawn: bool = False
    copied: int = 0
    part: int = 0
    said: list[int] = dataclasses.field(default_factory=lambda: [0] * RANKS)
    """Parts that each rank has answered for; 2 = it is through."""


@pytest.fixture
def copying_ranks() -> tuple[type[Side], type[Transfer]]:
    """One side of a transfer, and what is known of a transfer."""
    return Side, Transfer


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
        self.running = 0
        self.lost: GroupLost | None = None
        self.refusal: ResourceExhausted | None = None
        self.aborted: list[str] = []

    def stats(self) -> SchedulerStats:
        return STATS

    @property
    def computing(self) -> Computing:
        """One that is on probation, or all."""
        alone = [key[0] for key, request in self.requests.items() if request.probation]
        names = alone[:1] or [key[0] for key in self.requests]
        return Computing(frozenset(names), bool(alone))

    def places_of(self, tenant: str) -> tuple[int, int]:
        return self.running, 2

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
            request.probation = max(request.probation - 1, 0)
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

    async def lose(self, index: int, *, crashed: bool = False) -> None:
        error = GroupLost("rank 1: the peer closed its connection", crashed=crashed)
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


@pytest.fixture
def played() -> SimpleNamespace:
    """An engine over replicas that do what the test says."""
    return SimpleNamespace(
        PlayedReplica=PlayedReplica, Scene=Scene, settle=settle, tokens=tokens, play=play
    )
