"""Which format a template stands for, and grammars that hold texts to calls."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from phalanx.controller.tools.formats import FORMATS, Reading, Tool, detect, forced_calls
from phalanx.protos.errors import InvalidArgument
from phalanx.protos.grammars import GrammarCompiler

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"],
          "additionalProperties": False}  # fmt: skip
TOOLS = [Tool("get", "", json.dumps(SCHEMA)), Tool("now", "", "")]
SPECIAL = ["<end>", "[TOOL_CALLS]", "<|channel|>", "<|message|>", "<|constrain|>"]


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ('<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}', "hermes"),
        ("<tool_call><function=name><parameter=x>", None),
        ("{% if x %}[TOOL_CALLS]{% endif %}", "mistral"),
        ("<|start|>assistant<|channel|>final<|message|>", "harmony"),
        ("<|python_tag|>", "llama3"),
        ('Respond with {"name": f, "parameters": dictionary of argument name and its value}', "llama3"),
        ("[func_name1(params_name1=params_value1", "pythonic"),
        ("{{ tools | tojson }}", None),
    ],
)  # fmt: skip
def test_a_template_names_its_format(template: str, name: str | None) -> None:
    assert detect(template) == name


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(SPECIAL)
    return made


CALL = '{"name": "get", "arguments": {"a": 1}}'
BARE = '{"name": "get", "parameters": {"a": 1}}'
GOOD = {
    "hermes": f"<tool_call>\n{CALL}\n</tool_call>",
    "mistral": f"[TOOL_CALLS][{CALL}]",
    "llama3": BARE,
    "pythonic": BARE,
    "json": CALL,
    "harmony": '<|channel|>commentary to=functions.get <|constrain|>json<|message|>{"a": 1}',
}


@pytest.mark.parametrize("form", sorted(FORMATS))
def test_a_forced_text_is_a_call(form: str, tokenizer: Any) -> None:
    """Of tools that there are, with arguments of their schema; and it is read back as that."""

    def spell(marker: str) -> str:
        return f"<[{tokenizer.token_to_id(marker)}]>" if marker in SPECIAL else json.dumps(marker)

    end = tokenizer.token_to_id("<end>")
    compiler = GrammarCompiler(tokenizer.to_str(), tokenizer.get_vocab_size(), [end])

    def accepted(text: str, *, single: bool) -> bool:
        matcher = compiler.compile(forced_calls(form, TOOLS, spell, single=single))
        ids = tokenizer.encode(text).ids
        return matcher.validate_tokens(ids) == len(ids) and matcher.consume_tokens([*ids, end])

    good = GOOD[form]
    assert accepted(good, single=True)
    assert accepted(good, single=False)
    for wrong in (good.replace("get", "got"), good.replace("1", '"1"'), "Hello", good[:-2]):
        assert not accepted(wrong, single=False), wrong
    both = {"mistral": f"[TOOL_CALLS][{CALL}, {CALL}]", "hermes": f"{good}\n{good}"}
    if form != "harmony":
        twice = both.get(form, f"{good}; {good}")
        assert accepted(twice, single=False)
        assert not accepted(twice, single=True)
    reader = Reading("json" if form == "pythonic" else form, ("get", "now")).reader()
    pieces = [*reader.push(good), *reader.finish()]
    assert [piece.name for piece in pieces if piece.name] == ["get"]
    assert "".join(piece.arguments for piece in pieces) == '{"a": 1}'


def test_a_schema_that_cannot_be_kept_to_is_refused(tokenizer: Any) -> None:
    end = tokenizer.token_to_id("<end>")
    compiler = GrammarCompiler(tokenizer.to_str(), tokenizer.get_vocab_size(), [end])
    tool = Tool("get", "", '{"type": "nothing that there is"}')
    with pytest.raises(InvalidArgument):
        compiler.compile(forced_calls("json", [tool], json.dumps, single=True))
