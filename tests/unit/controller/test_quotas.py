"""What tenants may have: the file that says so, and the quotas in front of the engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phalanx.controller.quotas import MeteredEngine
from phalanx.controller.scheduling.request import FinishReason, TokenEvent
from phalanx.controller.tenants import TenantLimits, Tenants, read_tenants
from phalanx.protos.errors import ConfigError, InvalidArgument, ResourceExhausted
from phalanx.protos.sampling import SamplingParams
from phalanx.protos.steps import SampledToken

FILE = """
[tenants.team-a]
weight = 3
max_requests = 2
max_queued = 10
tokens_per_minute = 600
priorities = [-5, 5]

[others]
weight = 0.5
priorities = [0, 100]
"""


def test_the_file_gives_each_tenant_its_limits(tmp_path: Path) -> None:
    path = tmp_path / "tenants.toml"
    path.write_text(FILE)
    tenants = read_tenants(str(path))
    assert tenants.of("team-a") == TenantLimits(
        weight=3.0, max_requests=2, max_queued=10, tokens_per_minute=600, priorities=(-5, 5)
    )
    assert tenants.of("anybody") == TenantLimits(weight=0.5, priorities=(0, 100))
    assert read_tenants(None).of("anybody") == TenantLimits()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[tenants.a]\nweight = 0", "tenants.a: weight is 0"),
        ("[tenants.a]\nweight = nan", "tenants.a: weight is nan"),
        ("[tenants.a]\nweight = inf", "tenants.a: weight is inf"),
        ("[tenants.a]\nmax_requests = 0", "max_requests is 0, allowed: at least 1"),
        ("[tenants.a]\npriorities = [5, -5]", "priorities is .5, -5."),
        ("[tenants.a]\npriorities = [0, 1000]", "priorities"),
        ("[tenants.a]\nspeed = 1", "tenants.a: .*speed"),
        ("[tenant.a]\nweight = 1", "allowed are tables"),
        ("weight = ", "not TOML"),
    ],
)
def test_what_is_wrong_in_the_file_is_named(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "tenants.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        read_tenants(str(path))
    with pytest.raises(ConfigError, match="cannot be read"):
        read_tenants(str(tmp_path / "none"))


class Echo:
    """An engine that gives a sample as many tokens as it may have, one each time it is let."""

    def __init__(self) -> None:
        self.refuses = False

    async def submit(self, **given: Any) -> AsyncIterator[list[TokenEvent]]:
        if self.refuses:
            raise ResourceExhausted("max_queued of somebody", 1.0)
        most = given["params"].max_tokens
        for index in range(most):
            finish = FinishReason.LENGTH if index + 1 == most else None
            token = SampledToken(0, 7)
            yield [
                TokenEvent(
                    request_id="", sample_index=0, first_index=index, tokens=(token,), finish=finish
                )
            ]


class Scene:
    """A metered engine at a time that the test sets."""

    def __init__(self, **limits: Any) -> None:
        self.now, self.refused = 0.0, list[str]()
        self.inner = Echo()
        tenants = Tenants({"a": TenantLimits(**limits)})
        self.engine = MeteredEngine(self.inner, tenants, self, lambda: self.now)  # type: ignore[arg-type]

    def on_quota(self, quota: str) -> None:
        self.refused.append(quota)

    def ask(self, prompt: int = 1, output: int = 1, **given: Any) -> Any:
        return self.engine.submit(
            request_id="r",
            prompt_token_ids=[1] * prompt,
            params=SamplingParams(max_tokens=output),
            deadline=None,
            **({"tenant": "a"} | given),
        )

    async def all_of(self, *sizes: int, **given: Any) -> int:
        return sum([len(batch) async for batch in self.ask(*sizes, **given)])


def test_open_requests_are_bounded_and_an_ended_one_makes_room() -> None:
    async def work() -> None:
        scene = Scene(max_requests=2)
        first, second = scene.ask(1, 5), scene.ask(1, 5)
        await anext(first)
        await anext(second)
        with pytest.raises(ResourceExhausted, match="max_requests of tenant 'a'.* 2 may") as error:
            await scene.all_of()
        assert error.value.retry_after_s > 0 and scene.refused == ["max_requests"]
        assert await scene.all_of(tenant="b"), "nobody else is meant"
        await first.aclose()
        assert await scene.all_of()
        # what an earlier process has accepted is not refused
        third = scene.ask(1, 5)
        await anext(third)
        assert await scene.all_of(known={0: ()})

    asyncio.run(work())


def test_a_spent_minute_is_named_with_the_time_until_there_is_more() -> None:
    async def work() -> None:
        scene = Scene(tokens_per_minute=60)
        assert await scene.all_of(50, 30) == 30
        with pytest.raises(ResourceExhausted, match="tokens_per_minute of tenant 'a'") as error:
            await scene.all_of()
        assert error.value.retry_after_s == pytest.approx(21.0)
        scene.now = 20.0
        with pytest.raises(ResourceExhausted):
            await scene.all_of()
        scene.now = 21.0
        assert await scene.all_of() == 1

    asyncio.run(work())


@given(st.lists(st.tuples(st.floats(0, 30), st.integers(1, 80), st.integers(1, 80)), max_size=30))
def test_no_minute_gives_more_than_its_quota_and_the_requests_then_open(
    asked: list[tuple[float, int, int]],
) -> None:
    async def work() -> None:
        scene, spent = Scene(tokens_per_minute=100), 0
        for pause, prompt, output in asked:
            scene.now += pause
            try:
                await scene.all_of(prompt, output)
            except ResourceExhausted:
                continue
            spent += prompt + output
            assert spent <= 100 + scene.now * 100 / 60 + prompt + output

    asyncio.run(work())


def test_a_request_that_the_queue_refuses_costs_nothing() -> None:
    async def work() -> None:
        scene = Scene(tokens_per_minute=60, max_requests=1)
        scene.inner.refuses = True
        for _ in range(3):
            with pytest.raises(ResourceExhausted, match="max_queued"):
                await scene.all_of(59, 1)
        assert scene.refused == ["max_queued"] * 3
        scene.inner.refuses = False
        assert await scene.all_of(59, 1) == 1

    asyncio.run(work())


def test_a_priority_that_the_tenant_may_not_use_is_refused() -> None:
    async def work() -> None:
        scene = Scene(priorities=(0, 10))
        with pytest.raises(InvalidArgument, match=r"options.priority: -1 is not in \[0, 10\]"):
            await scene.all_of(priority=-1)
        assert await scene.all_of(priority=10)

    asyncio.run(work())
