"""Grammars against Python's own regular expressions, and those that are refused."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phalanx.protos.errors import InvalidArgument, ModelError
from phalanx.protos.grammars import GrammarCompiler, GrammarState
from phalanx.protos.sampling import Grammar, SamplingParams

LETTERS = "ab1 "
END = len(LETTERS)


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    """A vocabulary of four letters and an end."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = {letter: index for index, letter in enumerate(LETTERS.replace(" ", "Ġ"))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["</s>"])
    return GrammarCompiler(tokenizer.to_str(), len(LETTERS) + 1, [END])


def allowed(state: GrammarState, output: list[int]) -> set[int]:
    mask = int.from_bytes(state.allowed(output), "little")
    return {token for token in range(len(LETTERS) + 1) if mask >> token & 1}


PATTERNS = ["a*b", "(a|b1)+", "a{2,4}1?", "[ab]b", "(ab)*", "a ?1"]


@settings(deadline=None)
@given(st.sampled_from(PATTERNS), st.data())
def test_what_is_allowed_is_what_can_still_match(
    compiler: GrammarCompiler, pattern: str, data: st.DataObject
) -> None:
    state = GrammarState(compiler.compile(Grammar("regex", pattern)))
    output: list[int] = []
    for _ in range(6):
        found = allowed(state, output)
        expected = {
            token
            for token in range(len(LETTERS))
            if can_match(pattern, output_text(output) + LETTERS[token])
        }
        if re.fullmatch(pattern, output_text(output)):
            expected.add(END)
        assert found == expected
        assert allowed(state.copy(), output) == found
        if not expected - {END}:
            break
        output.append(data.draw(st.sampled_from(sorted(expected - {END}))))


def output_text(output: list[int]) -> str:
    return "".join(LETTERS[token] for token in output)


def can_match(pattern: str, start: str, depth: int = 4) -> bool:
    """Whether some continuation of up to `depth` letters matches, by trying all."""
    if re.fullmatch(pattern, start):
        return True
    return depth > 0 and any(can_match(pattern, start + more, depth - 1) for more in LETTERS)


@pytest.mark.parametrize(
    ("grammar", "word"),
    [
        (Grammar("json_schema", "{"), "not JSON"),
        (Grammar("json_schema", '{"type": "objekt"}'), "objekt"),
        (Grammar("regex", "(a"), "regex"),
        (Grammar("choice", '"a"'), "list"),
        (Grammar("choice", "[]"), "entries"),
        (Grammar("choice", '["a", ""]'), "empty"),
        (Grammar("lark", "begin: A"), "start"),
        (Grammar("json_schema", "[" * 20_000), "not JSON"),
        (Grammar("json_schema", '{"$ref": "#"}'), "no text"),
    ],
)
def test_a_refusal_says_why(compiler: GrammarCompiler, grammar: Grammar, word: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        compiler.compile(grammar)
    (violation,) = caught.value.violations
    assert violation.field == "params.grammar"
    assert grammar.kind in violation.description and word in violation.description


BOMBS = [
    Grammar("regex", "((a{1,900}){1,900}){1,900}b"),
    Grammar("regex", "(a|a|b|b)*" * 500 + "1"),
    Grammar("lark", 'start: e\ne: e e | e e e | "a" | ""'),
    Grammar(
        "json_schema", '{"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}]}}, "$ref": "#/$defs/a"}'
    ),
    Grammar("json_schema", '{"allOf": [' + ",".join(['{"minProperties": 2}'] * 2000) + "]}"),
]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("grammar", BOMBS)
def test_a_bomb_is_refused_or_harmless(compiler: GrammarCompiler, grammar: Grammar) -> None:
    """What would take hours without limits ends, one way or another, long before the timeout."""
    try:
        state = GrammarState(compiler.compile(grammar))
        output: list[int] = []
        while len(output) < 200 and (found := allowed(state, output) - {END}):
            output.append(min(found))
    except InvalidArgument as error:
        assert "grammar" in str(error)


def test_tokens_that_the_grammar_excludes_are_an_error(compiler: GrammarCompiler) -> None:
    state = GrammarState(compiler.compile(Grammar("regex", "ab")))
    with pytest.raises(InvalidArgument, match="grammar"):
        state.allowed([1])


def test_a_model_without_an_end_has_no_grammars() -> None:
    with pytest.raises(ModelError, match="end-of-sequence"):
        GrammarCompiler("{}", 5, [])
    with pytest.raises(ModelError, match="tokenizer"):
        GrammarCompiler("{}", 5, [4])


@pytest.mark.parametrize(
    ("changes", "field"),
    [({"ignore_eos": True}, "params.ignore_eos"), ({}, "params.grammar")],
)
def test_parameters_that_contradict_it(changes: dict[str, Any], field: str) -> None:
    text = "a" if changes else "a" * 70_000
    params = SamplingParams(grammar=Grammar("regex", text), **changes)
    with pytest.raises(InvalidArgument) as caught:
        params.validate(10)
    assert [item.field for item in caught.value.violations] == [field]
