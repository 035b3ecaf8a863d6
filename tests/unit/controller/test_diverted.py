"""Tokens that are handed over as they come, without a task in between, are the same tokens."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models

from phalanx.controller.journal.memory import MemoryJournal
from phalanx.controller.metrics import Metrics
from phalanx.controller.quotas import MeteredEngine
from phalanx.controller.scheduling.request import FinishReason, TokenEvent
from phalanx.controller.server.admission import Admitted
from phalanx.controller.server.sessions import Session, Sessions
from phalanx.controller.server.tokens import TokenTexts
from phalanx.controller.tenants import TenantLimits, Tenants
from phalanx.protos.errors import ResourceExhausted
from phalanx.protos.sampling import SamplingParams


def test_all_tokens_come_once_over_a_loss(played: Any) -> None:
    async def work() -> None:
        scene = played.Scene(2)
        first, second = await scene.start(0), await scene.start(1)
        events, task = scene.ask(n=2)
        await played.settle()
        first.step()
        await played.settle()
        scene.engine.divert("a", "default", events.append)
        first.step()
        first.step()
        await scene.lose(0)
        for _ in range(3):
            second.step()
            await played.settle()
        await task
        for sample in (0, 1):
            assert played.tokens(events, sample) == [10, 11, 12, 13, 14, 15]
        assert sum(event.finish is not None for event in events) == 2

    played.play(work)


def test_what_comes_behind_an_end_waits_for_it(played: Any) -> None:
    """A sample's end goes to the iterator; later tokens of another one do not overtake it."""

    async def work() -> None:
        scene = played.Scene(1)
        replica = await scene.start(0)
        events, task = scene.ask(n=2)
        await played.settle()
        replica.step()
        await played.settle()
        diverted: list[TokenEvent] = []
        scene.engine.divert("a", "default", diverted.append)
        one, other = list(replica.requests)
        for _ in range(4):
            replica.step(one)
        await played.settle()
        assert [event.first_index for event in diverted] == [1, 2, 3, 4]
        replica.step(one)
        replica.step(other)  # of the same turn of the loop
        await played.settle()
        assert [(event.sample_index, event.finish) for event in events[-2:]] == [
            (one[1], FinishReason.LENGTH),
            (other[1], None),
        ]
        replica.step(other)
        await played.settle()
        assert (diverted[-1].sample_index, diverted[-1].first_index) == (other[1], 2)
        task.cancel()

    played.play(work)


def test_who_cannot_take_ends_alone(played: Any) -> None:
    async def work() -> None:
        scene = played.Scene(1)
        replica = await scene.start(0)
        broken, first = scene.ask("broken")
        whole, second = scene.ask("whole")
        await played.settle()
        replica.step()
        await played.settle()

        def refuse(event: TokenEvent) -> None:
            raise ResourceExhausted("no more", 1.0)

        scene.engine.divert("broken", "default", refuse)
        scene.engine.divert("whole", "default", whole.append)
        for _ in range(5):
            if replica.requests:
                replica.step()
            await played.settle()
        with pytest.raises(ResourceExhausted, match="no more"):
            await first
        await second
        assert played.tokens(broken) == [10]
        assert played.tokens(whole) == [10, 11, 12, 13, 14, 15]
        assert len(replica.aborted) == 1

    played.play(work)


def test_a_reader_that_leaves_gets_nothing_more(played: Any) -> None:
    async def work() -> None:
        scene = played.Scene(1)
        replica = await scene.start(0)
        events, task = scene.ask()
        await played.settle()
        replica.step()
        await played.settle()
        scene.engine.divert("a", "default", events.append)
        replica.step()
        await played.settle()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        replica.step()
        await played.settle()
        assert played.tokens(events) == [10, 11]

    played.play(work)


def test_a_tenant_pays_for_them(played: Any) -> None:
    async def work() -> None:
        scene = played.Scene(1)
        replica = await scene.start(0)
        tenants = Tenants(others=TenantLimits(tokens_per_minute=3 + 4))
        metered = MeteredEngine(scene.engine, tenants, Metrics(), clock=lambda: 0.0)
        scene.engine, plain = metered, scene.engine
        events, task = scene.ask()
        await played.settle()
        replica.step()
        await played.settle()
        metered.divert("a", "default", events.append)
        for _ in range(2):
            replica.step()
        await played.settle()
        metered.check_room("default")
        replica.step()
        await played.settle()
        with pytest.raises(ResourceExhausted, match="tokens_per_minute"):
            metered.check_room("default")
        assert plain.abort("a", "default")
        await task

    played.play(work)


@pytest.mark.parametrize("stop", [(), ("never said",)])
def test_a_session_has_them_whoever_reads(played: Any, stop: tuple[str, ...]) -> None:
    """Also one that is over before its events are: an abort leaves no token behind it."""

    async def work() -> None:
        scene = played.Scene(2)
        first, second = await scene.start(0), await scene.start(1)
        tokenizer = Tokenizer(models.BPE())
        tokenizer.decoder = decoders.ByteLevel()
        sessions = Sessions(scene.engine, MemoryJournal(), TokenTexts(tokenizer))
        params = SamplingParams(max_tokens=6, temperature=0.0, stop=stop)

        def begin(name: str) -> Session:
            return sessions.open(Admitted(name, [1, 2], params, fingerprint=b"f"), "default", None)

        whole = begin("whole")
        await played.settle()
        for _ in range(3):
            first.step()
            await played.settle()
        await scene.lose(0)
        for _ in range(3):
            second.step()
            await played.settle()
        assert whole.complete
        assert played.tokens(whole.log) == [10, 11, 12, 13, 14, 15]
        cut = begin("cut")
        await played.settle()
        for _ in range(2):
            second.step()
            await played.settle()
        second.step()
        sessions.abort("cut", "default")
        await played.settle()
        assert cut.complete
        assert played.tokens(cut.log) == [10, 11]
        assert cut.log[-1].finish is FinishReason.ABORT

    played.play(work)
