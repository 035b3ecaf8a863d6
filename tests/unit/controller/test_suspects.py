"""Requests that ranks may have died of: found, set aside, or cleared."""

from __future__ import annotations

from typing import Any

import pytest

from phalanx.controller.scheduling.probation import Computing
from phalanx.controller.stream import SET_ASIDE_AFTER_LOSSES
from phalanx.protos.errors import SetAside


@pytest.mark.parametrize(("crashed", "deaths"), [(True, 2), (False, SET_ASIDE_AFTER_LOSSES)])
def test_a_request_whose_ranks_die_again_and_again_is_set_aside_and_others_are_not(
    played: Any, crashed: bool, deaths: int
) -> None:
    async def work() -> None:
        scene = played.Scene(1)
        replica = await scene.start(0)
        _, poison_task = scene.ask("poison")
        innocent, innocent_task = scene.ask("innocent", max_tokens=40)
        await played.settle()
        count = 0
        while any(request.params.max_tokens == 6 for request in replica.requests.values()):
            assert count < deaths
            await scene.lose(0, crashed=crashed)
            count += 1
            replica = await scene.start(0)
            await played.settle()
        assert count == deaths
        while not innocent_task.done():
            scene.engine.tick(0.0)
            await played.settle()
            for key, request in list(replica.requests.items()):
                if request.params.max_tokens == 40:
                    replica.step(key)
        await innocent_task
        assert len(played.tokens(innocent)) == 40
        with pytest.raises(SetAside):
            await poison_task
        with pytest.raises(SetAside):  # nor does it kill again under another name
            await scene.ask("again")[1]
        _, other = scene.ask("other", max_tokens=7)
        await played.settle()
        other.cancel()

    played.play(work)


def test_who_was_not_being_computed_is_not_suspected(played: Any) -> None:
    async def work() -> None:
        scene = played.Scene(1)
        replica = await scene.start(0)
        scene.ask("computed")
        _, waiting = scene.ask("waiting", max_tokens=9)
        await played.settle()
        [name] = [key[0] for key, item in replica.requests.items() if item.params.max_tokens == 6]
        scene.replicas[0].__class__ = type(
            "Busy", (played.PlayedReplica,), {"computing": Computing(frozenset([name]))}
        )
        await scene.lose(0, crashed=True)
        replica = await scene.start(0)
        await played.settle()
        probation = {item.params.max_tokens: item.probation for item in replica.requests.values()}
        assert probation[6] > 0 == probation[9]
        waiting.cancel()

    played.play(work)


def test_a_suspect_that_gives_tokens_is_none_any_more(played: Any) -> None:
    async def work() -> None:
        scene = played.Scene(1)
        replica = await scene.start(0)
        events, task = scene.ask(max_tokens=20)
        for _ in range(3):
            await played.settle()
            await scene.lose(0, crashed=True)
            replica = await scene.start(0)
            await played.settle()
            [request] = replica.requests.values()
            assert request.probation
            for _ in range(8):
                if replica.requests:
                    replica.step()
        await task
        assert len(played.tokens(events)) == 20

    played.play(work)
