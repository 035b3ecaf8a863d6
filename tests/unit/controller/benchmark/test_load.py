"""The two loops, on a clock that jumps: every time below is exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from phalanx.controller.benchmark.load import Attempt, closed_loop, open_loop
from phalanx.controller.benchmark.results import measure
from phalanx.controller.benchmark.workload import Job, poisson_arrivals
from phalanx.protos.errors import Unavailable
from phalanx.protos.v1 import types_pb2

Jump = Callable[[Any], Any]
Server = Callable[..., Any]


def jobs(count: int, output: int = 3) -> list[Job]:
    return [Job([1, 2, 3, number], output) for number in range(count)]


def ignore(attempt: Attempt) -> None:
    pass


def test_a_closed_loop_keeps_so_many_open(jump: Jump, server: Server) -> None:
    fake = server().parallel(4)
    done: list[Attempt] = []
    attempts = jump(closed_loop(fake, jobs(10), 4, {"seed": 1}, done.append))
    assert fake.most_open == 4
    assert done == attempts and len(attempts) == 10
    assert [prompt[3] for prompt, _ in fake.asked] == list(range(10))
    assert all(params == {"max_tokens": 3, "seed": 1} for _, params in fake.asked)
    # ten requests of two seconds (1 + 2 x 0.5) on four lanes
    assert max(item.end_s for item in attempts) == pytest.approx(6.0)
    assert {item.latency_s for item in attempts} == {2.0}


def test_a_closed_loop_waits_no_longer_than_its_jobs(jump: Jump, server: Server) -> None:
    fake = server().parallel(100)
    assert len(jump(closed_loop(fake, jobs(2), 50, {}, ignore))) == 2
    assert fake.most_open == 2


def test_times_of_a_stream(jump: Jump, server: Server) -> None:
    fake = server(first_s=2.0, next_s=0.3, chunk=3)
    (item,) = jump(closed_loop(fake, jobs(1, output=7), 1, {}, ignore))
    assert item.time_to_first_token_s == 2.0
    assert [count for _, count in item.arrivals] == [3, 3, 1]
    assert item.latency_s == pytest.approx(2.6)
    assert item.inter_token_latencies_s() == pytest.approx([0.1] * 3 + [0.3])


def test_an_open_loop_sends_when_requests_are_due(jump: Jump, server: Server) -> None:
    """However slow the server is."""
    fake = server(first_s=100.0)
    arrivals = poisson_arrivals(2.0, 20, seed=1)
    attempts = jump(open_loop(fake, jobs(20), arrivals, {}, ignore))
    assert fake.most_open == 20
    began = min(item.due_s for item in attempts)
    assert [item.due_s - began for item in attempts] == pytest.approx(arrivals)
    assert [item.sent_s for item in attempts] == pytest.approx([item.due_s for item in attempts])


def test_a_stall_is_charged_to_all_that_it_delays(jump: Jump, server: Server) -> None:
    """One request a second, each served in 0.1 s by a single lane, but the first takes 10 s.

    A closed loop of one sees a single slow request; the open loop sees that ten more came in
    the meantime and had to wait.
    """

    def stall(number: int) -> None:
        fake.first_s = 0.1

    fake = server(first_s=10.0, next_s=0.0)
    fake.fail = stall
    arrivals = [float(second) for second in range(20)]
    attempts = jump(open_loop(fake, jobs(20, output=1), arrivals, {}, ignore))
    firsts = [item.time_to_first_token_s for item in attempts]
    assert firsts[:3] == pytest.approx([10.0, 9.1, 8.2])
    assert sum(first > 0.15 for first in firsts) >= 10
    fake = server(first_s=10.0, next_s=0.0)
    fake.fail = stall
    closed = jump(closed_loop(fake, jobs(20, output=1), 1, {}, ignore))
    assert sum(item.latency_s > 0.15 for item in closed) == 1


def test_a_client_that_sends_late_is_charged_too(jump: Jump, server: Server) -> None:
    """The due time is the schedule's, not when the client got round to it."""
    attempts = jump(open_loop(server(), jobs(2), [-3.0, 0.0], {}, ignore))
    late = min(attempts, key=lambda item: item.due_s)
    assert late.sent_s - late.due_s == pytest.approx(3.0)
    assert late.time_to_first_token_s == pytest.approx(4.0)
    results = measure(attempts)
    assert results.send_delay_s is not None and results.send_delay_s.max == pytest.approx(3.0)


def test_a_failure_is_noted_and_the_rest_goes_on(jump: Jump, server: Server) -> None:
    fake = server()
    fake.fail = lambda number: Unavailable("draining") if number == 1 else None
    attempts = jump(closed_loop(fake, jobs(4), 1, {}, ignore))
    assert [item.status for item in attempts] == ["OK", "UNAVAILABLE", "OK", "OK"]
    assert attempts[1].error == "draining"
    assert attempts[1].latency_s == 1.0


def test_an_aborted_stream_has_not_completed(jump: Jump, server: Server) -> None:
    fake = server()
    fake.last = types_pb2.FINISH_REASON_ABORT
    (item,) = jump(closed_loop(fake, jobs(1), 1, {}, ignore))
    assert (item.status, item.ok) == ("ABORT", False)


def test_a_stream_without_an_end_has_not_completed(jump: Jump, server: Server) -> None:
    fake = server()
    fake.last = types_pb2.FINISH_REASON_UNSPECIFIED
    (item,) = jump(closed_loop(fake, jobs(1), 1, {}, ignore))
    assert item.status == "INCOMPLETE" and item.output_tokens == 3


def test_a_defect_of_ours_is_not_counted_as_the_servers(jump: Jump, server: Server) -> None:
    fake = server()
    fake.fail = lambda number: ZeroDivisionError()
    with pytest.raises(ExceptionGroup) as caught:
        jump(closed_loop(fake, jobs(1), 1, {}, ignore))
    assert caught.group_contains(ZeroDivisionError)
