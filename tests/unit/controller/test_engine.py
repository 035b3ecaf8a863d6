"""Streams and the replicas under them, the replicas played by the test."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from phalanx.controller.scheduling.request import FinishReason
from phalanx.protos.errors import AlreadyExists, ResourceExhausted, Unavailable


def test_a_stream_goes_on_at_another_replica_where_it_stood(played: Any) -> None:
    async def work() -> None:
        scene = played.Scene(2)
        first, second = await scene.start(0), await scene.start(1)
        events, task = scene.ask(n=2)
        await played.settle()
        first.step()
        first.step()
        await scene.lose(0)
        assert [request.output_token_ids for request in second.requests.values()] == [[10, 11]] * 2
        for _ in range(4):
            second.step()
        await task
        for sample in (0, 1):
            assert played.tokens(events, sample) == [10, 11, 12, 13, 14, 15]
        assert sum(event.finish is not None for event in events) == 2

    played.play(work)


def test_without_a_live_replica_streams_wait_and_new_requests_are_refused(played: Any) -> None:
    async def work() -> None:
        scene = played.Scene(1)
        first = await scene.start(0)
        events, task = scene.ask()
        await played.settle()
        first.step()
        await scene.lose(0)
        assert not scene.engine.serving
        with pytest.raises(Unavailable):
            await scene.ask("b")[1]
        again = await scene.start(0)
        await played.settle()
        for _ in range(5):
            again.step()
        await task
        assert played.tokens(events) == [10, 11, 12, 13, 14, 15]

    played.play(work)


def test_late_events_of_a_lost_replica_are_nobodys(played: Any) -> None:
    async def work() -> None:
        scene = played.Scene(2)
        first, second = await scene.start(0), await scene.start(1)
        events, task = scene.ask()
        await played.settle()
        await scene.lose(0)
        first.step()  # a zombie
        await played.settle()
        for _ in range(6):
            second.step()
        await task
        assert played.tokens(events) == [10, 11, 12, 13, 14, 15]

    played.play(work)


def test_a_full_queue_refuses_new_requests_and_never_those_accepted_before(played: Any) -> None:
    async def work() -> None:
        scene = played.Scene(2)
        first, second = await scene.start(0), await scene.start(1)
        events, task = scene.ask()
        await played.settle()
        first.step()
        second.refusal = first.refusal = ResourceExhausted("the queue is full", 1.0)
        with pytest.raises(ResourceExhausted):
            await scene.ask("b")[1]
        await scene.lose(0)
        for _ in range(5):
            second.step()
        await task
        assert played.tokens(events) == [10, 11, 12, 13, 14, 15]

    played.play(work)


def test_a_full_queue_is_told_at_the_door(played: Any) -> None:
    async def work() -> None:
        scene = played.Scene(1)
        replica = await scene.start(0)
        scene.engine.check_room("default")
        _, first = scene.ask("a", n=2)
        _, second = scene.ask("b")
        await played.settle()
        with pytest.raises(ResourceExhausted, match="3 samples wait, 2 may"):
            scene.engine.check_room("default")
        scene.engine.check_room("another")
        replica.running = 2
        scene.engine.check_room("default")
        replica.running = 0
        for _ in range(6):
            replica.step()
        await asyncio.gather(first, second)
        scene.engine.check_room("default")
        await scene.lose(0)
        with pytest.raises(Unavailable):
            scene.engine.check_room("default")

    played.play(work)


def test_a_reader_that_leaves_frees_its_request_at_once(played: Any) -> None:
    async def work() -> None:
        scene = played.Scene(1)
        replica = await scene.start(0)
        _, task = scene.ask()
        await played.settle()
        [(name, _)] = replica.requests
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await played.settle()
        assert name in replica.aborted
        events, again = scene.ask()  # the id is free at once
        await played.settle()
        for _ in range(6):
            replica.step()
        await again
        assert len(played.tokens(events)) == 6

    played.play(work)


def test_ids_are_taken_while_a_request_runs_and_per_tenant(played: Any) -> None:
    async def work() -> None:
        scene = played.Scene(1)
        await scene.start(0)
        _, task = scene.ask("same")
        await played.settle()
        with pytest.raises(AlreadyExists):
            await scene.ask("same")[1]
        assert not scene.engine.abort("same", "somebody else")
        assert scene.engine.abort("same", "default")
        await task

    played.play(work)


def test_abort_works_while_no_replica_has_the_request(played: Any) -> None:
    async def work() -> None:
        scene = played.Scene(1)
        await scene.start(0)
        events, task = scene.ask()
        await played.settle()
        await scene.lose(0)
        assert scene.engine.abort("a", "default")
        await task
        assert events[-1].finish is FinishReason.ABORT

    played.play(work)
