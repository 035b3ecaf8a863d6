"""Where requests go, and that the numbers say why."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phalanx.controller.observing import Silent, StepTimes
from phalanx.controller.routing.index import Lower
from phalanx.controller.routing.loads import EXPLAINED, Loads
from phalanx.controller.routing.pace import Pace, PaceMeter
from phalanx.controller.routing.router import (
    COPY_START_S,
    DISPLACED,
    PATIENCE,
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
    prompts=st.integers(0, 20),
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
            base_s=st.floats(0.0, 0.1),
        ),
        load_s=st.just(0.0),
        copied_tokens=st.just(0),
        copy_s=st.just(0.0),
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
    pace = PACE._replace(base_s=0.003)
    busy = Candidate(replica=0, cached_tokens=40, work=Work(60, 8, 800, 0), places=8, pace=pace)
    item = estimate(Request(100, output_tokens=50), busy)
    assert item.prefill_s == pytest.approx(0.12)
    loading = busy._replace(load_s=0.5)
    assert estimate(Request(100, output_tokens=50), loading).cost_s == item.cost_s + 0.5
    assert item.streams_s == pytest.approx(1.5 * (0.003 + 0.008)), "half a step runs yet"
    begun = busy._replace(work=Work(60, 8, 800, 0, prompts=2))
    assert estimate(Request(100), begun).prefill_s == pytest.approx(0.045 + 0.06)
    assert estimate(Request(100), begun).streams_s == pytest.approx(0.003 + 0.008)
    # one of eight must end; a mean of 100 tokens of 0.02 s are left to each
    assert item.wait_s == 0.25
    # eight streams of 4 s on average: two come in a second. Those of the 60 ms of the queue wait
    # for all of the prompt's 60 ms, those of its own time for half of it
    later_s = 2 * 0.06 * 0.06 + 2 * 0.06 * 0.06 / 2
    # eight streams stand still for the prompt; their 50 next tokens and its own 50 take longer
    there_s = PATIENCE * 8 * (0.06 + 2 * 50 * 0.001)
    assert item.disturbance_s == pytest.approx(DISPLACED * 0.06 + later_s + there_s)
    full = busy._replace(places=None, room=1000, work=Work(60, 8, 800, 900))
    # 60 and 100 tokens are needed, 100 are free, and 900 come back in 100 steps
    assert estimate(Request(100, output_tokens=100), full).wait_s == pytest.approx(60 / 900 * 2)


@given(WORK, st.integers(0, 1000))
@settings(deadline=None, max_examples=40)
def test_who_comes_later_waits_as_in_a_simulated_queue(work: Work, tokens: int) -> None:
    """The formula's `arrivals * own * (queue + own / 2)` against arrivals counted one by one."""
    item = estimate(Request(tokens), Candidate(0, work=work, pace=PACE))
    rate = work.streams**2 / (2 * work.output_tokens * 0.02) if work.output_tokens else 0.0
    queue_s, own_s, steps = work.ahead / 1000, tokens / 1000, 1000
    waited_s = 0.0
    for step in range(steps):
        now = (step + 0.5) / steps * (queue_s + own_s)
        # what is left of the prompt for somebody who comes now
        waited_s += min(own_s, queue_s + own_s - now) * rate * (queue_s + own_s) / steps
    expected = waited_s + (DISPLACED + PATIENCE * work.streams) * own_s
    assert item.disturbance_s == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_among_hundreds_the_cheapest_is_the_least_estimate() -> None:
    random = Random(3)
    for _ in range(30):
        candidates = [
            Candidate(
                replica,
                cached_tokens=random.choice((0, 256, 512)),
                work=Work(random.randrange(3000), random.randrange(9), random.randrange(900), 0),
                places=random.choice((None, 6)),
                pace=PACE._replace(tokens_per_s=random.uniform(500, 2000)),
            )
            for replica in range(300)
        ]
        request = Request(600, output_tokens=100)
        expected = min(candidates, key=lambda item: estimate(request, item).cost_s)
        decision = route(request, candidates)
        assert decision.replica == expected.replica and decision.candidates == 300
        assert decision.compared[0] == expected


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
    talking = Candidate(replica=0, work=Work(0, 4), pace=PACE._replace(stream_s=1e-5))
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
    assert meter.pace == Pace(None, 0.04, 0.01), "of one point, all is the streams'"
    meter = PaceMeter(Silent())
    for streams in (1, 8):
        meter.on_step(step(streams, streams, 0.01))
    for _ in range(200):
        meter.on_step(step(1, 500, 0.26))
        meter.on_step(step(1, 2, 0.011))
    rate = meter.pace.tokens_per_s
    assert rate is not None and abs(rate - 2000) < 20, "0.01 s of each step are not the prompt's"
    assert meter.pace.step_s == 0.01 and meter.pace.base_s == pytest.approx(0.01)
    for _ in range(200):
        meter.on_step(step(1, 100, 0.11))
    assert abs((meter.pace.tokens_per_s or 0) - 1000) < 1, "what is long past does not count"


@given(st.floats(0.001, 0.1), st.floats(0, 0.01), st.floats(10, 1e5))
@settings(deadline=None, max_examples=30)
def test_the_meter_finds_the_line_that_steps_are_on(
    base_s: float, stream_s: float, rate: float
) -> None:
    meter, random = PaceMeter(Silent()), Random(0)
    for _ in range(300):
        streams = random.randint(1, 40)
        meter.on_step(step(streams, streams, base_s + stream_s * streams))
    pace = meter.pace
    assert pace.base_s == pytest.approx(base_s, rel=1e-6)
    assert pace.stream_s == pytest.approx(stream_s, rel=1e-6, abs=1e-9)
    for _ in range(300):
        streams, tokens = random.randint(0, 40), random.randint(1000, 5000)
        seconds = base_s + stream_s * streams + tokens / rate
        if tokens / rate > 0.2 * seconds:
            meter.on_step(step(streams + 1, streams + tokens, seconds))
    if meter.pace.tokens_per_s is not None:
        assert meter.pace.tokens_per_s == pytest.approx(rate, rel=1e-6)


def test_a_prefix_that_can_be_copied_makes_others_as_good_as_its_holder() -> None:
    """A token takes 1 ms to compute and 0.1 ms to copy."""

    def loads(queued: int, bytes_per_s: float | None) -> Loads:
        loads = Loads()
        for index in range(3):
            loads.join(index, token_bytes=1e4)
            loads.measured(index, PACE)
        loads.charge(2, Work(), Work(queued))
        loads.copy_bytes_per_s = bytes_per_s
        return loads

    runs, request = [(200, 0b010), (900, 0b100)], Request(1000)
    assert loads(500, None).choose(request, runs).replica == 2, "0.7 s with all that it holds"
    assert loads(500, 1e8).choose(request, runs, copies=False).replica == 2
    decision = loads(500, 1e8).choose(request, runs)
    assert (decision.replica, decision.source) == (1, 2)
    first, second = decision.estimates[:2]
    assert (first.cached_tokens, first.copied_tokens) == (200, 700)
    assert first.copy_s == pytest.approx(COPY_START_S + 700 * 1e-4)
    assert first.predicted_s == pytest.approx(first.copy_s + 0.1)
    assert (second.replica, second.copied_tokens) == (0, 900)
    assert decision.uncached_tokens == 800, "until it is there"
    assert loads(150, 1e8).choose(request, runs).replica == 1, "0.29 s beside 0.35"
    assert loads(50, 1e8).choose(request, runs).replica == 2, "the holder is sooner than any copy"
    slow = loads(1450, 1.5e7).choose(request, runs)
    assert slow.replica == 1 and not any(item.copied_tokens for item in slow.estimates)
    short = loads(500, 1e8).choose(Request(60), [(50, 0b100)])
    assert not any(item.copied_tokens for item in short.estimates)


def test_nothing_is_copied_from_or_to_a_replica_that_cannot() -> None:
    loads = Loads()
    for index, token_bytes in enumerate((0.0, 1e4, 1e4)):
        loads.join(index, token_bytes=token_bytes)
        loads.measured(index, PACE)
    loads.copy_bytes_per_s = 1e8
    assert loads.choose(Request(1000), [(900, 0b001)]).source is None
    predicted = loads.choose(Request(1000), [(900, 0b010)]).estimates
    assert {item.replica: item.copied_tokens for item in predicted} == {0: 0, 1: 0, 2: 900}
    below = {1: Lower(900, 0)}
    assert loads.choose(Request(1000), [(900, 0b010)], below).source is None


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
