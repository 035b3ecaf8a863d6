"""Random histories: whatever happens, every sample gets the tokens of a lone run."""

from __future__ import annotations

from collections.abc import Callable
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

from phalanx.controller.scheduling.request import FinishReason
from phalanx.protos.errors import InvalidArgument

PROMPTS = st.lists(st.integers(0, 1), min_size=1, max_size=14)
IDS = st.integers(0, 11)


class Machine(RuleBasedStateMachine):
    """The callers, the step loop, the ranks and the clock, in any order."""

    def __init__(self, make_loop: Callable[..., Any]) -> None:
        super().__init__()
        self.make_loop = make_loop
        self.added = 0

    @initialize(
        num_blocks=st.integers(3, 14),
        block_size=st.integers(1, 4),
        max_running=st.integers(1, 5),
        budget=st.integers(0, 8),
        max_context=st.integers(6, 24),
        max_in_flight=st.integers(1, 3),
        max_preemptions=st.integers(0, 3),
        reserve_tokens=st.integers(1, 4),
        prefix_caching=st.booleans(),
        num_states=st.sampled_from([0, 0, 1, 2, 4, 8]),
        state_stride=st.sampled_from([0, 0, 5]),
    )
    def start(self, num_blocks: int, block_size: int, budget: int, **config: Any) -> None:
        self.loop = self.make_loop(
            num_blocks,
            block_size,
            max_tokens_per_step=config["max_running"] + budget,
            **config,
        )

    @rule(
        prompt=PROMPTS,
        max_tokens=st.integers(0, 12),
        min_tokens=st.integers(0, 3),
        ignore_eos=st.booleans(),
        stop_token_ids=st.sampled_from([(), (5,)]),
        n=st.sampled_from([1, 1, 2, 3]),
        prompt_logprobs=st.sampled_from([None, None, 0]),
        tenant=st.sampled_from(["a", "a", "b"]),
        patience=st.sampled_from([None, None, 2, 6]),
    )
    def add_request(self, **given: Any) -> None:
        self.add(**given)

    def add(self, patience: int | None, **given: Any) -> None:
        given["min_tokens"] = min(given["min_tokens"], given["max_tokens"] or 99)
        deadline = None if patience is None else self.loop.now + patience
        self.added += 1
        try:
            self.loop.add(f"r{self.added}", deadline=deadline, **given)
        except InvalidArgument:
            assert len(given["prompt"]) >= self.loop.scheduler.max_context

    @rule(prompt=PROMPTS, count=st.integers(2, 5), budget=st.integers(4, 16), same=st.booleans())
    def add_rivals(self, prompt: list[int], count: int, budget: int, same: bool) -> None:
        """Requests that together need more blocks than there are."""
        for index in range(count):
            own = prompt if same else [index % 2, *prompt]
            self.add(
                patience=None,
                prompt=own,
                max_tokens=budget,
                min_tokens=0,
                ignore_eos=True,
                stop_token_ids=(),
                n=1,
                prompt_logprobs=0 if index == 1 else None,
                tenant="a",
            )

    @rule(steps=st.integers(1, 12))
    def run_on(self, steps: int) -> None:
        """A loop that keeps as many plans in flight as it may."""
        for _ in range(steps):
            while self.loop.send():
                self.loop.scheduler.check_integrity()
            if self.loop.sent:
                self.loop.receive()
            self.loop.scheduler.check_integrity()

    @rule()
    def send(self) -> None:
        self.loop.send()

    @precondition(lambda self: self.loop.sent)
    @rule()
    def receive(self) -> None:
        self.loop.receive()

    @precondition(lambda self: self.added)
    @rule(back=IDS, sample=st.sampled_from([None, 0, 0, 1, 2]))
    def abort(self, back: int, sample: int | None) -> None:
        name = f"r{max(self.added - back, 0)}"
        events = self.loop.scheduler.abort(name, sample)
        assert all(event.finish is FinishReason.ABORT for event in events)
        self.loop.feed(events)

    @precondition(lambda self: self.loop.streams)
    @rule(back=IDS)
    def poison(self, back: int) -> None:
        streams = list(self.loop.streams.values())
        request = streams[max(len(streams) - 1 - back, 0)].request
        self.loop.rank.poisoned.add((request.params.seed, request.sample_index))

    @rule()
    def tick(self) -> None:
        self.loop.now += 1
        self.loop.feed(self.loop.scheduler.expire(self.loop.now))
        for stream in self.loop.streams.values():
            deadline = stream.request.deadline
            assert deadline is None or deadline > self.loop.now or stream.finish is not None

    @invariant()
    def books_agree(self) -> None:
        if hasattr(self, "loop"):
            self.loop.scheduler.check_integrity()

    def teardown(self) -> None:
        if not hasattr(self, "loop"):
            return
        # each step computes a token at least, and each token is computed once per admission
        context, attempts = self.loop.scheduler.max_context, self.loop.config.max_preemptions + 1
        self.loop.run(max_steps=10 + len(self.loop.streams) * context * attempts)
        assert all(count <= attempts for count in self.loop.rank.admissions.values())


def test_every_sample_gets_the_tokens_of_a_lone_run(make_loop: Callable[..., Any]) -> None:
    run_state_machine_as_test(
        lambda: Machine(make_loop),
        settings=settings(
            max_examples=240,
            stateful_step_count=50,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
