"""Wrong requests: the status, the field that is named, and that the server lives on."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from phalanx.protos.errors import GroupLost, RequestFailed, ResourceExhausted, Unavailable

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "a"}]}
TEXT = {"model": "tiny", "prompt": "a"}
PATHS = {"/chat/completions": CHAT, "/completions": TEXT}


def image(url: str) -> list[dict[str, Any]]:
    part = {"type": "image_url", "image_url": {"url": url}}
    return [{"role": "user", "content": [{"type": "text", "text": "a"}, part]}]


CASES: list[tuple[str, dict[str, Any], str]] = [
    ("/chat/completions", {"temperature": 11}, "temperature"),
    ("/chat/completions", {"temperature": "hot"}, "temperature"),
    ("/chat/completions", {"temperature": True}, "temperature"),
    ("/chat/completions", {"temperature": 1e300}, "temperature"),
    ("/chat/completions", {"top_p": 0}, "top_p"),
    ("/chat/completions", {"n": 0}, "n"),
    ("/chat/completions", {"n": 9}, "n"),
    ("/chat/completions", {"n": 1.5}, "n"),
    ("/chat/completions", {"seed": -1}, "seed"),
    ("/chat/completions", {"seed": 10**4000}, "seed"),
    ("/chat/completions", {"max_tokens": 0}, "max_tokens"),
    ("/chat/completions", {"max_tokens": 4000}, "max_tokens"),
    ("/chat/completions", {"max_completion_tokens": 4000}, "max_completion_tokens"),
    ("/chat/completions", {"max_completion_tokens": 4, "max_tokens": 5}, "max_tokens"),
    ("/chat/completions", {"min_tokens": 9, "max_tokens": 5}, "min_tokens"),
    ("/chat/completions", {"stop": ["a"] * 5}, "stop"),
    ("/chat/completions", {"stop": ["a", ""]}, "stop[1]"),
    ("/chat/completions", {"stop": [1]}, "stop"),
    ("/chat/completions", {"logit_bias": {"x": 1}}, "logit_bias"),
    ("/chat/completions", {"logit_bias": {"1": 101}}, "logit_bias[1]"),
    ("/chat/completions", {"logit_bias": {"1": None}}, "logit_bias[1]"),
    ("/chat/completions", {"logit_bias": {"4294967295": 1}}, "logit_bias"),
    ("/chat/completions", {"logit_bias": [1]}, "logit_bias"),
    ("/chat/completions", {"top_logprobs": 2}, "top_logprobs"),
    ("/chat/completions", {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ("/chat/completions", {"logprobs": 3}, "logprobs"),
    ("/chat/completions", {"stop_token_ids": [-1]}, "stop_token_ids"),
    ("/chat/completions", {"stop_token_ids": [100000]}, "stop_token_ids[0]"),
    ("/chat/completions", {"tools": [{"type": "function"}]}, "tools[0].function"),
    ("/chat/completions", {"tool_choice": "required"}, "tools"),
    ("/chat/completions", {"response_format": "json"}, "response_format"),
    ("/chat/completions", {"response_format": {"type": "xml"}}, "response_format.type"),
    (
        "/chat/completions",
        {"response_format": {"type": "json_schema"}},
        "response_format.json_schema",
    ),
    (
        "/chat/completions",
        {"response_format": {"type": "json_schema", "json_schema": {"schema": []}}},
        "response_format.json_schema.schema",
    ),
    (
        "/chat/completions",
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "x"}}}},
        "response_format",
    ),
    (
        "/chat/completions",
        {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}},
        "structured_outputs",
    ),
    ("/completions", {"structured_outputs": {"regex": "(a"}}, "structured_outputs"),
    ("/completions", {"structured_outputs": {"regex": "a", "json": {}}}, "structured_outputs"),
    ("/completions", {"structured_outputs": {"xml": "a"}}, "structured_outputs"),
    ("/completions", {"structured_outputs": {"choice": []}}, "structured_outputs"),
    (
        "/completions",
        {"structured_outputs": {"regex": "a"}, "ignore_eos": True},
        "ignore_eos",
    ),
    ("/chat/completions", {"modalities": ["audio"]}, "modalities"),
    ("/chat/completions", {"reasoning_effort": "low"}, "reasoning_effort"),
    ("/chat/completions", {"frobnicate": None}, "frobnicate"),
    ("/chat/completions", {"prompt": "a"}, "prompt"),
    ("/chat/completions", {"stream": "yes"}, "stream"),
    ("/chat/completions", {"stream_options": {"include_usage": True}}, "stream_options"),
    (
        "/chat/completions",
        {"stream": True, "stream_options": {"more": 1}},
        "stream_options.more",
    ),
    ("/chat/completions", {"messages": None}, "messages"),
    ("/chat/completions", {"messages": "a"}, "messages"),
    ("/chat/completions", {"messages": []}, "messages"),
    ("/chat/completions", {"messages": [1]}, "messages[0]"),
    ("/chat/completions", {"messages": [1] * 100_000}, "messages"),
    (
        "/chat/completions",
        {"messages": [{"role": "user", "content": [{}] * 100_000}]},
        "messages[0].content",
    ),
    ("/completions", {"prompt": [5] * 300_000}, "prompt"),
    ("/chat/completions", {"messages": [{"content": "a"}]}, "messages[0].role"),
    (
        "/chat/completions",
        {"messages": [{"role": "king", "content": "a"}]},
        "messages[0].role",
    ),
    ("/chat/completions", {"messages": [{"role": "user"}]}, "messages[0].content"),
    (
        "/chat/completions",
        {"messages": [{"role": "user", "content": "a", "name": "bob"}]},
        "messages[0].name",
    ),
    ("/chat/completions", {"messages": image("file:///x")}, "messages[0].content[1].type"),
    (
        "/chat/completions",
        {"messages": [{"role": "user", "content": "a b c " * 100}]},
        "messages",
    ),
    ("/chat/completions", {"model": None}, "model"),
    ("/chat/completions", {"model": 5}, "model"),
    ("/completions", {"prompt": ""}, "prompt"),
    ("/completions", {"prompt": None}, "prompt"),
    ("/completions", {"prompt": ["a"] * 17}, "prompt"),
    ("/completions", {"prompt": ["a", ""]}, "prompt[1]"),
    ("/completions", {"prompt": ["a", [5, 100000]]}, "prompt[1][1]"),
    ("/completions", {"prompt": [1, "b"]}, "prompt[0]"),
    ("/completions", {"prompt": [[], "b"]}, "prompt[0]"),
    ("/completions", {"prompt": [5, 100000]}, "prompt[1]"),
    ("/completions", {"prompt": [5, -1]}, "prompt"),
    ("/completions", {"prompt": []}, "prompt"),
    ("/completions", {"echo": True}, "echo"),
    ("/completions", {"suffix": "z"}, "suffix"),
    ("/completions", {"best_of": 3}, "best_of"),
    ("/completions", {"logprobs": 21}, "logprobs"),
    ("/completions", {"include_stop_str_in_output": 1}, "include_stop_str_in_output"),
    ("/completions", {"messages": []}, "messages"),
]


@pytest.fixture
def asks(front: Any, say: Any) -> Any:
    """Run every `(path, bytes)` against one server: gives the answers; then a good request."""

    async def main(requests: list[tuple[str, Any]]) -> list[Any]:
        async with front(say([60, 61])) as made:
            header = {"Content-Type": "application/json"}
            answers = [
                await made.http.post(path, content=body, headers=header) for path, body in requests
            ]
            made.submissions.clear()
            assert (await made.http.post("/completions", json=TEXT)).status_code == 200
            return answers

    return lambda requests: asyncio.run(main(requests))


def test_a_wrong_field_is_named(asks: Any) -> None:
    bodies = [(path, json.dumps(PATHS[path] | change)) for path, change, _ in CASES]
    found = [(answer.status_code, answer.json()["error"]["param"]) for answer in asks(bodies)]
    assert found == [(400, param) for _, _, param in CASES]


def test_all_wrong_fields_are_told_at_once(front: Any, say: Any) -> None:
    async def main() -> None:
        async with front(say([60])) as made:
            with pytest.raises(openai.BadRequestError) as caught:
                await made.client.chat.completions.create(
                    **CHAT, temperature=99, n=77, extra_body={"frobnicate": 1}
                )
            body = caught.value.body
            assert all(name in body["message"] for name in ("temperature", "n:", "frobnicate"))
            assert body["type"] == "invalid_request_error"
            assert made.submissions == []

    asyncio.run(main())


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[1]",
        b"null",
        b'{"model": NaN}',
        b'{"model": "\xff"}',
        b'{"model": "tiny", "prompt": "\\ud800"}',
        b'{"model": "tiny", "prompt": "\\udc00"}',
        b'{"model": "tiny", "prompt": "a", "seed": ' + b"9" * 5000 + b"}",
        b'{"model": "tiny", "prompt": "a", "temperature": 1e999}',
        b"[" * 200_000,
        b'{"a":' * 100_000,
    ],
)
def test_a_body_that_is_no_request(asks: Any, body: bytes) -> None:
    (answer,) = asks([("/completions", body)])
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["message"]


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
KNOWN = sorted(
    {name for _, change, _ in CASES for name in change}
    | {"user", "top_k", "ignore_eos", "bad_words"}
)


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # it starts a server each time
)
@given(
    bodies=st.lists(
        st.tuples(
            st.sampled_from(sorted(PATHS)),
            st.dictionaries(st.sampled_from(KNOWN), json_values, min_size=1, max_size=3),
        ),
        min_size=8,
        max_size=8,
    )
)
def test_any_body_has_an_answer(asks: Any, bodies: list[tuple[str, dict[str, Any]]]) -> None:
    """A good one or a refusal in the client's terms, never an error of ours."""
    made = [(path, json.dumps(PATHS[path] | change)) for path, change in bodies]
    for answer in asks(made):
        assert answer.status_code in (200, 400, 404), answer.text
        if answer.status_code != 200:
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_very_many_faults_are_told_in_few_words(asks: Any) -> None:
    message = {f"field {index}": 1 for index in range(50)}
    body = CHAT | {"messages": [message] * 1000} | message
    (answer,) = asks([("/chat/completions", json.dumps(body))])
    assert answer.status_code == 400 and len(answer.text) < 8000


def test_the_number_of_requests_is_bounded(
    front: Any, endless: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("phalanx.controller.openai.routes.MAX_CONCURRENT_CALLS", 2)

    async def main() -> None:
        async with front(endless) as made:
            create = made.client.chat.completions.create
            streams = [await create(**CHAT, stream=True) for _ in "ab"]
            with pytest.raises(openai.RateLimitError):
                await create(**CHAT)
            for stream in streams:
                await stream.close()

    asyncio.run(main())


def test_a_body_that_does_not_come(front: Any, say: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("phalanx.controller.openai.routes.BODY_TIMEOUT_S", 0.1)

    async def parts() -> Any:
        yield b"{"
        await asyncio.sleep(1)
        yield b"}"

    async def main() -> None:
        async with front(say([60])) as made:
            header = {"Content-Type": "application/json"}
            answer = await made.http.post("/completions", content=parts(), headers=header)
            assert answer.status_code == 408

    asyncio.run(main())


def test_statuses_of_http(front: Any, say: Any) -> None:
    async def main() -> None:
        async with front(say([60])) as made:
            http = made.http
            wrong = await http.post("/completions", json=TEXT | {"model": "huge"})
            assert (wrong.status_code, wrong.json()["error"]["code"]) == (404, "model_not_found")
            assert (await http.post("/embeddings", json={})).status_code == 404
            got = await http.get("/completions")
            assert (got.status_code, got.headers["allow"]) == (405, "POST")
            plain = await http.post("/completions", content=json.dumps(TEXT))
            assert plain.status_code == 415 and "Content-Type" in plain.json()["error"]["message"]
            header = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
            packed = await http.post("/completions", content=b"x", headers=header)
            assert packed.status_code == 415
            large = await http.post("/completions", json=TEXT | {"user": "x" * 2**22})
            assert large.status_code == 413
            for answer in (wrong, got, plain, packed, large):
                assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
                assert answer.headers["server"] == "phalanx"

    asyncio.run(main())


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ResourceExhausted("the queue is full", 2.2), 429),
        (Unavailable("no replica is ready"), 503),
        (GroupLost("a rank died"), 503),
        (RequestFailed("not a number"), 500),
        (ValueError("a secret"), 500),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_of_the_engine(front: Any, error: Exception, status: int, stream: bool) -> None:
    async def script(submission: Any) -> Any:
        if error:
            raise error
        yield []

    async def main() -> None:
        async with front(script) as made:
            with pytest.raises(openai.APIStatusError) as caught:
                await made.client.chat.completions.create(**CHAT, stream=stream)
            assert caught.value.status_code == status
            assert "secret" not in str(caught.value)
            if status == 429:
                assert isinstance(caught.value, openai.RateLimitError)
                assert caught.value.response.headers["retry-after"] == "3"

    asyncio.run(main())


@pytest.mark.parametrize("stream", [False, True])
def test_an_error_of_one_prompt_ends_the_request(
    front: Any, endless: Any, stream: bool, eventually: Any
) -> None:
    async def script(submission: Any) -> Any:
        if submission.request_id.endswith("-1"):
            raise ResourceExhausted("the queue is full", 2.2)
        async for batch in endless(submission):
            yield batch

    async def main() -> None:
        async with front(script) as made:
            with pytest.raises(openai.APIError, match="the queue is full"):
                answer = await made.client.completions.create(
                    model="tiny", prompt=["a", "b", "c"], stream=stream
                )
                async for _ in answer:
                    pass
            await eventually(lambda: not made.served.engine.live)

    asyncio.run(main())


def test_an_error_in_the_middle_ends_the_stream_with_it(front: Any, words: list[int]) -> None:
    async def script(submission: Any) -> Any:
        yield [submission.event(words[:2], 0)]
        raise GroupLost("a rank died")

    async def main() -> None:
        async with front(script) as made:
            stream = await made.client.chat.completions.create(**CHAT, stream=True)
            with pytest.raises(openai.APIError, match="a rank died"):
                async for _ in stream:
                    pass
            raw = await made.http.post("/chat/completions", json=CHAT | {"stream": True})
            assert "[DONE]" not in raw.text
            with pytest.raises(openai.InternalServerError, match="a rank died"):
                await made.client.chat.completions.create(**CHAT)

    asyncio.run(main())
