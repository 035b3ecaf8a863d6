"""Ranks that compute nothing but remember everything, and a step loop in slow motion."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest

from phalanx.controller.kvcache.manager import KVCacheManager
from phalanx.controller.scheduling.request import FinishReason, Request, TokenEvent
from phalanx.controller.scheduling.scheduler import Scheduler, SchedulerConfig
from phalanx.protos.sampling import SamplingParams
from phalanx.protos.steps import (
    NO_STATE,
    NewSequence,
    PromptLogprobs,
    SampledToken,
    SequenceFailure,
    StepPlan,
    StepResult,
    TokenLogprob,
)

EOS = 3


def _digest(*parts: object) -> int:
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest())


def prefix_digest(before: int, token: int) -> int:
    """Names a prefix that is longer by one token; 0 names the empty one."""
    return _digest(before, token)


def choose_token(prefix: int, params: SamplingParams, sample: int, num_output: int) -> int:
    """The pure function that stands for model and sampler: ids 0 .. 7, stop ids after min_tokens."""
    banned: set[int] = set()
    if num_output < params.min_tokens:
        banned = {*params.stop_token_ids, *(() if params.ignore_eos else (EOS,))}
    allowed = [token for token in range(8) if token not in banned]
    return allowed[_digest(prefix, params.seed, sample) % len(allowed)]


class Slot(NamedTuple):
    """What one token's KV entries depend on."""

    token: int
    position: int
    prefix: int


@dataclass
class RankSequence:
    """A sequence as a rank knows it, with the digest of each of its prefixes."""

    new: NewSequence
    num_computed: int
    token_ids: list[int] = field(default_factory=list)
    prefixes: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)

    def append(self, token: int) -> None:
        self.prefixes.append(prefix_digest(self.prefixes[-1] if self.prefixes else 0, token))
        self.token_ids.append(token)

    def slot(self, position: int) -> Slot:
        return Slot(self.token_ids[position], position, self.prefixes[position])


class FakeRank:
    """Executes plans on a pool of slots and checks that each row reads what it must read."""

    def __init__(self, num_blocks: int, block_size: int, num_states: int = 0) -> None:
        self.block_size = block_size
        self.states: list[int | None] = [None] * num_states
        """The digest of the prefix that each slot holds the state of."""
        self.pool: list[list[Slot | None]] = [[None] * block_size for _ in range(num_blocks)]
        self.sequences: dict[int, RankSequence] = {}
        self.seen: set[int] = set()
        self.next_step = 0
        self.computed: dict[tuple[int, int], int] = {}
        """(seed, sample index) -> tokens computed"""
        self.admissions: dict[tuple[int, int], int] = {}
        self.poisoned: set[tuple[int, int]] = set()
        """(seed, sample index) of samples whose next token is NaN"""

    def execute(self, plan: StepPlan) -> StepResult:
        assert plan.step == self.next_step, "plans come in order"
        self.next_step += 1
        for seq in plan.finished:
            assert self.sequences.pop(seq, None) is not None, f"{seq} was finished twice"
        for new in plan.new:
            self._begin(new)
        for copy in plan.copies:
            self.pool[copy.target] = list(self.pool[copy.source])
        self._compute(plan)
        return self._answer(plan)

    def _begin(self, new: NewSequence) -> None:
        assert new.seq not in self.seen, f"attempt {new.seq} is used again"
        self.seen.add(new.seq)
        state = self.sequences[new.seq] = RankSequence(new, new.num_computed)
        for token in new.token_ids:
            state.append(token)
        name = (new.params.seed, new.sample_index)
        self.admissions[name] = self.admissions.get(name, 0) + 1

    def _compute(self, plan: StepPlan) -> None:
        assert len({row.seq for row in plan.rows}) == len(plan.rows), "two rows of one sequence"
        written: set[tuple[int, int]] = set()
        for row in plan.rows:
            state = self.sequences[row.seq]
            state.blocks += row.new_blocks
            self._verify(state, state.num_computed)
        self._carry_states(plan)
        for row in plan.rows:
            state = self.sequences[row.seq]
            first, last = state.num_computed, state.num_computed + row.num_new
            assert first < last <= len(state.token_ids), "a row beyond the known tokens"
            assert last <= len(state.blocks) * self.block_size, "a row beyond its blocks"
            for position in range(first, last):
                place = state.blocks[position // self.block_size], position % self.block_size
                assert place not in written, "two rows write one slot"
                written.add(place)
                self.pool[place[0]][place[1]] = state.slot(position)
            state.num_computed = last
            name = (state.new.params.seed, state.new.sample_index)
            self.computed[name] = self.computed.get(name, 0) + row.num_new
        for row in plan.rows:
            state = self.sequences[row.seq]
            self._verify(state, state.num_computed)

    def _carry_states(self, plan: StepPlan) -> None:
        """Each row finds the state that it needs, which no other row of the plan writes."""
        written: dict[int, int] = {}
        begun: set[int] = set()
        for row in plan.rows:
            assert (row.state is not None) == bool(self.states)
            if row.state is None:
                continue
            state, use = self.sequences[row.seq], row.state
            first = state.num_computed
            begun |= {use.read} - {use.write}
            found = None if use.read == NO_STATE else self.states[use.read]
            assert found == (state.prefixes[first - 1] if first else None), "a wrong state"
            places = [save.num_tokens for save in use.saves]
            assert places == sorted({*places}) and all(0 < p <= row.num_new for p in places)
            for tokens, slot in [
                (row.num_new, use.write),
                *((s.num_tokens, s.slot) for s in use.saves),
            ]:
                assert slot not in written, "two states for one slot"
                written[slot] = state.prefixes[first + tokens - 1]
        assert not begun & written.keys(), "a state is begun from and written"
        for slot, prefix in written.items():
            self.states[slot] = prefix

    def _verify(self, state: RankSequence, num_tokens: int) -> None:
        for position in range(num_tokens):
            block = state.blocks[position // self.block_size]
            found = self.pool[block][position % self.block_size]
            assert found == state.slot(position), (
                f"attempt {state.new.seq}, position {position}, block {block}: "
                f"{found} instead of {state.slot(position)}"
            )

    def _answer(self, plan: StepPlan) -> StepResult:
        sampled: list[SampledToken] = []
        failures: list[SequenceFailure] = []
        scores: list[PromptLogprobs] = []
        for row in plan.rows:
            state = self.sequences[row.seq]
            new = state.new
            if (run := self._score(state, row.num_new)) is not None:
                scores.append(run)
            if state.num_computed < len(state.token_ids):
                continue
            num_output = len(state.token_ids) - new.num_prompt
            token = choose_token(state.prefixes[-1], new.params, new.sample_index, num_output)
            state.append(token)
            if (new.params.seed, new.sample_index) in self.poisoned:
                failures.append(SequenceFailure(row.seq, "NaN"))
            else:
                sampled.append(SampledToken(row.seq, token))
        return StepResult(plan.epoch, plan.step, sampled, scores, failures)

    def _score(self, state: RankSequence, num_new: int) -> PromptLogprobs | None:
        first = state.num_computed - num_new
        last = min(state.num_computed, state.new.num_prompt - 1)
        if state.new.params.prompt_logprobs is None or first >= last:
            return None
        tokens = [
            TokenLogprob(state.token_ids[index + 1], -float(index + 1), 1)
            for index in range(first, last)
        ]
        return PromptLogprobs(state.new.seq, first + 1, tokens, [[] for _ in tokens])


@dataclass
class Stream:
    """Everything that one sample's caller was told; refuses what must not be told."""

    request: Request
    tokens: list[int] = field(default_factory=list)
    finish: FinishReason | None = None
    events: list[TokenEvent] = field(default_factory=list)
    num_scored: int = 1

    def feed(self, event: TokenEvent) -> None:
        assert self.finish is None, "an event after the last one"
        assert event.first_index == len(self.tokens), "a token was repeated or skipped"
        assert not self.events or not event.cached_prompt_tokens, "cached tokens twice"
        self.events.append(event)
        self.tokens += [token.token_id for token in event.tokens]
        self.finish = event.finish
        assert (event.error is not None) == (event.finish is FinishReason.ERROR)
        if event.prompt_logprobs is not None:
            run, prompt = event.prompt_logprobs, self.request.prompt_token_ids
            assert self.request.sample_index == 0 and run.start == self.num_scored
            self.num_scored += len(run.tokens)
            expected = prompt[run.start : self.num_scored]
            assert [token.token_id for token in run.tokens] == expected

    def check(self, context: int) -> None:
        """The tokens are those of a lone run; a sample that ran to its end ended where that did."""
        tokens, finish = lone_replay(self.request, context)
        assert self.tokens == tokens[: len(self.tokens)]
        if self.finish in (FinishReason.STOP, FinishReason.LENGTH):
            assert (self.tokens, self.finish) == (tokens, finish)
            wanted = self.request.params.prompt_logprobs is not None
            if wanted and self.request.sample_index == 0:
                assert self.num_scored == len(self.request.prompt_token_ids)
        stop = self.events[-1].stop_token if self.events else None
        assert stop == (self.tokens[-1] if self.finish is FinishReason.STOP else None)


def lone_replay(request: Request, context: int) -> tuple[list[int], FinishReason]:
    """What the request generates when it is alone, token by token, without any cache."""
    params, prefix, output = request.params, 0, list[int]()
    for token in request.prompt_token_ids:
        prefix = prefix_digest(prefix, token)
    while True:
        token = choose_token(prefix, params, request.sample_index, len(output))
        may_stop = len(output) >= params.min_tokens
        output.append(token)
        prefix = prefix_digest(prefix, token)
        is_eos = token == EOS and not params.ignore_eos
        if may_stop and (is_eos or token in params.stop_token_ids):
            return output, FinishReason.STOP
        full = len(request.prompt_token_ids) + len(output) >= context
        if full or len(output) == params.max_tokens:
            return output, FinishReason.LENGTH


class StepLoop:
    """A scheduler and a rank, driven by hand: send a plan, receive a result."""

    def __init__(
        self, config: SchedulerConfig, num_blocks: int, block_size: int, **states: int
    ) -> None:
        self.config = config
        self.cache = KVCacheManager(num_blocks, block_size, **states)
        self.scheduler = Scheduler(config, self.cache)
        self.rank = FakeRank(num_blocks, block_size, states["num_states"])
        self.sent: deque[StepPlan] = deque()
        self.streams: dict[tuple[str, int], Stream] = {}
        self.now = 0.0
        self.waiting_tokens: dict[int, tuple[int, int]] = {}
        """Attempt -> tokens to compute now, tokens still to sample."""
        self.admitted = False
        """Whether the last plan admitted somebody."""

    def add(self, request_id: str, prompt: list[int], *, n: int = 1, **given: object) -> None:
        """Add a request; tenant, deadline and priority as given, the rest are sampling parameters."""
        tenant, deadline = given.pop("tenant", "default"), given.pop("deadline", None)
        priority = given.pop("priority", 0)
        given.setdefault("seed", len(self.streams) + 1)
        params = SamplingParams(n=n, **given)
        group = [
            Request(
                request_id=request_id,
                sample_index=index,
                prompt_token_ids=list(prompt),
                params=params,
                tenant=str(tenant),
                arrival=self.now,
                deadline=deadline,
                priority=priority,
            )
            for index in range(n)
        ]
        self.scheduler.add(group)
        for request in group:
            self.streams[request.key] = Stream(request)

    def feed(self, events: object) -> None:
        for event in events:
            self.streams[event.request_id, event.sample_index].feed(event)

    def send(self) -> StepPlan | None:
        """Make a plan, if there is one to be made."""
        due = self.scheduler.has_work and not self.sent
        preemptions = self.scheduler.stats().preemptions
        plan = self.scheduler.schedule(self.now)
        admitted, self.admitted = self.admitted, bool(plan and plan.new)
        if self.scheduler.stats().preemptions > preemptions:
            assert not admitted, "an admission led to a preemption at once"
        assert plan is not None or not due, "there is work, and nothing is computed"
        self._check_streams(plan)
        if plan is not None:
            assert self.scheduler.in_flight <= self.config.max_in_flight
            assert plan.rows and plan.num_tokens <= self.config.max_tokens_per_step
            assert len(plan.rows) <= self.config.max_running
            self.sent.append(plan)
        return plan

    def _check_streams(self, plan: StepPlan | None) -> None:
        """A stream, which has one token to compute, has a row in every plan."""
        todo = self.waiting_tokens
        for seq in plan.finished if plan else ():
            del todo[seq]
        rows = {row.seq: row.num_new for row in plan.rows} if plan else {}
        if plan is not None:
            streams = {seq for seq, (tokens, left) in todo.items() if tokens == 1 and left}
            assert streams <= rows.keys(), "a stream missed a step"
        for new in plan.new if plan else ():
            end = self.scheduler.max_context
            if new.params.max_tokens:
                end = min(end, new.num_prompt + new.params.max_tokens)
            known = len(new.token_ids)
            todo[new.seq] = known - new.num_computed, end - known
        for seq, count in rows.items():
            tokens, left = todo[seq]
            todo[seq] = (tokens - count, left) if tokens > count else (1, left - 1)

    def receive(self) -> None:
        """Execute the oldest plan and hand in its result."""
        self.feed(self.scheduler.update(self.rank.execute(self.sent.popleft())))
        assert len(self.rank.sequences) <= self.config.max_running, (
            "the ranks were not told to forget"
        )

    def step(self) -> StepPlan | None:
        """Send one plan and receive one result."""
        plan = self.send()
        if self.sent:
            self.receive()
        self.scheduler.check_integrity()
        return plan

    def run(self, max_steps: int = 10_000) -> None:
        """Step until nothing is left to do, and check that nothing is left behind."""
        for _ in range(max_steps):
            if not (self.scheduler.has_work or self.sent):
                break
            self.step()
        assert not self.scheduler.has_work, "a sample did not end within the bound"
        self.check_idle()

    def check_idle(self) -> None:
        """All blocks are free or idle, and every sample got its tokens and one ending."""
        self.scheduler.check_integrity()
        assert self.cache.num_free == self.cache.num_blocks
        assert self.scheduler.num_running == self.scheduler.num_waiting == 0
        for stream in self.streams.values():
            assert stream.finish is not None, f"{stream.request.key} has not ended"
            stream.check(self.scheduler.max_context)


LoopFactory = Callable[..., StepLoop]


@pytest.fixture(scope="session")
def make_loop() -> LoopFactory:
    """`make_loop(num_blocks=, block_size=, num_states=, state_stride=, **config)`: a scheduler with
    a rank that checks it; with `num_states`, its model has state spaces."""

    def make(num_blocks: int = 64, block_size: int = 4, **config: Any) -> StepLoop:
        states = {name: config.pop(name, 0) for name in ("num_states", "state_stride")}
        settings: dict[str, object] = {
            "max_tokens_per_step": 32,
            "max_running": 8,
            "max_queued": 100_000,
            "max_context": 128,
            "eos_token_ids": (EOS,),
        }
        return StepLoop(SchedulerConfig(**(settings | config)), num_blocks, block_size, **states)

    return make


@pytest.fixture
def caller() -> type[Stream]:
    """Who checks what one sample's caller is told."""
    return Stream
