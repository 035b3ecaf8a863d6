"""Who is taken, who is refused, in which order, and at which cost."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest

from phalanx.controller.scheduling.request import FinishReason, Request
from phalanx.controller.scheduling.scheduler import SchedulerConfig
from phalanx.protos.errors import (
    AlreadyExists,
    ConfigError,
    InvalidArgument,
    ResourceExhausted,
)
from phalanx.protos.sampling import SamplingParams

LoopFactory = Callable[..., Any]


def admission_order(loop: Any) -> list[str]:
    """Run to the end; the requests in the order in which they were first admitted."""
    names = {stream.request.params.seed: name for (name, _), stream in loop.streams.items()}
    order: list[str] = []
    while loop.scheduler.has_work:
        plan = loop.step()
        for new in plan.new if plan else ():
            if names[new.params.seed] not in order:
                order.append(names[new.params.seed])
    return order


@pytest.mark.parametrize(
    ("prompt", "params", "field"),
    [
        ([], {}, "prompt_token_ids"),
        ([1] * 128, {}, "prompt_token_ids"),
        ([-1], {}, "prompt_token_ids"),
        ([2**40], {}, "prompt_token_ids"),
        ([1], {"temperature": float("nan")}, "params.temperature"),
        ([1], {"max_tokens": -1}, "params.max_tokens"),
    ],
)
def test_what_cannot_be_computed_is_refused(
    make_loop: LoopFactory, prompt: list[int], params: dict[str, Any], field: str
) -> None:
    loop = make_loop()
    with pytest.raises(InvalidArgument) as caught:
        loop.add("a", prompt, **params)
    assert field in {violation.field for violation in caught.value.violations}
    assert not loop.scheduler.has_work
    loop.scheduler.check_integrity()


def test_a_prompt_that_the_pool_can_never_hold_is_refused(make_loop: LoopFactory) -> None:
    loop = make_loop(num_blocks=3, block_size=4)
    with pytest.raises(InvalidArgument, match="13 tokens, 1 to 12 allowed"):
        loop.add("a", [1] * 13)
    loop.add("b", [1] * 12)
    loop.run()
    assert len(loop.streams["b", 0].tokens) == 1


def test_samples_of_different_requests_are_no_group(make_loop: LoopFactory) -> None:
    def request(**given: Any) -> Request:
        base: dict[str, Any] = {"request_id": "a", "prompt_token_ids": [1], "arrival": 0.0}
        return Request(params=SamplingParams(), **(base | given))

    scheduler = make_loop().scheduler
    for group in (
        [],
        [request(), request(sample_index=1, request_id="b")],
        [request(), request(sample_index=1, prompt_token_ids=[2])],
        [request(), request(sample_index=1, tenant="other")],
        [request(), request()],
        [request(output_token_ids=[1] * 127)],
    ):
        with pytest.raises(InvalidArgument):
            scheduler.add(group)


def test_a_live_id_is_taken_and_a_finished_one_is_free(make_loop: LoopFactory) -> None:
    loop = make_loop()
    loop.add("a", [1], max_tokens=2)
    with pytest.raises(AlreadyExists, match="'a'"):
        loop.add("a", [1])
    loop.run()
    loop.scheduler.add(
        [
            loop.streams["a", 0].request.__class__(
                request_id="a", prompt_token_ids=[1], params=SamplingParams(), arrival=0.0
            )
        ]
    )


def test_a_full_queue_refuses_with_a_time_to_come_back(make_loop: LoopFactory) -> None:
    loop = make_loop(max_queued=2, max_running=1)
    loop.add("running", [1], max_tokens=3, ignore_eos=True)
    loop.now = 7.0
    loop.step()
    loop.add("b", [1], max_tokens=1)
    loop.add("c", [1], max_tokens=1)
    with pytest.raises(ResourceExhausted) as caught:
        loop.add("d", [1])
    assert caught.value.retry_after_s == 7.0, "as long as the last one waited"
    loop.run()
    loop.add("d", [1], max_tokens=1)
    loop.run()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_running", 0),
        ("max_tokens_per_step", 7),
        ("max_context", 1),
        ("max_in_flight", 0),
        ("max_preemptions", -1),
        ("max_queued", 0),
        ("reserve_tokens", -1),
    ],
)
def test_a_contradictory_configuration_is_refused(field: str, value: int) -> None:
    good: dict[str, Any] = {
        "max_tokens_per_step": 8,
        "max_running": 8,
        "max_queued": 1,
        "max_context": 2,
        "eos_token_ids": (),
    }
    SchedulerConfig(**good)
    with pytest.raises(ConfigError, match=field):
        SchedulerConfig(**(good | {field: value}))


def test_nobody_overtakes_a_head_that_does_not_fit(make_loop: LoopFactory) -> None:
    loop = make_loop(num_blocks=16, block_size=4, max_tokens_per_step=64, prefix_caching=False)
    loop.add("early", [1] * 30, max_tokens=8, ignore_eos=True)
    loop.step()
    loop.add("large", [1] * 40, max_tokens=8, ignore_eos=True)
    for index in range(6):
        loop.add(f"small{index}", [1], max_tokens=2, ignore_eos=True)
    loop.step()
    assert loop.scheduler.num_running == 1
    order = admission_order(loop)
    assert order == ["large", *(f"small{index}" for index in range(6))]


def test_expiry_in_the_queue_computes_nothing(make_loop: LoopFactory) -> None:
    loop = make_loop(max_running=1)
    loop.add("runs", [1], max_tokens=20, ignore_eos=True, deadline=9.0)
    loop.step()
    loop.add("waits", [1], max_tokens=20, deadline=5.0, seed=77, n=2)
    loop.add("patient", [1], max_tokens=2)
    loop.now = 4.9
    assert loop.scheduler.expire(loop.now) == []
    loop.now = 5.0
    loop.feed(loop.scheduler.expire(loop.now))
    for index in range(2):
        assert loop.streams["waits", index].finish is FinishReason.DEADLINE
    loop.step()
    loop.now = 9.5
    loop.feed(loop.scheduler.expire(loop.now))
    running = loop.streams["runs", 0]
    assert running.finish is FinishReason.DEADLINE and running.tokens
    loop.run()
    assert (77, 0) not in loop.rank.computed and (77, 1) not in loop.rank.computed


def test_a_deadline_does_not_outlive_its_request(make_loop: LoopFactory) -> None:
    loop = make_loop()
    loop.add("a", [1], deadline=5.0)
    loop.feed(loop.scheduler.abort("a"))
    loop.add("a", [1], deadline=6.5, max_tokens=40, ignore_eos=True)
    assert loop.scheduler.expire(6.0) == []
    assert len(loop.scheduler.expire(6.5)) == 1


def test_abort_works_anywhere(make_loop: LoopFactory) -> None:
    loop = make_loop(max_running=2, num_blocks=16)
    for index in range(6):
        loop.add(f"r{index}", [1] * 4, max_tokens=20, ignore_eos=True)
    loop.send()
    for name in ("r3", "r0", "r5"):
        (event,) = loop.scheduler.abort(name)
        loop.feed([event])
        assert event.finish is FinishReason.ABORT
        assert loop.scheduler.abort(name) == []
    assert loop.scheduler.abort("unknown") == []
    assert admission_order(loop) == ["r2", "r4"]
    assert loop.streams["r0", 0].tokens == [], "a result after the abort is dropped"
    loop.run()


def bytecodes_of(function: Callable[[], object]) -> int:
    """How many bytecodes a call executes, in all the functions that it calls."""
    executed = 0

    def count(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal executed
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        executed += event == "opcode"
        return count

    before = sys.gettrace()
    sys.settrace(count)
    try:
        function()
    finally:
        sys.settrace(before)
    return executed


def cost_of_a_turn(make_loop: LoopFactory, queued: int) -> dict[str, int]:
    loop = make_loop(num_blocks=256, max_running=4, max_context=64)
    for index in range(queued):
        loop.add(f"r{index}", [index % 7] * 5, ignore_eos=True, deadline=1e6 + index)
    loop.step()
    scheduler = loop.scheduler
    costs = {"expire": bytecodes_of(lambda: scheduler.expire(5.0))}
    plans: list[Any] = []
    costs["schedule"] = bytecodes_of(lambda: plans.append(scheduler.schedule(5.0)))
    result = loop.rank.execute(plans[0])
    costs["update"] = bytecodes_of(lambda: scheduler.update(result))
    costs["abort"] = bytecodes_of(lambda: scheduler.abort(f"r{queued // 2}"))
    costs["admit"] = bytecodes_of(lambda: scheduler.abort("r0")) + bytecodes_of(
        lambda: plans.append(scheduler.schedule(5.0))
    )
    costs["stats"] = bytecodes_of(scheduler.stats)
    return costs


def test_a_turn_costs_the_same_however_many_wait(make_loop: LoopFactory) -> None:
    assert cost_of_a_turn(make_loop, 10_000) == cost_of_a_turn(make_loop, 20)


def test_ended_requests_leave_no_deadlines_behind(make_loop: LoopFactory) -> None:
    loop = make_loop()
    for index in range(5_000):
        loop.add(f"r{index}", [1], deadline=1e9)
        loop.feed(loop.scheduler.abort(f"r{index}"))
    assert len(loop.scheduler._deadlines) < 200
