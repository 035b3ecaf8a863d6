"""Where requests go, and that the numbers say why."""

from __future__ import annotations

from random import Random

from hypothesis import given
from hypothesis import strategies as st

from phalanx.controller.observing import Silent, StepTimes
from phalanx.controller.routing.pace import Pace, PaceMeter
from phalanx.controller.routing.router import Candidate, route

PACE = Pace(tokens_per_s=1000.0, step_s=0.02, stream_s=0.001)
PACES = st.builds(
    Pace,
    tokens_per_s=st.none() | st.floats(1.0, 1e5),
    step_s=st.none() | st.floats(1e-3, 1.0),
    stream_s=st.none() | st.floats(1e-5, 0.1),
)
CANDIDATES = st.lists(
    st.builds(
        Candidate,
        index=st.integers(0, 9),
        cached_tokens=st.integers(0, 50),
        queue_tokens=st.integers(0, 10_000),
        streams=st.integers(0, 100),
        output_tokens=st.integers(0, 10_000),
        places=st.none() | st.integers(1, 64),
        pace=PACES,
    ),
    min_size=1,
    max_size=6,
    unique_by=lambda candidate: candidate.index,
)


@given(CANDIDATES, st.integers(51, 1000), st.integers(1, 4), st.randoms())
def test_a_decision_is_the_least_estimate_in_whatever_order(
    candidates: list[Candidate], tokens: int, samples: int, random: Random
) -> None:
    decision = route(tokens, samples, candidates)
    random.shuffle(candidates)
    assert route(tokens, samples, candidates) == decision
    assert [item.index for item in decision.estimates] == sorted(c.index for c in candidates)
    best = min(item.predicted_s for item in decision.estimates)
    chosen = next(item for item in decision.estimates if item.index == decision.index)
    assert chosen.predicted_s == best >= 0.0
    assert all(
        item.predicted_s > best for item in decision.estimates if item.index < decision.index
    )
    assert decision.uncached_tokens == tokens - chosen.cached_tokens
    assert f"{chosen.predicted_s:.4f} s" in str(decision)


def test_the_formula() -> None:
    busy = Candidate(
        index=0, cached_tokens=40, queue_tokens=60, streams=8, output_tokens=800, places=8,
        pace=PACE,
    )  # fmt: skip
    (estimate,) = route(100, 1, [busy]).estimates
    assert estimate.prefill_s == 0.12
    assert estimate.streams_s == 0.008
    # one of eight must end; a mean of 100 tokens of 0.02 s are left to each
    assert estimate.place_s == 0.25


def test_ties_go_to_the_lowest_index() -> None:
    assert route(10, 1, [Candidate(index=index) for index in (2, 0, 1)]).index == 0


def test_the_holder_of_a_prefix_gets_the_request_until_waiting_costs_more() -> None:
    def chosen(queue_tokens: int) -> int:
        holder = Candidate(index=1, cached_tokens=900, queue_tokens=queue_tokens, pace=PACE)
        return route(1000, 1, [Candidate(index=0, pace=PACE), holder]).index

    assert [chosen(queued) for queued in (0, 899, 901)] == [1, 1, 0]


def test_a_holder_whose_places_are_taken_is_passed_over() -> None:
    def chosen(streams: int) -> int:
        holder = Candidate(
            index=1, cached_tokens=900, streams=streams, output_tokens=streams * 200, places=8,
            pace=PACE,
        )  # fmt: skip
        return route(1000, 1, [Candidate(index=0, pace=PACE), holder]).index

    assert chosen(7) == 1, "a place is free"
    assert chosen(16) == 0, "nine streams must end first, nothing else is to be computed"


def test_an_unmeasured_replica_counts_as_the_fastest() -> None:
    slow = Candidate(index=0, pace=Pace(tokens_per_s=10.0, step_s=1.0, stream_s=1.0))
    decision = route(100, 1, [slow, Candidate(index=1)])
    assert decision.index == 0 and decision.estimates[1].tokens_per_s == 10.0


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
