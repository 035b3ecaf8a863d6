"""Requests follow their prefixes: through the engine, and counted over a whole workload."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

from phalanx.controller.engine import AsyncEngine
from phalanx.controller.routing import router
from phalanx.controller.routing.pace import Pace
from phalanx.controller.routing.placer import Placer
from phalanx.controller.scheduling.request import Request
from phalanx.protos.sampling import SamplingParams

BLOCK = 4


async def ask(engine: AsyncEngine, name: str, prompt: list[int], tenant: str = "a") -> int:
    """Run a request to its end; the tokens of its prompt that were cached."""
    cached = 0
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    events = engine.submit(
        request_id=name, prompt_token_ids=prompt, params=params, tenant=tenant, deadline=None
    )
    async for batch in events:
        assert all(event.error is None for event in batch)
        cached += sum(event.cached_prompt_tokens for event in batch)
    return cached


def placed(engine: AsyncEngine) -> dict[str, int]:
    return {item.request_id: item.decision.replica for item in engine.placements()}


def by_replica(engine: AsyncEngine) -> dict[int, router.Estimate]:
    """The estimates of the last placement."""
    return {item.replica: item for item in engine.placements()[-1].decision.estimates}


def test_a_turn_goes_where_the_one_before_it_was(start_replica: Callable[..., Any]) -> None:
    async def main() -> None:
        engine = AsyncEngine(None, 2)  # type: ignore[arg-type]
        fleets = []
        for index in range(2):
            handle, fleet = start_replica(engine, index, index)
            await engine.adopt(handle)
            fleets.append(fleet)
        shared, other = list(range(2, 42)), list(range(50, 90))
        assert await ask(engine, "first", shared) == 0
        home = placed(engine)["first"]
        assert await ask(engine, "second", [*shared, 5, 6, 7]) == 40
        assert placed(engine)["second"] == home
        estimates = by_replica(engine)
        assert estimates[home].cached_tokens == 40 and estimates[1 - home].cached_tokens == 0
        assert await ask(engine, "stranger", [*shared, 5], tenant="b") == 0, "tenants share nothing"
        assert engine.placements()[-1].decision.uncached_tokens == 41

        fleets[home].killed = True
        handle, _ = start_replica(engine, home, 7)
        lost = asyncio.Event()
        engine.on_replica_lost = lambda index, error: lost.set()
        await lost.wait()
        await engine.adopt(handle)
        await ask(engine, "third", [*shared, 5, 6, 7])
        third = by_replica(engine)
        assert third[home].cached_tokens == 0, "what the lost replica held is gone"
        await ask(engine, "fourth", other)

    asyncio.run(main())


def test_one_replica_decides_nothing(start_replica: Callable[..., Any]) -> None:
    async def main() -> None:
        engine = AsyncEngine(None, 1)  # type: ignore[arg-type]
        handle, _ = start_replica(engine, 0, 0)
        await engine.adopt(handle)
        assert await ask(engine, "first", list(range(40))) == 0
        assert await ask(engine, "second", list(range(40))) == 36
        assert not engine.placements()

    asyncio.run(main())


# --- a whole workload, counted in tokens ---

PACE = Pace(tokens_per_s=1000.0, step_s=0.02, stream_s=0.002)


@dataclass
class Open:
    """A request that runs."""

    prompt: list[int]
    uncached: int
    output: int = 0
    charged: router.Work = router.NOTHING


@dataclass
class Conversation:
    """Turns that each repeat all that was said."""

    tenant: str
    tokens: list[int]
    turns: int
    due: int
    turn: int = 0
    words: Random = field(default_factory=Random)


class Cluster:
    """Replicas in lockstep: every tick each computes one step."""

    OUTPUT = 12

    def __init__(self, replicas: Sequence[Any], policy: str) -> None:
        self.replicas, self.policy = replicas, policy
        self.placer, self.placed = Placer(), 0
        self.open: list[dict[str, Open]] = [{} for _ in replicas]
        for index in range(len(replicas)):
            self.placer.loads.join(index, places=8)
            self.placer.loads.measured(index, PACE)

    def choose(self, name: str, tenant: str, prompt: list[int]) -> tuple[int, int]:
        self.placed += 1
        if self.policy == "round-robin":
            return self.placed % len(self.replicas), len(prompt)
        if self.policy == "least-loaded":
            loads = [
                sum(len(item.prompt) + self.OUTPUT for item in open_.values())
                for open_ in self.open
            ]
            return loads.index(min(loads)), len(prompt)
        decision = self.placer.choose(
            tenant,
            name,
            prompt,
            router.Request(len(prompt), 1, self.OUTPUT),
            self.replicas[0][1].naming,
        )
        return decision.replica, decision.uncached_tokens

    def charge(self, index: int, item: Open, work: router.Work) -> None:
        self.placer.loads.charge(index, item.charged, work)
        item.charged = work

    def submit(self, name: str, tenant: str, prompt: list[int]) -> None:
        index, uncached = self.choose(name, tenant, prompt)
        self.open[index][name] = item = Open(prompt, uncached)
        self.charge(index, item, router.Work(uncached, 1, self.OUTPUT))
        params = SamplingParams(max_tokens=self.OUTPUT, ignore_eos=True)
        request = Request(
            request_id=name,
            prompt_token_ids=list(prompt),
            params=params,
            tenant=tenant,
            arrival=0.0,
        )
        self.replicas[index][0].add([request])

    def tick(self) -> dict[str, list[int]]:
        """One step; the requests that ended, with all their tokens."""
        ended: dict[str, list[int]] = {}
        for index, (scheduler, cache, rank) in enumerate(self.replicas):
            plan = scheduler.schedule(0.0)
            for event in scheduler.update(rank.execute(plan)) if plan else ():
                item = self.open[index][event.request_id]
                item.uncached, item.output = 0, item.output + len(event.tokens)
                item.prompt = [*item.prompt, *(token.token_id for token in event.tokens)]
                self.charge(index, item, router.Work(0, 1, self.OUTPUT - item.output))
                if event.finish is not None:
                    self.charge(index, item, router.Work())
                    ended[event.request_id] = self.open[index].pop(event.request_id).prompt
            if (update := cache.drain_changes()) is not None:
                assert self.placer.index.apply(index, update)
        return ended


def run(make_scheduler: Callable[..., Any], policy: str) -> tuple[int, int, list[int]]:
    """Prompt tokens computed, those an infinite cache would compute, requests by replica."""
    cluster = Cluster([make_scheduler(400, BLOCK, 1) for _ in range(4)], policy)
    rng = Random(5)
    systems = [[rng.randrange(2, 1000) for _ in range(64)] for _ in range(3)]
    talks = {
        str(number): Conversation(
            "a", list(systems[number % 3]), 6, due=rng.randrange(80), words=Random(number)
        )
        for number in range(32)
    }
    served = [0] * 4
    oracle = sum(map(len, systems))
    for now in range(100_000):
        for name, talk in talks.items():
            if talk.due == now:
                talk.tokens += [talk.words.randrange(2, 1000) for _ in range(12)]
                oracle += 12
                cluster.submit(name, talk.tenant, talk.tokens)
        before = [len(open_) for open_ in cluster.open]
        for name, tokens in cluster.tick().items():
            talk = talks[name]
            talk.tokens, talk.turn = tokens, talk.turn + 1
            if talk.turn < talk.turns:
                talk.due = now + 1 + talk.words.randrange(40)
        for index, open_ in enumerate(cluster.open):
            served[index] += before[index] - len(open_)
        if all(talk.turn == talk.turns for talk in talks.values()):
            break
    computed = sum(rank.prefill_tokens for _, _, rank in cluster.replicas)
    return computed, oracle, served


def test_half_the_prompt_tokens_of_least_loaded(make_scheduler: Callable[..., Any]) -> None:
    ours, oracle, served = run(make_scheduler, "ours")
    least_loaded, _, _ = run(make_scheduler, "least-loaded")
    round_robin, _, _ = run(make_scheduler, "round-robin")
    print(f"prompt tokens: ours {ours}, {least_loaded=}, {round_robin=}, {oracle=}, {served=}")
    assert 2 * ours <= min(least_loaded, round_robin)
    assert sum(served) == 32 * 6
    assert max(served) <= 3 * min(served), "and everybody has work"
    assert run(make_scheduler, "ours") == (ours, oracle, served), "deterministic"


def test_a_popular_prefix_is_held_by_more_replicas_under_load(
    make_scheduler: Callable[..., Any],
) -> None:
    cluster = Cluster([make_scheduler(400, BLOCK, 1) for _ in range(3)], "ours")
    prefix = [7] * 200
    cluster.submit("first", "a", prefix)
    while cluster.open[0]:
        cluster.tick()
    holders = [len(cluster.placer.index.contents(index)) > 40 for index in range(3)]
    assert holders == [True, False, False]
    for number in range(90):
        cluster.submit(str(number), "a", [*prefix, number])
        if number % 3 == 0:
            cluster.tick()
    while any(cluster.open):
        cluster.tick()
    assert all(len(cluster.placer.index.contents(index)) > 40 for index in range(3))
