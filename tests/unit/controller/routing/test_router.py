"""Where requests go, and that the numbers say why."""

from __future__ import annotations

import dataclasses
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phalanx.controller.observing import Silent, StepTimes
from phalanx.controller.routing.index import Lower
from phalanx.controller.routing.loads import EXPLAINED, Loads
from phalanx.controller.routing.pace import Pace, PaceMeter
from phalanx.controller.routing.router import (
    DISTURBANCE,
    SUCCESSORS,
    Candidate,
    Decision,
    Request,
    Work,
    estimate,
)

PACE = Pace(tokens_per_s=1000.0, step_s=0.02, stream_s=0.001)
WORK = st.builds(
    Work,
    queue_tokens=st.integers(0, 10_000),
    streams=st.integers(0, 100),
    output_tokens=st.integers(0, 10_000),
    kv_tokens=st.integers(0, 10_000),
)
CANDIDATES = st.lists(
    st.builds(
        Candidate,
        replica=st.integers(0, 40),
        cached_tokens=st.integers(0, 50),
        work=WORK,
        places=st.none() | st.integers(1, 64),
        room=st.none() | st.integers(1, 20_000),
        pace=st.builds(
            Pace,
            tokens_per_s=st.floats(1.0, 1e5),
            step_s=st.floats(1e-3, 1.0),
            stream_s=st.floats(1e-5, 0.1),
        ),
        load_s=st.just(0.0),
    ),
    min_size=1,
    max_size=12,
    unique_by=lambda candidate: candidate.replica,
)
REQUESTS = st.builds(
    Request, st.integers(51, 1000), samples=st.integers(1, 4), output_tokens=st.integers(0, 2000)
)


def route(request: Request, candidates: list[Candidate]) -> Decision:
    """The decision among replicas that are as given, reached by joining and charging them."""
    loads = Loads()
    runs: dict[int, int] = {}
    for item in candidates:
        loads.join(item.replica, item.places, item.room)
        loads.measured(item.replica, item.pace)
        loads.charge(item.replica, Work(), item.work)
        if item.cached_tokens:
            runs[item.cached_tokens] = runs.get(item.cached_tokens, 0) | 1 << item.replica
    return loads.choose(request, sorted(runs.items()))


@given(CANDIDATES, REQUESTS, st.randoms())
def test_a_decision_is_the_least_estimate_in_whatever_order(
    candidates: list[Candidate], request: Request, random: Random
) -> None:
    decision = route(request, candidates)
    random.shuffle(candidates)
    assert route(request, candidates) == decision
    all_of_them = {item.replica: estimate(request, item) for item in candidates}
    best = min(item.cost_s for item in all_of_them.values())
    assert all_of_them[decision.replica].cost_s == pytest.approx(best, rel=1e-9)
    assert decision.candidates == len(candidates)
    assert len(decision.estimates) == min(len(candidates), EXPLAINED)
    assert decision.estimates[0].replica == decision.replica
    assert all(item == all_of_them[item.replica] for item in decision.estimates)
    assert decision.uncached_tokens == request.tokens - decision.estimates[0].cached_tokens
    assert f"{decision.estimates[0].cost_s:.4f} s" in str(decision)


@given(CANDIDATES, st.lists(st.tuples(st.integers(0, 11), WORK), max_size=8), REQUESTS)
def test_what_is_charged_and_given_back_leaves_no_trace(
    candidates: list[Candidate], charges: list[tuple[int, Work]], request: Request
) -> None:
    expected = route(request, candidates)
    loads = Loads()
    for item in candidates:
        loads.join(item.replica, item.places, item.room)
        loads.measured(item.replica, item.pace)
    for which, work in charges:
        loads.charge(candidates[which % len(candidates)].replica, Work(), work)
        loads.choose(request)
    for item in candidates:
        loads.charge(item.replica, Work(), item.work)
    for which, work in reversed(charges):
        loads.charge(candidates[which % len(candidates)].replica, work, Work())
    runs = [(item.cached_tokens, 1 << item.replica) for item in candidates if item.cached_tokens]
    assert loads.choose(request, runs) == expected


def test_the_formula() -> None:
    busy = Candidate(
        replica=0, cached_tokens=40, work=Work(60, 8, 800, 0), places=8, pace=PACE
    )  # fmt: skip
    item = estimate(Request(100), busy)
    assert item.prefill_s == 0.12
    assert estimate(Request(100), busy._replace(load_s=0.5)).cost_s == item.cost_s + 0.5
    assert item.streams_s == 0.008
    # one of eight must end; a mean of 100 tokens of 0.02 s are left to each
    assert item.wait_s == 0.25
    # eight streams wait for 60 tokens, and so does whoever comes next
    assert item.disturbance_s == pytest.approx((SUCCESSORS + DISTURBANCE * 8) * 0.06)
    full = busy._replace(places=None, room=1000, work=Work(60, 8, 800, 900))
    # 60 and 100 tokens are needed, 100 are free, and 900 come back in 100 steps
    assert estimate(Request(100, output_tokens=100), full).wait_s == pytest.approx(60 / 900 * 2)


def test_ties_go_to_the_lowest_index() -> None:
    assert route(Request(10), [Candidate(replica=index) for index in (2, 0, 1)]).replica == 0


def test_the_holder_of_a_prefix_gets_the_request_until_waiting_costs_more() -> None:
    def chosen(queue_tokens: int) -> int:
        holder = Candidate(replica=1, cached_tokens=900, work=Work(queue_tokens), pace=PACE)
        return route(Request(1000), [Candidate(replica=0, pace=PACE), holder]).replica

    assert [chosen(queued) for queued in (0, 1799, 1801)] == [1, 1, 0]


def test_a_holder_whose_places_are_taken_is_passed_over() -> None:
    def chosen(streams: int) -> int:
        holder = Candidate(
            replica=1, cached_tokens=900, work=Work(0, streams, streams * 200), places=8, pace=PACE
        )
        return route(Request(1000), [Candidate(replica=0, pace=PACE), holder]).replica

    assert chosen(7) == 1, "a place is free"
    assert chosen(16) == 0, "nine streams must end first, nothing else is to be computed"


def test_a_holder_without_room_is_passed_over() -> None:
    def chosen(room: int) -> int:
        holder = Candidate(
            replica=1, cached_tokens=900, work=Work(0, 2, 400, 6000), room=room, pace=PACE
        )
        return route(Request(1000), [Candidate(replica=0, pace=PACE), holder]).replica

    assert (chosen(6100), chosen(3000)) == (1, 0)


def test_long_prompts_keep_away_from_many_streams() -> None:
    idle = Candidate(replica=1, work=Work(10), pace=PACE)
    talking = Candidate(replica=0, work=Work(0, 4), pace=dataclasses.replace(PACE, stream_s=1e-5))
    assert route(Request(20), [talking, idle]).replica == 0
    assert route(Request(900), [talking, idle]).replica == 1


def test_an_unmeasured_replica_counts_as_the_fastest() -> None:
    loads = Loads()
    for index in range(3):
        loads.join(index)
    loads.measured(0, Pace(tokens_per_s=10.0, step_s=1.0, stream_s=1.0))
    decision = loads.choose(Request(100))
    assert decision.replica == 0 and decision.estimates[1].tokens_per_s == 10.0
    loads.measured(1, Pace(tokens_per_s=20.0))
    loads.leave(0)
    decision = loads.choose(Request(100))
    assert decision.replica == 1 and {e.tokens_per_s for e in decision.estimates} == {20.0}
    assert decision.candidates == 2


def step(rows: int, tokens: int, seconds: float) -> StepTimes:
    return StepTimes(
        schedule_s=0.0, execute_s=seconds, update_s=0.0, overhead_s=0.0, rows=rows, tokens=tokens
    )


def test_the_meter_tells_prompt_work_from_streams() -> None:
    meter = PaceMeter(Silent())
    assert meter.pace == Pace()
    meter.on_step(step(4, 4, 0.04))
    assert meter.pace == Pace(None, 0.04, 0.01)
    for _ in range(200):
        meter.on_step(step(1, 500, 0.25))
        meter.on_step(step(1, 2, 0.001))
    rate = meter.pace.tokens_per_s
    assert rate is not None and abs(rate - 502 / 0.251) < 120, "short chunks weigh less"
    assert meter.pace.step_s == 0.04
    for _ in range(200):
        meter.on_step(step(1, 100, 0.1))
    assert abs((meter.pace.tokens_per_s or 0) - 1000) < 1, "what is long past does not count"


def test_what_is_below_the_pool_costs_its_load_or_counts_for_nothing() -> None:
    """10,000 tokens/s to compute; host memory gives 100,000, the disk of replica 1 only 5,000."""
    loads = Loads()
    for index, disk_token_s in enumerate((2e-5, 2e-4, None)):
        loads.join(index)
        loads.measured(index, Pace(10_000.0, 0.02, 0.001, 1e-5, disk_token_s))
    runs = [(800, 0b111)]
    lower = {0: Lower(400, 400), 1: Lower(300, 500), 2: Lower(0, 20)}
    decision = loads.choose(Request(1000), runs, lower)
    predicted = {item.replica: item for item in decision.estimates}
    assert [predicted[index].cached_tokens for index in range(3)] == [800, 300, 780]
    assert [round(predicted[index].load_s, 6) for index in range(3)] == [0.012, 0.003, 0]
    assert [round(predicted[index].predicted_s, 6) for index in range(3)] == [0.032, 0.073, 0.022]
    assert decision.replica == 2, "the pool is better than any load"
    assert loads.choose(Request(1000), runs, {**lower, 2: Lower(0, 700)}).replica == 0
