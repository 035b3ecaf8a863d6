"""Tenants that wait share the replica fairly, and nobody waits for ever."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phalanx.controller.scheduling.fairness import MAX_IDLE, FairShare
from phalanx.controller.scheduling.queue import WaitingQueue
from phalanx.controller.scheduling.request import Request
from phalanx.controller.scheduling.sample import Sample
from phalanx.controller.tenants import CANARY_TENANT, TenantLimits, Tenants
from phalanx.protos.sampling import SamplingParams

LoopFactory = Callable[..., Any]


def sample(order: int, tenant: str) -> Sample:
    request = Request(
        request_id=f"r{order}",
        prompt_token_ids=[1],
        params=SamplingParams(),
        tenant=tenant,
        arrival=0.0,
    )
    return Sample.of(request, order, 10, ())


def weighing(weights: dict[str, float]) -> Tenants:
    return Tenants({name: TenantLimits(weight=weight) for name, weight in weights.items()})


class PlainQueue:
    """The rule, without a heap: look at everybody, every time."""

    def __init__(self, weights: dict[str, float], max_bypass: int) -> None:
        self.weights, self.max_bypass = weights, max_bypass
        self.lines: dict[str, list[Sample]] = {}
        self.counters: dict[str, float] = {}
        self.joined: dict[str, int] = {}
        self.passed: dict[str, tuple[int, int]] = {}
        """Tenant -> turns passed since its first sample came to stand there, and when it did."""
        self.last = ""
        self.turn: str | None = None
        self.clock = 0

    def append(self, new: Sample) -> None:
        tenant = new.request.tenant
        if tenant not in self.lines:
            others = [self.counters.get(other, 0.0) for other in self.lines]
            floor = min(others, default=self.counters.get(self.last, 0.0))
            self.counters[tenant] = max(self.counters.get(tenant, 0.0), floor)
            self.lines[tenant] = []
            self.clock += 1
            self.joined[tenant], self.passed[tenant] = self.clock, (0, self.clock)
        self.lines[tenant].append(new)

    def head(self) -> Sample:
        if self.turn is None:
            due = [name for name, (turns, _) in self.passed.items() if turns >= self.max_bypass]
            if due:
                self.turn = min(due, key=lambda name: self.passed[name][1])
            else:
                self.turn = min(
                    self.lines,
                    key=lambda name: (self.counters.get(name, 0.0), self.joined[name]),
                )
        return self.lines[self.turn][0]

    def remove(self, old: Sample) -> None:
        tenant = old.request.tenant
        first = self.lines[tenant][0] is old
        self.lines[tenant].remove(old)
        if first:
            self.turn = None if self.turn == tenant else self.turn
            self.clock += 1
            for name, (turns, since) in self.passed.items():
                self.passed[name] = (0, self.clock) if name == tenant else (turns + 1, since)
        if not self.lines[tenant]:
            del self.lines[tenant], self.passed[tenant]
            self.last = tenant

    def charge(self, tenant: str, service: float) -> None:
        share = service / self.weights.get(tenant, 1.0)
        self.counters[tenant] = self.counters.get(tenant, 0.0) + share


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["append", "append", "admit", "admit", "ask", "abort", "output"]),
            st.sampled_from("abcd"),
            st.integers(0, 50),
        ),
        max_size=120,
    ),
    st.integers(0, 6),
)
def test_the_queue_follows_the_plain_rule(
    actions: list[tuple[str, str, int]], max_bypass: int
) -> None:
    weights = {"a": 2.0, "b": 0.5}
    queue, model = WaitingQueue(weighing(weights), max_bypass), PlainQueue(weights, max_bypass)
    waiting: list[Sample] = []
    for order, (action, tenant, number) in enumerate(actions):
        if action == "append":
            waiting.append(sample(order, tenant))
            queue.append(waiting[-1])
            model.append(waiting[-1])
        elif action == "output":
            queue.charge_output(tenant, number)
            model.charge(tenant, 2 * number)
        elif not waiting:
            continue
        elif action == "abort":
            gone = waiting.pop(number % len(waiting))
            queue.remove(gone)
            model.remove(gone)
        else:
            head = queue.head
            assert head is model.head()
            if action == "admit":
                waiting.remove(head)
                queue.remove(head)
                model.remove(head)
                queue.charge_input(head.request.tenant, number)
                model.charge(head.request.tenant, number)
        assert len(queue) == len(waiting) == len(list(queue))


def serve(loop: Any, steps: int, tenant_of: Callable[[Any], str]) -> list[dict[str, int]]:
    """Service by tenant after each step: prompt tokens once when admitted, output tokens twice."""
    served: dict[str, int] = {"a": 0, "b": 0}
    history = [dict(served)]
    known = {key: 0 for key in loop.streams}
    begun: set[int] = set()
    for _ in range(steps):
        plan = loop.step()
        for new in plan.new if plan else ():
            if new.params.seed not in begun:
                begun.add(new.params.seed)
                served[tenant_of(new)] += new.num_prompt
        for key, stream in loop.streams.items():
            served[stream.request.tenant] += 2 * (len(stream.tokens) - known[key])
            known[key] = len(stream.tokens)
        history.append(dict(served))
    return history


@pytest.mark.parametrize("weight", [1.0, 3.0])
@pytest.mark.parametrize("short_first", [False, True])
def test_two_waiting_tenants_get_the_same_service(
    make_loop: LoopFactory, short_first: bool, weight: float
) -> None:
    """Theorem 4.4 of the paper: at most 2 max(w_in L_in, w_out M) apart, over any interval."""
    num_blocks, block_size, long = 16, 4, 40
    loop = make_loop(num_blocks, block_size, max_running=4, tenants=weighing({"b": weight}))
    tenant_of_seed: dict[int, str] = {}

    def add(tenant: str, count: int, prompt: int, output: int) -> None:
        for number in range(count):
            seed = len(tenant_of_seed) + 1
            tenant_of_seed[seed] = tenant
            loop.add(
                f"{tenant}{number}", [seed % 7] * prompt, max_tokens=output, ignore_eos=True,
                tenant=tenant, seed=seed,
            )  # fmt: skip

    sizes = [("a", 90, long, 4), ("b", 400, 3, 9)]
    for size in reversed(sizes) if short_first else sizes:
        add(*size)
    history = serve(loop, 600, lambda new: tenant_of_seed[new.params.seed])
    left = {s.request.tenant for s in loop.scheduler._planner.waiting}
    assert left == {"a", "b"}, "both wait all the time"
    apart = [now["a"] - now["b"] / weight for now in history]
    bound = 2 * max(long, 2 * num_blocks * block_size)
    assert max(apart) - min(apart) <= bound
    assert history[-1]["a"] > 4 * bound, "a bound that is small against what was served"


def admitted(loop: Any, until: str, max_steps: int = 2000) -> list[str]:
    """Names of the requests in the order of admission, up to `until`."""
    names = {stream.request.params.seed: name for (name, _), stream in loop.streams.items()}
    order: list[str] = []
    for _ in range(max_steps):
        plan = loop.step()
        for new in plan.new if plan else ():
            if names[new.params.seed] not in order:
                order.append(names[new.params.seed])
        if until in order:
            return order[: order.index(until) + 1]
    raise AssertionError(f"{until} was not admitted in {max_steps} steps")


def test_a_greedy_tenant_does_not_delay_a_modest_one(make_loop: LoopFactory) -> None:
    loop = make_loop(max_running=4)
    for number in range(1000):
        loop.add(f"greedy{number}", [1, 2, number % 5], max_tokens=20, tenant="greedy")
    for _ in range(30):
        loop.step()
    loop.add("modest", [4, 4], max_tokens=4, tenant="modest")
    # one may stand at the head already, one may win the tie
    assert len(admitted(loop, "modest")) - 1 <= 2


def test_a_canary_takes_no_place_from_a_lone_tenant(make_loop: LoopFactory) -> None:
    loop = make_loop(num_blocks=256, max_running=16, max_tokens_per_step=64)
    loop.add("canary", [1], max_tokens=1, ignore_eos=True, tenant=CANARY_TENANT)
    while loop.scheduler.has_work:
        loop.step()
    for number in range(16):
        loop.add(f"{number}", [4, number % 5], max_tokens=20, ignore_eos=True, tenant="one")
    loop.step()
    assert loop.scheduler.num_running == 16


def test_a_modest_tenant_is_not_delayed_again_and_again(make_loop: LoopFactory) -> None:
    loop = make_loop(max_running=4)
    for number in range(1000):
        loop.add(f"greedy{number}", [1, 2, number % 5], max_tokens=20, tenant="greedy")
    for turn in range(20):
        loop.add(f"modest{turn}", [4, 4], max_tokens=2, ignore_eos=True, tenant="modest")
        assert len(admitted(loop, f"modest{turn}")) - 1 <= 2


@pytest.mark.parametrize("others", ["one", "many"])
def test_a_large_request_is_not_passed_for_ever(make_loop: LoopFactory, others: str) -> None:
    loop = make_loop(num_blocks=16, block_size=4, max_running=8)

    def small(number: int) -> None:
        tenant = "crowd" if others == "one" else f"crowd{number}"
        loop.add(f"small{number}", [1] * 4, max_tokens=8, ignore_eos=True, tenant=tenant)

    for number in range(20):
        small(number)
    loop.step()
    passed = len(loop.rank.admissions)
    loop.add("large", [2] * 60, max_tokens=3, tenant="big")
    loop.add("behind", [2], max_tokens=1, tenant="big")
    for number in range(20, 400):
        small(number)
        plan = loop.step()
        lengths = [new.num_prompt for new in plan.new] if plan else []
        assert 1 not in lengths, "it was overtaken within its tenant"
        if 60 in lengths:
            break
    else:
        raise AssertionError("the large request was never admitted")
    # those waiting before it, one that stood at the head, and none that came after it
    assert len(loop.rank.admissions) - passed <= (3 if others == "one" else 21)
    loop.run()


@pytest.mark.parametrize("max_bypass", [0, 1, 7, 40])
def test_a_procession_of_new_tenants_passes_a_bounded_number_of_times(max_bypass: int) -> None:
    queue = WaitingQueue(None, max_bypass)
    poor = sample(0, "new0")
    queue.append(poor)
    spender = sample(1, "spender")
    queue.charge_output("spender", 10_000)
    queue.append(spender)
    passed = 0
    for number in range(1, 500):
        # two of them wait at any time, each lifted to the smallest counter
        queue.append(sample(number + 1, f"new{number}"))
        if (head := queue.head) is spender:
            break
        queue.remove(head)
        queue.charge_input(head.request.tenant, 1)
        passed += 1
    waiting = 3
    assert max_bypass <= passed <= max_bypass + waiting - 1


def test_whoever_has_the_turn_keeps_it() -> None:
    queue = WaitingQueue()
    first, second, returning = sample(0, "a"), sample(1, "b"), sample(2, "b")
    queue.append(first)
    queue.append(second)
    assert queue.head is first
    queue.charge_output("a", 1000)
    assert queue.head is first, "room is being made for it"
    queue.push_front(returning)
    assert queue.head is returning
    queue.remove(returning)
    assert queue.head is first
    queue.remove(first)
    queue.append(sample(3, "a"))
    assert queue.head is second


def test_nobody_saves_up_for_later() -> None:
    queue = WaitingQueue()
    for order in range(40):
        queue.append(sample(order, "early"))
    queue.charge_output("early", 1000)
    for order in range(40, 60):
        queue.append(sample(order, "late"))
    turns = []
    for _ in range(20):
        head = queue.head
        queue.remove(head)
        queue.charge_input(head.request.tenant, 10)
        turns.append(head.request.tenant)
    assert turns.count("late") == 10


def test_idle_tenants_are_forgotten_but_not_their_debts() -> None:
    share = FairShare(lambda tenant: 1.0, 1024)
    share.charge("debtor", 1e9)
    for number in range(4 * MAX_IDLE):
        share.join(f"t{number}")
        share.charge(f"t{number}", 5.0)
        share.leave(f"t{number}")
    assert len(share) <= 2 * MAX_IDLE + 2
    assert share.counter("debtor") == 1e9
    share.join("new")
    share.join("debtor")
    assert share.next() == "new" and share.counter("new") < 1e9
