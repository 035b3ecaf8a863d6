"""Whom ranks died of is found by one more death, and the others pay little for it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phalanx.controller.scheduling.request import FinishReason, Request
from phalanx.controller.stream import Stream
from phalanx.protos.sampling import SamplingParams
from phalanx.protos.steps import StepPlan

LoopFactory = Callable[..., Any]


class Dead(Exception):
    """The ranks died over a plan."""


class Cluster:
    """Streams over groups of ranks that die when they compute a certain token of the poison."""

    def __init__(self, make_loop: LoopFactory, *, crashes: bool = True, **config: Any) -> None:
        self._make, self._crashes, self._config = make_loop, crashes, config
        self.streams: dict[int, Stream] = {}
        self.tokens: dict[int, list[int]] = {}
        self.poison, self.deadly = -1, -1
        self.deaths, self.convicted = 0, list[int]()
        self.steps = self.longest = 0
        """Plans since the last death; the most that a stream has waited for a token after one."""
        self._begin()

    def _begin(self) -> None:
        self.loop, self.sent, self.steps = self._make(**self._config), deque[StepPlan](), 0
        self._waiting: set[int] = set()

    def ask(self, seed: int, prompt: list[int], tokens: int) -> None:
        params = SamplingParams(max_tokens=tokens, ignore_eos=True, seed=seed)
        self.streams[seed] = Stream(
            seed, prompt, params, "default", 0.0, None, request_id=str(seed)
        )
        self.tokens[seed] = []
        self.loop.scheduler.add(self.streams[seed].requests())

    def _execute(self, plan: StepPlan) -> Any:
        rank = self.loop.rank
        before = {seq: state.num_computed for seq, state in rank.sequences.items()}
        result = rank.execute(plan)
        for row in plan.rows:
            state = rank.sequences[row.seq]
            first = before.get(row.seq, state.new.num_computed)
            if state.new.params.seed == self.poison and first <= self.deadly < state.num_computed:
                raise Dead
        return result

    def _check(self, plan: StepPlan) -> None:
        """A plan with somebody on probation has nobody else, and no other plan beside it."""
        seeds = [self.loop.rank.sequences[row.seq].new.params.seed for row in plan.rows]
        if any(self.on_probation(seed) for seed in seeds):
            assert len(seeds) == 1 and not self.sent

    def on_probation(self, seed: int) -> bool:
        samples = self.loop.scheduler._requests.get(self.streams[seed].name, {})
        return any(sample.probation for sample in samples.values())

    def turn(self) -> None:
        scheduler = self.loop.scheduler
        while (plan := scheduler.schedule(0.0)) is not None:
            self.sent.append(plan)
        if not self.sent:
            return
        try:
            result = self._execute(self.sent.popleft())
            self.steps += 1
        except Dead:
            self._die()
            return
        for event in scheduler.update(result):
            seed = int(event.request_id.split(".")[0])
            self.streams[seed].push(event)
            self.tokens[seed] += [token.token_id for token in event.tokens]
            if event.tokens and seed in self._waiting:
                self._waiting.discard(seed)
                self.longest = max(self.longest, self.steps)
        scheduler.check_integrity()

    def _die(self) -> None:
        self.deaths += 1
        assert self.deaths < 10, "nobody is found"
        computing = self.loop.scheduler.computing
        self._begin()
        for seed, stream in self.streams.items():
            if stream.finished:
                continue
            blamed = computing.blames(stream.name)
            if stream.lose(blamed=blamed, crashed=self._crashes, alone=computing.alone):
                self.convicted.append(seed)
                stream.end(FinishReason.ERROR)
            else:
                self._waiting.add(seed)
                self.loop.scheduler.add(stream.requests(), readmitted=True)

    def run(self, most: int = 5000) -> None:
        for _ in range(most):
            if all(stream.finished for stream in self.streams.values()):
                break
            self.turn()
        assert all(stream.finished for stream in self.streams.values())


def undisturbed(make_loop: LoopFactory, prompts: list[list[int]], tokens: int) -> dict[int, Any]:
    cluster = Cluster(make_loop, num_blocks=400)
    for seed, prompt in enumerate(prompts):
        cluster.ask(seed, prompt, tokens)
    cluster.run()
    return cluster.tokens


@settings(deadline=None, max_examples=60)
@given(
    st.integers(2, 12),
    st.integers(0, 11),
    st.integers(0, 24),
    st.integers(1, 3),
    st.sampled_from([60, 400]),
    st.booleans(),
)
def test_two_deaths_convict_exactly_one(
    make_loop: LoopFactory,
    count: int,
    poison: int,
    deadly: int,
    max_in_flight: int,
    num_blocks: int,
    crashes: bool,
) -> None:
    """Wherever in its prompt or answer the ranks die of it; three where they seem to be killed."""
    prompts = [[100 + seed, *range(5 + seed % 9)] for seed in range(count)]
    expected = undisturbed(make_loop, prompts, 12)
    given_config = {"num_blocks": num_blocks, "max_in_flight": max_in_flight, "max_running": 16}
    cluster = Cluster(make_loop, crashes=crashes, **given_config)
    cluster.poison, cluster.deadly = poison % count, deadly
    for seed, prompt in enumerate(prompts):
        cluster.ask(seed, prompt, 12)
    cluster.run()
    kills = deadly < len(prompts[poison % count]) + 11  # the last token is never computed
    assert cluster.deaths == (0 if not kills else 2 if crashes else 3)
    assert cluster.convicted == ([poison % count] if kills else [])
    for seed in expected:
        if seed not in cluster.convicted:
            assert cluster.tokens[seed] == expected[seed]


def test_32_suspects_cost_two_steps_of_their_own_each(make_loop: LoopFactory) -> None:
    cluster = Cluster(
        make_loop, num_blocks=1000, max_running=40, max_tokens_per_step=512, max_in_flight=2
    )
    cluster.poison, cluster.deadly = 31, 12
    for seed in range(32):
        cluster.ask(seed, [seed % 7, 1, 2, 3, 4], 40)
    cluster.run()
    assert cluster.deaths == 2 and cluster.convicted == [31]
    # every other step is for those who have been cleared
    assert cluster.longest <= 4 * 32


def test_others_go_on_beside_suspects(make_loop: LoopFactory) -> None:
    """Every other step is theirs, and newcomers are let in."""
    cluster = Cluster(make_loop, num_blocks=400, max_running=24)
    for seed in range(4):
        cluster.ask(seed, [1, 2, 3], 100)
    for _ in range(10):
        cluster.turn()
    for seed in range(10, 16):
        cluster.ask(seed, [1, 2, 3, seed % 5], 30)
        stream = cluster.streams[seed]
        cluster.loop.scheduler.abort(stream.name)
        stream.lose(blamed=True, crashed=True)
        cluster.loop.scheduler.add(stream.requests(), readmitted=True)
    cluster.ask(20, [4, 4], 30)
    had = {seed: len(cluster.tokens[seed]) for seed in (0, 1, 2, 3, 20)}
    for _ in range(12):
        cluster.turn()
    assert all(len(cluster.tokens[seed]) >= had[seed] + 4 for seed in had)
    cluster.run()
    assert cluster.deaths == 0


@pytest.mark.parametrize("samples", [1, 3])
def test_a_suspect_of_several_samples_is_cleared_sample_by_sample(
    make_loop: LoopFactory, samples: int
) -> None:
    loop = make_loop(num_blocks=100)
    params = SamplingParams(n=samples, max_tokens=9, ignore_eos=True, seed=5)
    loop.add("other", [1, 2], max_tokens=30, ignore_eos=True)
    group = [
        Request(
            request_id="suspect",
            sample_index=index,
            prompt_token_ids=[3, 4, 5],
            params=params,
            arrival=0.0,
            probation=2,
        )
        for index in range(samples)
    ]
    loop.scheduler.add(group, readmitted=True)
    tokens: dict[int, int] = dict.fromkeys(range(samples), 0)
    for _ in range(60):
        plan = loop.scheduler.schedule(0.0)
        if plan is None:
            break
        computing = loop.scheduler.computing
        planned = [sample.request for sample in loop.scheduler.planned]
        early = [r for r in planned if r.request_id == "suspect" and tokens[r.sample_index] < 2]
        assert computing.alone == bool(early)
        assert not early or len(planned) == len(plan.rows) == 1
        for event in loop.scheduler.update(loop.rank.execute(plan)):
            if event.request_id == "suspect":
                tokens[event.sample_index] += len(event.tokens)
        loop.scheduler.check_integrity()
    assert all(count == 9 for count in tokens.values())


def test_a_suspect_without_room_waits_for_it_and_nobody_goes_before(
    make_loop: LoopFactory,
) -> None:
    loop = make_loop(num_blocks=10, block_size=4, max_running=8)
    loop._check_streams = lambda plan: None  # those on probation do miss steps
    for number in range(3):
        loop.add(f"old{number}", [1, 2, number], max_tokens=8, ignore_eos=True)
    for _ in range(3):
        loop.step()
    params = SamplingParams(max_tokens=3, ignore_eos=True, seed=77)
    suspect = Request(
        request_id="suspect",
        prompt_token_ids=[5] * 30,
        params=params,
        arrival=0.0,
        probation=2,
    )
    loop.scheduler.add([suspect], readmitted=True)
    for number in range(3, 20):
        loop.add(f"new{number}", [1, 2, number % 7], max_tokens=8, ignore_eos=True)
    begun: list[str] = []
    for _ in range(80):
        plan = loop.scheduler.schedule(0.0)
        assert plan is not None
        names = {new.params.seed: new.num_prompt for new in plan.new}
        begun += ["suspect" if length == 30 else "new" for length in names.values()]
        for event in loop.scheduler.update(loop.rank.execute(plan)):
            if event.request_id != "suspect":
                loop.streams[event.request_id, event.sample_index].feed(event)
        loop.scheduler.check_integrity()
        if "suspect" in begun:
            break
    # those who found room before it was known that the suspect finds none
    assert begun.index("suspect") <= 2
