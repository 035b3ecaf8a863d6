"""The HTTP front beside the gRPC server, on the same engine, with OpenAI's own client of it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import pytest

from phalanx.controller.openai.host import OpenAIHost
from phalanx.controller.scheduling.request import FinishReason


@dataclass
class Front:
    """Both fronts of one service: `served` has the gRPC one."""

    served: Any
    host: OpenAIHost
    client: openai.AsyncOpenAI
    http: httpx.AsyncClient
    """Without the library's checks; its paths begin after /v1."""

    @property
    def submissions(self) -> list[Any]:
        found: list[Any] = self.served.engine.submissions
        return found


@pytest.fixture
def front(serve: Any) -> Callable[..., Any]:
    """Factory: `async with front(script, token=..., verify=..., **host_options) as made`."""

    @contextlib.asynccontextmanager
    async def start(
        script: Any,
        *,
        token: str = "none",
        verify: Any = True,
        service: dict[str, Any] | None = None,
        model: Any = None,
        **options: Any,
    ) -> AsyncIterator[Front]:
        chosen = {} if model is None else {"model": model}
        async with serve(script, service=service, **chosen) as served:
            host = OpenAIHost(served.service, **options)
            await host.start()
            own = openai.DefaultAsyncHttpxClient(verify=verify)
            headers = {"Authorization": f"Bearer {token}"}
            try:
                async with (
                    openai.AsyncOpenAI(
                        base_url=host.url,
                        api_key=token,
                        max_retries=0,
                        timeout=30,
                        http_client=own,
                    ) as client,
                    httpx.AsyncClient(
                        base_url=host.url, headers=headers, verify=verify, timeout=30
                    ) as http,
                ):
                    yield Front(served, host, client, http)
            finally:
                await host.stop(0.0)

    return start


@pytest.fixture
def endless() -> Any:
    """A script: a token every few milliseconds, until aborted or closed."""

    async def script(submission: Any) -> AsyncIterator[list[Any]]:
        first = 0
        while not submission.aborted.is_set():
            yield [submission.event([50], first)]
            first += 1
            await asyncio.sleep(0.002)
        yield [submission.event((), first, finish=FinishReason.ABORT)]

    return script
