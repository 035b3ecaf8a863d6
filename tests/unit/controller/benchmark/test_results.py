"""Percentiles against numpy, throughput and failures by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from phalanx.controller.benchmark.load import Attempt
from phalanx.controller.benchmark.results import measure, percentile, summarise

FINITE = st.floats(min_value=-1e9, max_value=1e9, allow_nan=False)


def attempt(due: float, sent: float, end: float, *arrivals: tuple[float, int]) -> Attempt:
    tokens = sum(count for _, count in arrivals)
    return Attempt(due, sent, 10, tokens, end_s=end, arrivals=list(arrivals))


@given(st.lists(FINITE, min_size=1, max_size=60), st.floats(0, 100))
def test_percentiles_are_numpys(values: list[float], percent: float) -> None:
    expected = np.percentile(values, percent)
    assert percentile(sorted(values), percent) == pytest.approx(expected, rel=1e-9, abs=1e-6)


@given(st.lists(FINITE, min_size=1, max_size=60))
def test_a_summary_is_numpys(values: list[float]) -> None:
    summary = summarise([*values, None])
    assert summary is not None and summary.count == len(values)
    assert summary.mean == pytest.approx(np.mean(values), rel=1e-9, abs=1e-6)
    assert summary.max == max(values)
    points = [summary.p50, summary.p90, summary.p95, summary.p99]
    assert points == pytest.approx(
        list(np.percentile(values, [50, 90, 95, 99])), rel=1e-9, abs=1e-6
    )


def test_a_summary_of_nothing_is_none() -> None:
    assert summarise([]) is None and summarise([None]) is None


def test_the_times_of_one_request() -> None:
    item = attempt(1.0, 1.5, 5.0, (2.0, 2), (3.0, 1), (5.0, 4))
    assert item.time_to_first_token_s == 1.0  # from when it was due, not sent
    assert item.latency_s == 4.0
    assert item.output_tokens == 7
    # five tokens came after the first message, in three seconds
    assert item.time_per_output_token_s == pytest.approx(3 / 5)
    assert item.inter_token_latencies_s() == [1.0, 0.5, 0.5, 0.5, 0.5]


def test_a_single_message_has_no_time_a_token() -> None:
    item = attempt(0, 0, 1, (1.0, 8))
    assert item.time_per_output_token_s is None and item.inter_token_latencies_s() == []


def test_throughput_counts_completed_requests_over_the_whole_duration() -> None:
    good = [attempt(0, 0, 4, (1, 1), (4, 7)), attempt(2, 2, 10, (8, 8))]
    bad = attempt(5, 5, 9, (7, 3))
    bad.status, bad.error = "UNAVAILABLE", "draining"
    results = measure([*good, bad])
    assert results.duration_s == 10
    assert (results.sent, results.completed, results.failed) == (3, 2, 1)
    assert results.output_tokens_per_s == pytest.approx(1.6)
    assert results.prompt_tokens_per_s == pytest.approx(2.0)
    assert results.requests_per_s == pytest.approx(0.2)
    assert results.latency_s is not None and results.latency_s.count == 2


def test_failures_are_counted_by_status_with_an_example() -> None:
    attempts = [attempt(0, 0, 1, (1, 1)) for _ in range(5)]
    for item, status in zip(attempts, ("A", "B", "A"), strict=False):
        item.status, item.error = status, f"first {status}" if status else ""
    results = measure(attempts)
    assert results.statuses == {"A": 2, "B": 1, "OK": 2}
    assert results.errors == {"A": "first A", "B": "first B"}


def test_short_outputs_are_counted() -> None:
    item = attempt(0, 0, 1, (1, 3))
    item.asked_tokens = 5
    assert measure([item, attempt(0, 0, 1, (1, 3))]).short == 1


def test_all_failed_still_gives_a_report() -> None:
    item = attempt(0, 0, 0)
    item.status = "UNAVAILABLE"
    results = measure([item])
    assert results.failed == 1 and results.latency_s is None
    assert results.output_tokens_per_s == 0
    assert json.loads(json.dumps(results.as_json(), allow_nan=False))["failed"] == 1
