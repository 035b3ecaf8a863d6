"""Calls of tools through OpenAI's client and through our own service."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from typing import Any

import msgspec
import openai
import pytest

from phalanx.controller.scheduling.request import FinishReason
from phalanx.protos.errors import ModelError
from phalanx.protos.v1 import serving_pb2, types_pb2

TEMPLATE = (
    "{% if tools %}<tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}</tools> "
    'call as <tool_call>{"name": ..., "arguments": ...}</tool_call>{% endif %}'
    "{% for message in messages %}<|start|>{{ message.role }} {{ message.content }}"
    "{% for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>"
    "{% endfor %}{% if message.tool_call_id %}({{ message.tool_call_id }} {{ message.name }})"
    "{% endif %}<|end|>{% endfor %}<|start|>assistant "
)
USER = [{"role": "user", "content": "weather?"}]
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER: Any = {
    "type": "function",
    "function": {"name": "weather", "description": "Of a city.", "parameters": SCHEMA},
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Graz \u2600"}}\n</tool_call>'
TWO = "Let me see. " + CALL + "\n" + CALL.replace("Graz", "Linz")


@pytest.fixture(scope="module")
def calling(served_model: Any) -> Any:
    """A model whose template takes tools, with room for them."""
    spec = msgspec.structs.replace(served_model.spec, max_context=4096)
    return dataclasses.replace(served_model, chat_template=TEMPLATE, max_context=4096, spec=spec)


@pytest.fixture
def says(calling: Any, say: Any) -> Any:
    """Factory: a script that says a text, three tokens at a time."""

    def make(text: str, **options: Any) -> Any:
        ids = list(calling.tokenizer.encode(text, add_special_tokens=False).ids)
        return say(ids, **{"step": 3, "finish": FinishReason.STOP, **options})

    return make


def asked(**more: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": USER, "tools": [WEATHER], **more}


def prompt(made: Any, model: Any, at: int = -1) -> str:
    ids = made.submissions[at].prompt_token_ids
    return str(model.tokenizer.decode(ids, skip_special_tokens=False))


def test_calls_whole_and_in_a_stream(front: Any, says: Any, calling: Any) -> None:
    async def main() -> None:
        async with front(says(TWO), model=calling) as made:
            create = made.client.chat.completions.create
            choice = (await create(**asked())).choices[0]
            assert choice.finish_reason == "tool_calls"
            assert choice.message.content == "Let me see."
            calls = choice.message.tool_calls
            assert [json.loads(call.function.arguments) for call in calls] == [
                {"city": "Graz \u2600"},
                {"city": "Linz \u2600"},
            ]
            assert {call.function.name for call in calls} == {"weather"}
            assert len({call.id for call in calls}) == 2
            assert '"description": "Of a city."' in prompt(made, calling)

            stream = made.client.chat.completions.stream(**asked())
            async with stream as events:
                arguments = [item async for item in events if "arguments.delta" in item.type]
                final = (await events.get_final_completion()).choices[0]
            assert len(arguments) > 4, "arguments come in pieces"
            assert final.finish_reason == "tool_calls"
            assert final.message.content == "Let me see."
            assert [call.function.arguments for call in final.message.tool_calls] == [
                call.function.arguments for call in calls
            ]

            single = (await create(**asked(parallel_tool_calls=False))).choices[0]
            assert len(single.message.tool_calls) == 1
            none = (await create(**asked(tool_choice="none"))).choices[0]
            assert none.message.content == TWO
            assert none.finish_reason == "stop"
            assert "<tools>" not in prompt(made, calling)

    asyncio.run(main())


def test_an_answer_that_is_cut_short(front: Any, says: Any, calling: Any) -> None:
    async def main() -> None:
        script = says(CALL[:53], finish=FinishReason.LENGTH)
        async with front(script, model=calling) as made:
            choice = (await made.client.chat.completions.create(**asked())).choices[0]
            assert choice.finish_reason == "length"
            assert choice.message.tool_calls[0].function.arguments.startswith('{"ci')

    asyncio.run(main())


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "weather"}}]
)
def test_a_call_is_forced_by_a_grammar(front: Any, says: Any, calling: Any, choice: Any) -> None:
    async def main() -> None:
        async with front(says(CALL), model=calling) as made:
            other = {"type": "function", "function": {"name": "clock"}}
            given = asked(tool_choice=choice, tools=[WEATHER, other])
            await made.client.chat.completions.create(**given)
            grammar = made.submissions[0].params.grammar
            assert grammar.kind == "lark"
            assert "weather" in grammar.text
            assert ("clock" in grammar.text) == (choice == "required")
            await made.client.chat.completions.create(**asked())
            assert made.submissions[1].params.grammar is None

    asyncio.run(main())


def test_calls_and_results_in_the_conversation(front: Any, says: Any, calling: Any) -> None:
    async def main() -> None:
        async with front(says(CALL), model=calling) as made:
            create = made.client.chat.completions.create
            first = (await create(**asked())).choices[0].message
            call = first.tool_calls[0]
            result = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
            talk = [*USER, first.model_dump(exclude_none=True), result]
            await create(**asked(messages=talk))
            text = prompt(made, calling)
            assert '<tool_call>{"name": "weather", "arguments": {"city": "Graz \u2600"}}' in text
            assert f"tool sunny({call.id} weather)" in text

    asyncio.run(main())


def nested(levels: int) -> Any:
    schema: Any = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"x": schema}}
    return schema


def with_schema(schema: Any, **more: Any) -> dict[str, Any]:
    function = {"name": "f", "parameters": schema}
    return {"tools": [{"type": "function", "function": function}], **more}


BAD = [
    (with_schema(nested(200)), "tools[0].function.parameters"),
    (with_schema({"enum": ["x" * 300_000]}), "tools"),
    (with_schema("{}"), "tools[0].function.parameters"),
    (with_schema({"type": "nothing"}, tool_choice="required"), "tools"),
    ({"tools": [WEATHER] * 129}, "tools"),
    ({"tools": [WEATHER] * 2}, "tools"),
    ({"tools": [{"type": "web"}]}, "tools[0].type"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
    ({"tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice.function.name"),
    ({"tool_choice": "any"}, "tool_choice"),
    ({"tools": [], "tool_choice": "required"}, "tools"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"parallel_tool_calls": 1}, "parallel_tool_calls"),
    ({"messages": [{"role": "user", "content": "a", "tool_calls": [
        {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]}]},
     "messages[0].tool_calls"),
    ({"messages": [{"role": "assistant", "tool_calls": [
        {"id": "1", "type": "function", "function": {"name": "f", "arguments": "[1]"}}]}]},
     "messages[0].tool_calls[0].function.arguments"),
]  # fmt: skip


def test_bad_tools_are_refused_and_the_server_lives(front: Any, says: Any, calling: Any) -> None:
    async def main() -> None:
        async with front(says(CALL), model=calling) as made:
            found = []
            for change, _ in BAD:
                try:
                    await made.client.chat.completions.create(**asked() | change)
                    found.append("taken")
                except openai.BadRequestError as error:
                    found.append(error.param)
            assert found == [param for _, param in BAD]
            assert not made.submissions
            await made.client.chat.completions.create(**asked())

    asyncio.run(main())


def test_a_model_without_tools_says_so(front: Any, says: Any) -> None:
    async def main() -> None:
        async with front(says(CALL)) as made:
            with pytest.raises(openai.BadRequestError, match="takes no tools"):
                await made.client.chat.completions.create(**asked())
            info = await made.served.client.model_info()
            assert info.tool_parser == ""

    asyncio.run(main())


def chat(request_id: str, **fields: Any) -> serving_pb2.ChatRequest:
    tool = types_pb2.Tool(name="weather", parameters=json.dumps(SCHEMA))
    message = types_pb2.ChatMessage(role="user", content="weather?")
    return serving_pb2.ChatRequest(
        request_id=request_id, messages=[message], tools=[tool], **fields
    )


def test_calls_over_grpc_also_of_a_request_that_is_read_again(
    serve: Any, says: Any, calling: Any
) -> None:
    """The same ids and arguments from any token on, as they are functions of the tokens."""

    async def main() -> None:
        async with serve(says(TWO), model=calling) as served:
            stub = served.client._stub
            deltas = [item async for item in stub.Chat(chat("mine"))]
            pieces = [
                piece for item in deltas for delta in item.samples for piece in delta.tool_calls
            ]
            text = "".join(delta.text for item in deltas for delta in item.samples)
            assert text == "Let me see."
            ids = [piece.id for piece in pieces if piece.id]
            assert len(ids) == 2
            again = [
                item async for item in stub.Resume(serving_pb2.ResumeRequest(request_id="mine"))
            ]
            other = [
                piece for item in again for delta in item.samples for piece in delta.tool_calls
            ]
            assert [piece.id for piece in other if piece.id] == ids
            assert joined(other) == joined(pieces)
            assert (await served.client.model_info()).tool_parser == "hermes"

    asyncio.run(main())


def joined(pieces: Any) -> dict[int, str]:
    found: dict[int, str] = {}
    for piece in pieces:
        found[piece.index] = found.get(piece.index, "") + piece.arguments
    return found


def test_an_operator_may_name_the_format(serve: Any, says: Any, calling: Any) -> None:
    async def main() -> None:
        plain = dataclasses.replace(calling, chat_template="{{ tools }}{{ messages }}")
        async with serve(says("{}"), model=plain) as served:
            with pytest.raises(ModelError, match="tool_parser may be one of"):
                await served.client.ask(USER, tools=[WEATHER])
        call = '{"name": "weather", "arguments": {"city": "Graz"}}'
        options = {"service": {"tool_parser": "json"}, "model": plain}
        async with serve(says(call), **options) as served:
            answer = await served.client.ask(USER, tools=[WEATHER], tool_choice="required")
            (called,) = answer.samples[0].tool_calls
            assert (called.name, called.arguments) == ("weather", '{"city": "Graz"}')
            result = {"role": "tool", "tool_call_id": called.id, "content": "sunny"}
            talk = [*USER, {"role": "assistant", "tool_calls": [called]}, result]
            await served.client.ask(talk, tools=[WEATHER], tool_choice="none")

    asyncio.run(main())
