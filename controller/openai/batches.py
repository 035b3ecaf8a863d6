"""Several prompts in one HTTP request: a request of the service for each, answered together."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from phalanx.controller.server.answer import Response
from phalanx.controller.server.books import Counting, Reader
from phalanx.protos.errors import InvalidArgument

from .requests import Asked

Call = Callable[[Any, Reader, str], Awaitable[None]]


async def answer_all(asked: Asked, call: Call, reader: Reader, tenant: str) -> None:
    """Write the answers to all prompts to `reader`; samples are numbered through.

    The first error ends all of them, and is raised.
    """
    if len(asked.messages) == 1:
        return await _answer(asked, 0, call, reader, tenant)
    turn = asyncio.Lock()
    try:
        async with asyncio.TaskGroup() as tasks:
            for at in range(len(asked.messages)):
                part = _Part(reader, at * asked.samples, turn)
                tasks.create_task(_answer(asked, at, call, part, tenant))
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None


async def _answer(asked: Asked, at: int, call: Call, reader: Reader, tenant: str) -> None:
    try:
        await call(asked.messages[at], reader, tenant)
    except InvalidArgument as error:
        raise asked.renamed(error, at) from None


class _Part:
    """One prompt's share of the answer."""

    def __init__(self, reader: Reader, first: int, turn: asyncio.Lock) -> None:
        self._reader, self._first, self._turn = reader, first, turn

    def time_remaining(self) -> float | None:
        return self._reader.time_remaining()

    def admitted(self, prompt_tokens: int) -> None:
        if isinstance(self._reader, Counting):
            self._reader.admitted(prompt_tokens)

    async def write(self, message: Response) -> None:
        for delta in message.samples:
            delta.index += self._first
        async with self._turn:
            await self._reader.write(message)
