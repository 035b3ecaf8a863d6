"""Calls of tools in a model's text: what is one, what is text, and that cuts change nothing."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phalanx.controller.tools.formats import FORMATS, Reading
from phalanx.controller.tools.scanning import Piece

NAMES = ("get", "add.two")


def read(form: str, chunks: list[str], *, single: bool = False) -> tuple[str, str, list[Any]]:
    """(text, reasoning, calls as [name, arguments]) of an answer that comes in chunks."""
    reader = Reading(form, NAMES, single).reader()
    pieces: list[Piece] = [piece for chunk in chunks for piece in reader.push(chunk)]
    pieces += reader.finish()
    calls: list[Any] = []
    for piece in pieces:
        if piece.call is not None:
            if piece.name:
                assert piece.call == len(calls)
                calls.append([piece.name, ""])
            assert piece.call == len(calls) - 1
            calls[-1][1] += piece.arguments
    texts = "".join(piece.text for piece in pieces)
    return texts, "".join(piece.reasoning for piece in pieces), calls


CASES = [
    ("hermes", 'Hi\n<tool_call>\n{"name": "get", "arguments": {"a": [1, "}"]}}\n</tool_call>\n',
     "Hi", [["get", '{"a": [1, "}"]}']]),
    ("hermes", '<tool_call>{"arguments":{"a":"\\""},"name":"x"}</tool_call> <tool_call>{"name":"y"}',
     "", [["x", '{"a":"\\""}'], ["y", "{}"]]),
    ("hermes", "a < b <tool_call>{nope}</tool_call> <tool", "a < b <tool_call>{nope}</tool_call> <tool", []),
    ("hermes", '<tool_call>{"name":"get","arguments":{"a', "", [["get", '{"a']]),
    ("hermes", '<tool_call>{"name": 3}', '<tool_call>{"name": 3}', []),
    ("mistral", '[TOOL_CALLS] [{"name":"get","arguments":{"a":1}}, {"name":"z","arguments":{}}]',
     "", [["get", '{"a":1}'], ["z", "{}"]]),
    ("mistral", 'ok[TOOL_CALLS]get[ARGS]{"a":1}[TOOL_CALLS]z[CALL_ID]123456789[ARGS]{}',
     "ok", [["get", '{"a":1}'], ["z", "{}"]]),
    ("mistral", "[TOOL_CALLS] what?", "[TOOL_CALLS] what?", []),
    ("llama3", '<|python_tag|>{"name": "get", "parameters": {}}; {"name": "add.two", "parameters": {"b":2}}',
     "", [["get", "{}"], ["add.two", '{"b":2}']]),
    ("llama3", '{"name": "Bob", "parameters": {}}', '{"name": "Bob", "parameters": {}}', []),
    ("llama3", 'See {"name": "get", "parameters": {}}', 'See {"name": "get", "parameters": {}}', []),
    ("json", '[{"name":"get","arguments":{"a":null}}]', "", [["get", '{"a":null}']]),
    ("json", " [1, 2]", " [1, 2]", []),
    ("pythonic", "[get(a=1, b='x)]', c=[True, {'k': None}]), add.two()]",
     "", [["get", '{"a": 1, "b": "x)]", "c": [true, {"k": null}]}'], ["add.two", "{}"]]),
    ("pythonic", "[get(1)]", "[get(1)]", []),
    ("pythonic", "[get(a=open('x'))]", "[get(a=open('x'))]", []),
    ("pythonic", "[1, 2] is a list", "[1, 2] is a list", []),
    ("harmony", "Hello", "Hello", []),
    ("harmony", '<|channel|>commentary to=functions.get <|constrain|>json<|message|>{"a":1}',
     "", [["get", '{"a":1}']]),
    ("harmony", "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes", "Yes", []),
]  # fmt: skip


@pytest.mark.parametrize(("form", "text", "said", "calls"), CASES)
def test_calls_and_text(form: str, text: str, said: str, calls: list[Any]) -> None:
    assert read(form, [text])[::2] == (said, calls)
    assert read(form, list(text))[::2] == (said, calls)
    if len(calls) > 1:
        assert read(form, [text], single=True)[2] == calls[:1]


def test_reasoning_is_apart() -> None:
    text = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Y"
    assert read("harmony", [text]) == ("Y", "Hm.", [])


FRAGMENTS = st.sampled_from(
    ["<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<|python_tag|>", "[", "]",
     "{", "}", '"name"', '"get"', ":", ",", '"arguments"', '"parameters"', "{}", '{"a": "\\"}"}', "get",
     "get(", "a=1", ")", "'", " ", "\n", "words", ";", "\\", '"', "<|channel|>", "<|message|>",
     "<|end|>", "<|start|>", "analysis", "to=functions.get", '{"name": "get", "arguments": {"x": 1}}',
     '{"name": "get", "parameters": {"x": 1}}', "\u00e9\U0001f600", "get(a=1, b='c')"]
)  # fmt: skip


@settings(max_examples=120, deadline=None)
@given(st.data(), st.sampled_from(sorted(FORMATS)), st.lists(FRAGMENTS, max_size=14))
def test_cuts_change_nothing(data: Any, form: str, fragments: list[str]) -> None:
    text = "".join(fragments)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    ends = [0, *cuts, len(text)]
    chunks = [text[start:end] for start, end in itertools.pairwise(ends)]
    whole = read(form, [text])
    assert read(form, chunks) == whole
    assert read(form, list(text)) == whole
    if not whole[2] and form != "harmony":
        # without calls the text is what was written, but for a mark before it
        assert whole[0] in (text, text.removeprefix("<|python_tag|>"))


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["hermes", "mistral", "llama3", "json", "harmony"]),
    st.dictionaries(st.text(max_size=5), st.recursive(
        st.none() | st.booleans() | st.integers(-99, 99) | st.text(max_size=6),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
        max_leaves=6,
    ), max_size=3),
    st.booleans(),
)  # fmt: skip
def test_arguments_come_as_written(form: str, arguments: dict[str, Any], plain: bool) -> None:
    written = json.dumps(arguments, ensure_ascii=plain)
    member = "parameters" if form == "llama3" else "arguments"
    call = f'{{"name": "get", "{member}": {written}}}'
    text = {
        "hermes": f"<tool_call>\n{call}\n</tool_call>",
        "mistral": f"[TOOL_CALLS][{call}]",
        "harmony": f"<|channel|>commentary to=functions.get<|message|>{written}<|call|>",
    }.get(form, call)
    assert read(form, list(text)) == ("", "", [["get", written]])


@pytest.mark.parametrize("form", sorted(FORMATS))
@pytest.mark.parametrize(
    "unit",
    ["<tool_call>", '<tool_call>{"a":[', '<tool_call>{"a":', "[TOOL_CALLS]", "[TOOL_CALLS][",
     "[get(", "{", "[", '{"a":[', "<|channel|>", "(" , "[get(a=[", '"'],
)  # fmt: skip
def test_work_grows_with_the_text(form: str, unit: str) -> None:
    """Ten times the text is not a hundred times the work, counted in characters taken."""

    def work(times: int) -> int:
        reader = Reading(form, NAMES).reader()
        count = 0
        plain = reader.take

        def counted() -> Any:
            nonlocal count
            count += 1
            return plain()

        reader.take = counted  # type: ignore[method-assign]
        reader.push(unit * times)
        reader.finish()
        return count

    assert work(400) <= 12 * work(40)
