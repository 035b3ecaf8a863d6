"""Requests that outlive their calls: ids, joining, resuming, grace, and the client that does it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import grpc
import pytest

from phalanx.controller.client import AsyncClient, Client
from phalanx.controller.journal.file import JournalFile
from phalanx.controller.journal.writer import DurableJournal
from phalanx.controller.scheduling.request import FinishReason, TokenEvent
from phalanx.protos.errors import (
    AlreadyExists,
    DeadlineExceeded,
    InvalidArgument,
    NotFound,
    RequestFailed,
    ResourceExhausted,
    StreamLost,
    Unavailable,
)
from phalanx.protos.steps import SampledToken, TokenLogprob
from phalanx.protos.v1 import serving_pb2

Batches = AsyncIterator[list[TokenEvent]]
RESUMING = {"reconnect_s": 20.0}


class Pacer:
    """A script whose tokens come when the test lets them: token i of a sample is 50 + i."""

    def __init__(self, tokens: int = 10) -> None:
        self.tokens, self.allowed = tokens, 0
        self._news = asyncio.Event()

    def allow(self, count: int) -> None:
        self.allowed = count
        self._news.set()
        self._news = asyncio.Event()

    async def __call__(self, submission: Any) -> Batches:
        known = submission.known or {index: () for index in range(submission.params.n)}
        for first in range(min(map(len, known.values())), self.tokens):
            while first >= self.allowed:
                await self._news.wait()
            last = {"finish": FinishReason.LENGTH} if first + 1 == self.tokens else {}
            yield [
                submission.event([self.token(first)], first, sample_index=index, **last)
                for index in known
                if first >= len(known[index])
            ]

    @staticmethod
    def token(first: int) -> SampledToken:
        score = TokenLogprob(50 + first, -0.5 - first, 1)
        return SampledToken(seq=0, token_id=50 + first, logprob=score, top=[score])


def play(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(work(), 40))


async def read_tokens(stream: Any, count: int) -> None:
    """Read until so many tokens of sample 0 have come."""
    while count > 0:
        count -= len((await anext(stream)).samples[0].token_ids)


async def resumed(client: AsyncClient, request_id: str, *next_index: int) -> Any:
    """(tokens, text, log-probabilities, usage) of sample 0, as `Resume` gives them."""
    request = serving_pb2.ResumeRequest(request_id=request_id, next_index=next_index)
    tokens, text, scores, usage = [], "", [], None
    async for message in client._stub.Resume(request, timeout=10, metadata=client._metadata):
        for sample in message.samples:
            if sample.index == 0:
                tokens += sample.token_ids
                text += sample.text
                scores += [item.token.logprob for item in sample.logprobs]
        usage = message.usage if message.HasField("usage") else usage
    return tokens, text, scores, usage


async def status_of(client: AsyncClient, request_id: str, *next_index: int) -> Any:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await resumed(client, request_id, *next_index)
    return caught.value.code(), caught.value.details()


def test_resume_from_every_index_gives_the_rest(
    serve: Any, words: list[int], say: Any, served_model: Any
) -> None:
    """Of a finished request and of one that runs."""

    async def main() -> None:
        pacer = Pacer()
        for script in (say(words), pacer):
            pacer.allow(0)
            async with serve(script, client=RESUMING) as served:
                asking = asyncio.create_task(
                    served.client.complete("a", request_id="mine", logprobs=1, stop=["\x00"])
                )
                await asyncio.sleep(0.05)
                if script is not pacer:
                    await asking
                readers = [
                    asyncio.create_task(resumed(served.client, "mine", start))
                    for start in range(len(words) if script is not pacer else 11)
                ]
                await asyncio.sleep(0.05)
                pacer.allow(10)
                whole = await asking
                for start, (tokens, text, scores, usage) in enumerate(
                    await asyncio.gather(*readers)
                ):
                    assert tuple(tokens) == whole.token_ids[start:]
                    before = served_model.tokenizer.decode(list(whole.token_ids[:start]))
                    assert before + text == whole.text
                    assert len(scores) in (0, len(tokens))
                    assert usage == whole.usage

    play(main)


def test_the_same_id_with_the_same_body_runs_once(serve: Any) -> None:
    """Both at once, and again when it has ended; the drawn seed is the first one's."""

    async def main() -> None:
        pacer = Pacer()
        async with serve(pacer, client=RESUMING) as served:
            asking = [
                asyncio.create_task(served.client.complete("a", request_id="mine", n=2))
                for _ in range(5)
            ]
            await asyncio.sleep(0.1)
            pacer.allow(10)
            answers = [await task for task in asking]
            answers.append(await served.client.complete("a", request_id="mine", n=2))
            assert len(served.engine.submissions) == 1
            assert len({answer.seed for answer in answers}) == 1
            for answer in answers:
                assert [list(sample.token_ids) for sample in answer.samples] == [
                    [50 + place for place in range(10)]
                ] * 2

    play(main)


@pytest.mark.parametrize("ended", [False, True])
def test_another_body_is_refused_and_another_tenant_is_another_world(
    serve: Any, token_file: str, ended: bool
) -> None:
    async def main() -> None:
        pacer = Pacer()
        async with serve(pacer, token="r-1", client=RESUMING, token_file=token_file) as served:
            pacer.allow(10 if ended else 3)
            asking = asyncio.create_task(served.client.complete("a", request_id="mine", seed=1))
            await asyncio.sleep(0.1)
            assert asking.done() is ended
            for prompt, params in (("b", {"seed": 1}), ("a", {"seed": 2}), ("a", {})):
                with pytest.raises(AlreadyExists, match="mine"):
                    await served.client.complete(prompt, request_id="mine", **params)
            with pytest.raises(AlreadyExists):
                await served.client.ask("a", request_id="mine", seed=1)
            async with AsyncClient(served.address, token="b", timeout=10) as blue:
                foreign = await status_of(blue, "mine")
                assert foreign[0] is grpc.StatusCode.NOT_FOUND
                # nothing tells a foreign id from one that nobody has
                assert foreign[1].replace("mine", "X") == (await status_of(blue, "none"))[
                    1
                ].replace("none", "X")
                with pytest.raises(NotFound):
                    await blue.abort("mine")
                pacer.allow(10)
                await blue.complete("b", request_id="mine")  # its own
            assert (await asking).token_ids == tuple(50 + place for place in range(10))
            async with AsyncClient(served.address, token="r-2", timeout=10) as red:
                assert (await resumed(red, "mine", 7))[0] == [57, 58, 59]

    play(main)


def test_bad_resumes_are_named(serve: Any, say: Any) -> None:
    async def main() -> None:
        async with serve(say([50]), client=RESUMING) as served:
            await served.client.complete("a", request_id="mine")
            for request_id, starts in (("", ()), ("a b", ()), ("mine", (0, 0)), ("mine", (0,) * 9)):
                code, text = await status_of(served.client, request_id, *starts)
                assert code is grpc.StatusCode.INVALID_ARGUMENT
                assert ("next_index" if starts else "request_id") in text

    play(main)


def test_without_an_id_a_dropped_request_ends_at_once_and_with_one_after_its_grace(
    serve: Any, eventually: Any
) -> None:
    async def main() -> None:
        pacer = Pacer(100)
        pacer.allow(3)
        async with serve(pacer, service={"grace_s": 2.0}) as served:
            calls = [
                served.client._stub.Generate(
                    serving_pb2.GenerateRequest(text="a", request_id=request_id)
                )
                for request_id in ("", "back", "gone")
            ]
            for call in calls:
                await call.read()
            asked = {item.request_id: item for item in served.engine.submissions}
            back, gone = asked.pop("back"), asked.pop("gone")
            [nameless] = asked.values()
            for call in calls:
                call.cancel()
            await eventually(nameless.closed.is_set)
            assert not back.closed.is_set()
            returned = served.client._stub.Resume(serving_pb2.ResumeRequest(request_id="back"))
            await returned.read()
            await eventually(gone.closed.is_set)
            assert not back.closed.is_set()
            pacer.allow(5)
            tokens, _, _, usage = await resumed(served.client, "gone")
            assert tokens == [50, 51, 52]
            assert usage.completion_tokens == 3
            pacer.allow(100)
            assert len((await resumed(served.client, "back"))[0]) == 100
            returned.cancel()

    play(main)


def test_a_reader_that_leaves_on_purpose_frees_its_request_at_once(
    serve: Any, eventually: Any
) -> None:
    """By leaving the loop, by cancelling the task, by closing the client; no grace runs out."""

    async def leave(served: Any, how: str) -> None:
        async with AsyncClient(served.address, timeout=30) as client:
            stream = client.generate("a")
            await anext(stream)
            if how == "loop":
                await stream.aclose()
            elif how == "task":
                task = asyncio.ensure_future(anext(stream))
                await asyncio.sleep(0.05)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        with contextlib.suppress(Exception, asyncio.CancelledError):
            await stream.aclose()

    async def main() -> None:
        pacer = Pacer(100)
        pacer.allow(1)
        async with serve(pacer) as served:
            for how in ("loop", "task", "client"):
                await leave(served, how)
            await eventually(
                lambda: all(item.closed.is_set() for item in served.engine.submissions)
            )
            assert len(served.engine.submissions) == 3

    play(main)


def test_a_refused_request_leaves_its_id_free_and_a_failed_one_does_not(serve: Any) -> None:
    async def main() -> None:
        turns = iter([ResourceExhausted("full", 0.01), None, RequestFailed("broken")])

        async def script(submission: Any) -> Batches:
            error = next(turns)
            if isinstance(error, ResourceExhausted):
                raise error
            yield [submission.event([50])]
            if error is not None:
                raise error
            yield [submission.event([51], 1, finish=FinishReason.LENGTH)]

        async with serve(script, client=RESUMING) as served:
            with pytest.raises(ResourceExhausted):
                await served.client.complete("a", request_id="one")
            assert (await served.client.complete("a", request_id="one")).token_ids == (50, 51)
            for _ in range(2):
                with pytest.raises(RequestFailed, match="broken"):
                    await served.client.complete("a", request_id="two")
            assert len(served.engine.submissions) == 3

    play(main)


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


def test_a_new_process_goes_on_with_what_the_journal_has(serve: Any, tmp_path: Path) -> None:
    """Samples at different places, log-probabilities, a stop string, a deadline, the same seed."""

    async def main() -> None:
        pacer = Pacer()
        pacer.allow(4)
        requests = {
            "two": {"n": 2, "logprobs": 1},
            "stopped": {"stop": [chr(51) + "?"], "max_tokens": 9},
            "late": {"max_tokens": 7},
        }
        streams = []
        async with life(serve, pacer, tmp_path / "journal") as served:
            for name, params in requests.items():
                client = AsyncClient(served.address, timeout=1.0 if name == "late" else 60)
                streams.append(client.generate("a", request_id=name, **params))
                await read_tokens(streams[-1], 4)
            before = served.engine.submissions
        async with life(serve, pacer, tmp_path / "journal") as served:
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
            pacer.allow(10)
            tokens, _, scores, usage = await resumed(served.client, "two", 2, 3)
            assert tokens == [52 + place for place in range(8)]
            assert scores == [-2.5 - place for place in range(8)]
            assert usage.completion_tokens == 20
            with pytest.raises(AlreadyExists):
                await served.client.complete("b", request_id="two")
        async with life(serve, pacer, tmp_path / "journal") as served:
            assert served.recovered == 0  # all had ended
            assert len((await resumed(served.client, "two"))[0]) == 10
            assert not served.engine.submissions

    play(main)


def test_the_clients_resume_by_themselves(serve: Any, tmp_path: Path) -> None:
    """The server ends and comes back on its port, twice: their iterators just go on."""

    async def main() -> None:
        pacer = Pacer(30)
        options: dict[str, Any] = {}
        answers: list[asyncio.Task[Any]] = []
        async with contextlib.AsyncExitStack() as clients:
            for turn in range(3):
                pacer.allow(10 * turn + 10)
                async with life(serve, pacer, tmp_path / "journal", **options) as served:
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


def test_a_client_says_plainly_that_it_gave_up(serve: Any) -> None:
    async def main() -> None:
        pacer = Pacer()
        pacer.allow(3)
        async with serve(pacer) as served:
            patient = AsyncClient(served.address, reconnect_s=0.5)
            hasty = AsyncClient(served.address, reconnect_s=30.0, timeout=1.0)
            streams = [client.generate("a", request_id="mine") for client in (patient, hasty)]
            for stream in streams:
                await read_tokens(stream, 3)
            served.service.close()
        with pytest.raises(StreamLost, match=r"within 0\.5 s, .*'mine', .* 3 tokens have come"):
            await anext(streams[0])
        with pytest.raises(DeadlineExceeded):
            await anext(streams[1])
        await patient.close()
        await hasty.close()

    play(main)


def test_a_lost_journal_ends_streams_and_refuses_requests(
    serve: Any, tmp_path: Path, eventually: Any
) -> None:
    """Nothing is sent that is not durable."""

    async def main() -> None:
        pacer = Pacer()
        pacer.allow(2)
        async with life(serve, pacer, tmp_path / "journal") as served:
            call = served.client.generate("a", request_id="mine")
            await read_tokens(call, 2)
            thief = JournalFile.__new__(JournalFile)
            thief._write = __import__("sqlite3").connect(tmp_path / "journal" / "journal.sqlite3")
            with thief._write:
                thief._write.execute("UPDATE meta SET value = value + 1 WHERE key = 'epoch'")
            pacer.allow(10)
            with pytest.raises(Unavailable, match="journal"):
                await anext(call)
            with pytest.raises(Unavailable, match="journal"):
                await served.client.complete("b", request_id="other")
            await eventually(served.engine.submissions[0].closed.is_set)

    play(main)


def test_an_invalid_request_keeps_no_id(serve: Any, say: Any) -> None:
    async def main() -> None:
        async with serve(say([50]), client=RESUMING) as served:
            with pytest.raises(InvalidArgument):
                await served.client.complete("a", request_id="mine", top_p=2.0)
            assert (await served.client.complete("a", request_id="mine")).token_ids == (50,)

    play(main)
