"""Requests that outlive their server, by its journal, and clients that find it again."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from phalanx.controller.client import AsyncClient, Client
from phalanx.controller.journal.file import JournalFile
from phalanx.controller.journal.writer import DurableJournal
from phalanx.protos.errors import (
    AlreadyExists,
    Unavailable,
)


@contextlib.asynccontextmanager
async def life(serve: Any, script: Any, folder: Path, **options: Any) -> AsyncIterator[Any]:
    """A server with a journal that ends as if it were killed: nobody is told anything."""
    file = JournalFile(folder, wait_s=5)
    journal = DurableJournal(file, keep_s=60, keep_bytes=2**20)
    journal.adopt("tiny")
    async with serve(script, service={"journal": journal}, **options) as served:
        served.recovered = served.service.recover()
        yield served
        served.service.close()
    await journal.close()


def test_a_new_process_goes_on_with_what_the_journal_has(
    serve: Any, tmp_path: Path, pacer: Any, read_tokens: Any, resumed: Any, play: Any
) -> None:
    """Samples at different places, log-probabilities, a stop string, a deadline, the same seed."""

    async def main() -> None:
        paced = pacer()
        paced.allow(4)
        requests = {
            "two": {"n": 2, "logprobs": 1},
            "stopped": {"stop": [chr(51) + "?"], "max_tokens": 9},
            "late": {"max_tokens": 7},
        }
        streams = []
        async with life(serve, paced, tmp_path / "journal") as served:
            for name, params in requests.items():
                client = AsyncClient(served.address, timeout=1.0 if name == "late" else 60)
                streams.append(client.generate("a", request_id=name, **params))
                await read_tokens(streams[-1], 4)
            before = served.engine.submissions
        async with life(serve, paced, tmp_path / "journal") as served:
            assert served.recovered == 3
            await asyncio.sleep(0.05)
            after = served.engine.submissions
            for old, new in zip(before, after, strict=True):
                assert (new.request_id, new.params) == (old.request_id, old.params)
                assert new.prompt_token_ids == old.prompt_token_ids
                assert set(new.known.values()) == {(50, 51, 52, 53)}
                assert (old.deadline is None) == (new.deadline is None)
                if old.deadline is not None and new.deadline is not None:
                    assert abs(old.deadline - new.deadline) < 0.2
            paced.allow(10)
            tokens, _, scores, usage = await resumed(served.client, "two", 2, 3)
            assert tokens == [52 + place for place in range(8)]
            assert scores == [-2.5 - place for place in range(8)]
            assert usage.completion_tokens == 20
            with pytest.raises(AlreadyExists):
                await served.client.complete("b", request_id="two")
        async with life(serve, paced, tmp_path / "journal") as served:
            assert served.recovered == 0  # all had ended
            assert len((await resumed(served.client, "two"))[0]) == 10
            assert not served.engine.submissions

    play(main)


def test_the_clients_resume_by_themselves(
    serve: Any, tmp_path: Path, pacer: Any, play: Any
) -> None:
    """The server ends and comes back on its port, twice: their iterators just go on."""

    async def main() -> None:
        paced = pacer(30)
        options: dict[str, Any] = {}
        answers: list[asyncio.Task[Any]] = []
        async with contextlib.AsyncExitStack() as clients:
            for turn in range(3):
                paced.allow(10 * turn + 10)
                async with life(serve, paced, tmp_path / "journal", **options) as served:
                    if not turn:
                        options = {"port": int(served.address.rpartition(":")[2])}
                        client = await clients.enter_async_context(
                            AsyncClient(served.address, timeout=60)
                        )
                        blocking = clients.enter_context(Client(served.address, timeout=60))
                        answers += [
                            asyncio.create_task(client.complete("a", logprobs=1, n=2)),
                            asyncio.create_task(asyncio.to_thread(blocking.ask, "a")),
                        ]
                    if turn == 2:
                        first, second = await asyncio.gather(*answers)
                    await asyncio.sleep(0.3)
        for answer in (first, second):
            assert answer.token_ids == tuple(range(50, 80))
            assert answer.text
        assert [item.token.logprob for item in first.samples[1].logprobs] == [
            -0.5 - place for place in range(30)
        ]
        assert first.usage.completion_tokens == 60

    play(main)


def test_a_lost_journal_ends_streams_and_refuses_requests(
    serve: Any, tmp_path: Path, eventually: Any, pacer: Any, read_tokens: Any, play: Any
) -> None:
    """Nothing is sent that is not durable."""

    async def main() -> None:
        paced = pacer()
        paced.allow(2)
        async with life(serve, paced, tmp_path / "journal") as served:
            call = served.client.generate("a", request_id="mine")
            await read_tokens(call, 2)
            with contextlib.closing(sqlite3.connect(tmp_path / "journal/journal.sqlite3")) as thief:
                thief.execute("UPDATE meta SET value = value + 1 WHERE key = 'epoch'")
                thief.commit()
            paced.allow(10)
            with pytest.raises(Unavailable, match="journal"):
                await anext(call)
            with pytest.raises(Unavailable, match="journal"):
                await served.client.complete("b", request_id="other")
            await eventually(served.engine.submissions[0].closed.is_set)

    play(main)
