"""The smg gateway in front of a real cluster: OpenAI's client cannot tell them apart."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

pytestmark = pytest.mark.slow

QUESTION: Any = [{"role": "user", "content": "What is the weather in Paris for 3 days?"}]
SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 20},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS: Any = [{"type": "function", "function": {"name": "get_weather", "parameters": SCHEMA}}]
NAMED: Any = {"type": "function", "function": {"name": "get_weather"}}


@pytest.fixture(params=["gateway", "server"])
def client(request: Any, server: Any) -> openai.OpenAI:
    """OpenAI's client through smg, and of the built-in front."""
    url = server.url if request.param == "server" else request.getfixturevalue("gateway")
    return openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=120)


@pytest.fixture
def both(server: Any, gateway: str) -> list[openai.OpenAI]:
    urls = (server.url, gateway)
    return [openai.OpenAI(base_url=url, api_key="none", timeout=120) for url in urls]


def test_the_same_text_through_the_gateway(both: list[openai.OpenAI]) -> None:
    asked: Any = {"model": "smollm2", "messages": QUESTION, "temperature": 0, "max_tokens": 24}
    said = []
    for client in both:
        whole = client.chat.completions.create(**asked)
        stream = client.chat.completions.create(**asked, stream=True)
        pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
        assert len(pieces) > 10
        assert "".join(pieces) == whole.choices[0].message.content
        said.append((whole.choices[0].message.content, whole.usage.completion_tokens))
    assert said[0] == said[1]
    texts = [
        client.completions.create(model="smollm2", prompt="1, 2, 3,", max_tokens=8, temperature=0)
        for client in both
    ]
    assert texts[0].choices[0].text == texts[1].choices[0].text != ""


def test_a_call_of_a_tool(client: openai.OpenAI) -> None:
    asked: Any = {"model": "smollm2", "messages": QUESTION, "tools": TOOLS, "tool_choice": NAMED}
    whole = client.chat.completions.create(**asked, temperature=0, max_tokens=200)
    (call,) = whole.choices[0].message.tool_calls
    assert call.function.name == "get_weather"
    arguments = json.loads(call.function.arguments)
    assert set(arguments) == {"city", "days"}
    assert 1 <= arguments["days"] <= 9
    stream = client.chat.completions.create(**asked, temperature=0, max_tokens=200, stream=True)
    pieces = [
        item.function.arguments or ""
        for chunk in stream
        for choice in chunk.choices
        for item in choice.delta.tool_calls or []
    ]
    assert json.loads("".join(pieces)) == arguments
    history: Any = [
        *QUESTION,
        {"role": "assistant", "content": "", "tool_calls": [call.model_dump()]},
        {"role": "tool", "tool_call_id": call.id, "content": "sunny"},
    ]
    after = client.chat.completions.create(
        model="smollm2", messages=history, tools=TOOLS, temperature=0, max_tokens=12
    )
    assert after.choices[0].message.content


def test_an_answer_of_a_schema(client: openai.OpenAI) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "weather", "schema": SCHEMA}}
    answer = client.chat.completions.create(
        model="smollm2", messages=QUESTION, response_format=form, temperature=0, max_tokens=200
    )
    assert set(json.loads(answer.choices[0].message.content)) == {"city", "days"}


def test_what_is_wrong_is_refused_and_the_next_one_is_served(client: openai.OpenAI) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(model="other", messages=QUESTION, max_tokens=4)
    assert 400 <= caught.value.status_code < 500
    with pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(
            model="smollm2", messages=[{"role": "user", "content": "a " * 20_000}]
        )
    assert 400 <= caught.value.status_code < 500
    answer = client.chat.completions.create(model="smollm2", messages=QUESTION, max_tokens=2)
    assert answer.choices


def test_responses_come_from_the_gateway(gateway: str) -> None:
    client = openai.OpenAI(base_url=gateway, api_key="none", timeout=120)
    answer = client.responses.create(
        model="smollm2", input="Name a colour.", max_output_tokens=12, temperature=0
    )
    assert answer.output_text
