"""Grammars as `llguidance` knows them, with limits: one compiler for the door and for the ranks.

Everything that a grammar can cost is bounded by fuel, counted in work and not in time, so that
every rank stops at the same place. No process is needed that could be killed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .errors import InvalidArgument, ModelError
from .limits import MAX_CHOICES
from .sampling import Grammar

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits
    from llguidance._lib import JsonCompileOptions

FIELD = "params.grammar"
MAX_ERROR_CHARS = 300
JSON_DEFAULTS: JsonCompileOptions = {"whitespace_pattern": r"[ \t\n\r]{0,64}"}
"""JSON may be indented; with no bound, some models write line ends until their tokens are over."""


class GrammarCompiler:
    """Grammars over one vocabulary. Building one takes some seconds for a large tokenizer."""

    def __init__(self, tokenizer: str, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        """tokenizer: JSON as `tokenizers` writes it. Raises `ModelError` for one that grammars
        cannot be made for."""
        from llguidance import LLTokenizer

        if not eos_token_ids:
            raise ModelError("grammar: the model has no end-of-sequence token")
        try:
            self._tokenizer = LLTokenizer(
                tokenizer, n_vocab=vocab_size, eos_token=list(eos_token_ids)
            )
        except Exception as error:  # noqa: BLE001  the native library raises bare exceptions
            raise ModelError(f"grammar: the tokenizer is not supported: {error!s:.200}") from None

    def compile(self, grammar: Grammar) -> LLMatcher:
        """A matcher at the beginning. Raises `InvalidArgument` saying what is wrong."""
        from llguidance import LLMatcher

        matcher = LLMatcher(self._tokenizer, _source(grammar), log_level=0, limits=_limits())
        if matcher.is_error():
            raise _refused(grammar.kind, matcher.get_error())
        matcher.compute_bitmask()  # a grammar may be well formed, and have no text at all
        if matcher.is_error():
            raise _refused(grammar.kind, f"no text can begin: {matcher.get_error()}")
        return matcher


class GrammarState:
    """Where one sample stands in its grammar."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher, self._consumed = matcher, 0

    def copy(self) -> GrammarState:
        """Another sample in the same place."""
        other = GrammarState(self._matcher.deep_copy())
        other._consumed = self._consumed
        return other

    def allowed(self, output: Sequence[int]) -> bytes:
        """The tokens that may follow `output`: a bit each, the lowest id in the lowest bit.

        output: all tokens of the sample so far, which only grow from call to call. Raises
        `InvalidArgument` where the grammar is too complex there, or excludes what has come.
        """
        matcher = self._matcher
        fresh = list(output[self._consumed :])
        if fresh and not matcher.consume_tokens(fresh):
            raise InvalidArgument.of(FIELD, _short(matcher.get_error()))
        self._consumed = len(output)
        mask: bytes = matcher.compute_bitmask()
        if matcher.is_error():
            raise InvalidArgument.of(FIELD, _short(matcher.get_error()))
        return mask


def _limits() -> LLParserLimits:
    from llguidance import LLParserLimits

    return LLParserLimits(
        max_items_in_row=1000,
        initial_lexer_fuel=1_000_000,
        step_lexer_fuel=100_000,
        step_max_items=20_000,
        max_lexer_states=20_000,
        max_grammar_size=100_000,
        precompute_large_lexemes=False,
        verbose_errors=False,
    )


def _source(grammar: Grammar) -> str:
    from llguidance import LLMatcher

    text = grammar.text
    if grammar.kind == "lark":
        source: str = LLMatcher.grammar_from_lark(text)
    elif grammar.kind == "regex":
        source = LLMatcher.grammar_from_regex(text)
    elif grammar.kind == "choice":
        source = LLMatcher.grammar_from_lark(_choices(text))
    else:
        try:
            json.loads(text)
            source = LLMatcher.grammar_from_json_schema(text, JSON_DEFAULTS)
        except (ValueError, RecursionError) as error:
            raise _refused(grammar.kind, f"not JSON: {error}") from None
    return source


def _choices(text: str) -> str:
    try:
        choices = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _refused("choice", f"not JSON: {error}") from None
    if not isinstance(choices, list) or not all(isinstance(item, str) and item for item in choices):
        raise _refused("choice", "a list of texts, none empty, is allowed")
    if not 1 <= len(choices) <= MAX_CHOICES:
        raise _refused("choice", f"{len(choices)} entries, 1 to {MAX_CHOICES} allowed")
    return "start: " + " | ".join(json.dumps(item, ensure_ascii=False) for item in choices)


def _short(text: str) -> str:
    return " ".join(text.split())[:MAX_ERROR_CHARS]


def _refused(kind: str, why: str) -> InvalidArgument:
    return InvalidArgument.of(FIELD, f"{kind}: {_short(why)}")
