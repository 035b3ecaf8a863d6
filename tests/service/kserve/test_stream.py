"""Triton's clients against the server: many requests on one stream, answers as text comes."""

from __future__ import annotations

import asyncio
import contextlib
import queue
from collections.abc import AsyncIterator, Iterable
from typing import Any

import pytest

from phalanx.controller.model import ServedModel
from phalanx.controller.scheduling.request import FinishReason, TokenEvent
from phalanx.protos.errors import RequestFailed


@pytest.fixture
def stream(triton: Any) -> Any:
    """Send requests, given as arguments of `infer`, on one stream of an open client; gives the
    (result, error) pairs. Without `until`, the sending side closes after the last request."""

    def run(client: Any, requests: Iterable[dict[str, Any]], until: Any = None) -> Any:
        async def sent() -> AsyncIterator[dict[str, Any]]:
            for request in requests:
                yield {"model_name": "tiny"} | request
            if until is not None:
                await until.wait()

        return client.stream_infer(sent())

    return run


@pytest.fixture
def everything(serve: Any, triton: Any, stream: Any) -> Any:
    """Serve a script, send requests on one stream, and give all that comes, by request id."""

    def run(script: Any, requests: Iterable[dict[str, Any]], **options: Any) -> Any:
        async def main() -> dict[str, list[Any]]:
            found: dict[str, list[Any]] = {}
            async with (
                serve(script, **options) as served,
                triton.InferenceServerClient(served.address) as client,
            ):
                async for result, error in stream(client, requests):
                    key = "error" if result is None else result.get_response().id
                    found.setdefault(key, []).append(error if result is None else result)
            return found

        return asyncio.run(main())

    return run


def finals(results: list[Any]) -> list[bool]:
    return [item.get_response().parameters["triton_final_response"].bool_param for item in results]


def text(results: list[Any]) -> str:
    return "".join(item.as_numpy("text_output")[0].decode() for item in results)


def test_pieces_join_to_the_text_and_the_last_one_is_marked(
    everything: Any, inputs: Any, say: Any, words: list[int], served_model: ServedModel
) -> None:
    sent = {"inputs": inputs("the fox", stream=True, max_tokens=6), "request_id": "a"}
    (results,) = everything(say(words), [sent | {"enable_empty_final_response": True}]).values()
    assert len(results) > 1
    assert finals(results) == [False] * (len(results) - 1) + [True]
    assert text(results) == served_model.tokenizer.decode(words[:6])


def test_without_streaming_one_final_answer_comes(
    everything: Any, inputs: Any, say: Any, words: list[int], served_model: ServedModel
) -> None:
    (results,) = everything(say(words), [{"inputs": inputs("the fox")}]).values()
    assert finals(results) == [True]
    assert text(results) == "the fox" + served_model.tokenizer.decode(words)


def test_extras_of_a_stream(everything: Any, inputs: Any, say: Any, words: list[int]) -> None:
    """Counts are of what is new in an answer; what the prompt had is told at the end."""
    flags = {"return_finish_reason": True, "return_num_output_tokens": True}
    sent = inputs("the fox", stream=True, n=2, **flags, return_num_input_tokens=True)
    (results,) = everything(say(words[:5]), [{"inputs": sent}]).values()
    counts = [item.as_numpy("num_output_tokens").tolist() for item in results]
    assert [sum(column) for column in zip(*counts, strict=True)] == [5, 5]
    reasons = [item.as_numpy("finish_reason").tolist() for item in results]
    assert reasons == [[b"None"] * 2] * (len(results) - 1) + [[b"length"] * 2]
    known = [item.as_numpy("num_input_tokens") is not None for item in results]
    assert known == finals(results)


def test_requests_of_one_stream_interleave(
    serve: Any, triton: Any, stream: Any, inputs: Any, words: list[int], served_model: ServedModel
) -> None:
    """Two requests take turns, a token each; the second one under the first one's own id."""

    async def main() -> None:
        turns = [asyncio.Semaphore(1), asyncio.Semaphore(0)]

        async def script(submission: Any) -> AsyncIterator[list[TokenEvent]]:
            own = submission.params.seed
            for at in range(4):
                await turns[own].acquire()
                last = {"finish": FinishReason.LENGTH} if at == 3 else {}
                yield [submission.event([words[4 * own + at]], at, **last)]

        async with (
            serve(script) as served,
            triton.InferenceServerClient(served.address) as client,
        ):
            sent = [
                {
                    "inputs": inputs("the fox", stream=True, seed=own),
                    "request_id": f"{own}",
                }
                for own in range(2)
            ]
            order, said = [], ["", ""]
            async for result, error in stream(client, sent):
                assert error is None
                own = int(result.get_response().id)
                order.append(own)
                said[own] += text([result])
                turns[1 - own].release()
        assert order == [0, 1] * 4
        decode = served_model.tokenizer.decode
        assert said == [decode(words[:4]), decode(words[4:8])]

    asyncio.run(main())


def test_an_id_may_be_used_twice_at_once(
    everything: Any, inputs: Any, say: Any, words: list[int]
) -> None:
    sent = {"inputs": inputs("the fox", max_tokens=3), "request_id": "1"}
    found = everything(say(words), [sent, sent])
    assert list(found) == ["1"] and finals(found["1"]) == [True, True]


def test_an_error_ends_its_own_request(
    everything: Any, inputs: Any, words: list[int], served_model: ServedModel
) -> None:
    """The engine fails one request, another has wrong parameters, a third hits a defect."""

    async def script(submission: Any) -> AsyncIterator[list[TokenEvent]]:
        yield [submission.event([words[0]], 0)]
        if submission.params.seed == 1:
            raise RequestFailed("the logits are not numbers")
        if submission.params.seed == 2:
            raise KeyError("a secret")
        await asyncio.sleep(0.05)
        yield [submission.event([words[1]], 1, finish=FinishReason.LENGTH)]

    given = [{"seed": 0}, {"seed": 1}, {"seed": 2}, {"temperature": -1}]
    sent = [
        {"inputs": inputs("the fox", stream=True, **item), "request_id": str(at)}
        for at, item in enumerate(given)
    ]
    found = everything(script, sent)
    assert text(found["0"]) == served_model.tokenizer.decode(words[:2])
    errors = sorted(error.message() for error in found["error"])
    assert len(errors) == 3
    assert errors[0].startswith("[INTERNAL] internal error, incident ")
    assert errors[1] == "[INTERNAL] the logits are not numbers"
    assert errors[2].startswith("[INVALID_ARGUMENT] sampling_parameters.temperature: -1")
    assert "secret" not in str(errors)


def test_an_answer_that_fits_no_message_ends_its_own_request(
    everything: Any, inputs: Any, say: Any, words: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("phalanx.controller.server.kserve_request.MAX_ANSWER_BYTES", 40)
    sent = [
        {"inputs": inputs("the fox", **given), "request_id": name}
        for name, given in (
            ("a", {}),
            ("b", {"stream": True, "max_tokens": 3}),
            ("c", {"max_tokens": 1}),
        )
    ]
    found = everything(say(words), sent)
    assert finals(found["b"])[-1] and finals(found["c"]) == [True]
    (error,) = found["error"]
    assert error.message().startswith("[INVALID_ARGUMENT] stream: an answer of over 40 bytes")


def test_cancelling_a_stream_frees_all_its_requests(
    serve: Any, triton: Any, stream: Any, inputs: Any, words: list[int]
) -> None:
    async def main() -> None:
        async def script(submission: Any) -> AsyncIterator[list[TokenEvent]]:
            yield [submission.event([words[0]], 0)]
            await asyncio.Event().wait()

        async with (
            serve(script) as served,
            triton.InferenceServerClient(served.address) as client,
        ):
            sent = [{"inputs": inputs("the fox", stream=True)}] * 3
            answers = stream(client, sent, until=asyncio.Event())
            for _ in range(3):
                await anext(answers)
            assert len(served.engine.live) == 3
            answers.cancel()
            async with asyncio.timeout(10):
                for submission in served.engine.submissions:
                    await submission.closed.wait()
            with contextlib.suppress(asyncio.CancelledError):
                await anext(answers)
            assert {entry[0] for entry in served.books.ended} == {"cancelled"}

    asyncio.run(main())


def test_cancelling_a_single_request_frees_it(
    serve: Any, triton: Any, inputs: Any, words: list[int], eventually: Any
) -> None:
    async def main() -> None:
        async def script(submission: Any) -> AsyncIterator[list[TokenEvent]]:
            yield [submission.event([words[0]], 0)]
            await asyncio.Event().wait()

        async with (
            serve(script) as served,
            triton.InferenceServerClient(served.address) as client,
        ):
            call = asyncio.create_task(client.infer("tiny", inputs("the fox")))
            await eventually(lambda: served.engine.submissions)
            call.cancel()
            async with asyncio.timeout(10):
                await served.engine.submissions[0].closed.wait()
            await asyncio.gather(call, return_exceptions=True)

    asyncio.run(main())


def test_the_client_with_threads(
    serve: Any, say: Any, inputs: Any, words: list[int], served_model: ServedModel
) -> None:
    """The synchronous client's `infer`, and its stream with a callback."""
    threaded = pytest.importorskip("tritonclient.grpc")
    said = served_model.tokenizer.decode(words)

    def use(address: str) -> None:
        client = threaded.InferenceServerClient(address)
        assert client.is_server_ready() is False
        whole = client.infer("tiny", inputs("the fox", exclude_input_in_output=True))
        assert text([whole]) == said
        came: queue.SimpleQueue[Any] = queue.SimpleQueue()
        client.start_stream(lambda result, error: came.put((result, error)))
        for name in ("a", "b"):
            client.async_stream_infer("tiny", inputs("the fox", stream=True), request_id=name)
        results: dict[str, list[Any]] = {"a": [], "b": []}
        while not all(items and finals(items)[-1] for items in results.values()):
            result, error = came.get(timeout=20)
            assert error is None
            results[result.get_response().id].append(result)
        client.stop_stream()
        client.close()
        assert [text(items) for items in results.values()] == [said, said]

    async def main() -> None:
        async with serve(say(words)) as served:
            await asyncio.to_thread(use, served.address)

    asyncio.run(main())


def test_draining_lets_streams_finish_and_refuses_new_requests(
    serve: Any, triton: Any, inputs: Any, words: list[int]
) -> None:
    async def main() -> None:
        go, more = asyncio.Event(), asyncio.Event()

        async def script(submission: Any) -> AsyncIterator[list[TokenEvent]]:
            yield [submission.event([words[0]], 0)]
            await go.wait()
            yield [submission.event([words[1]], 1, finish=FinishReason.LENGTH)]

        async def sent() -> AsyncIterator[dict[str, Any]]:
            yield {"model_name": "tiny", "inputs": inputs("a", stream=True)}
            await more.wait()
            yield {"model_name": "tiny", "inputs": inputs("b", stream=True)}

        async with (
            serve(script) as served,
            triton.InferenceServerClient(served.address) as client,
        ):
            answers = client.stream_infer(sent())
            await anext(answers)
            stopping = asyncio.create_task(served.host.stop(20))
            await asyncio.sleep(0)
            more.set()
            result, error = await anext(answers)
            assert result is None
            assert error.message() == "[UNAVAILABLE] the server is shutting down"
            go.set()
            result, error = await anext(answers)
            assert error is None and finals([result]) == [True]
            await stopping

    asyncio.run(main())
