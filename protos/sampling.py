"""Sampling parameters: one frozen record, validated once at the door and again in the engine."""

from __future__ import annotations

import math
from typing import Literal

import msgspec

from .errors import FieldViolation, InvalidArgument
from .limits import (
    LOGIT_BIAS_RANGE,
    MAX_BAD_WORD_TOKENS,
    MAX_BAD_WORDS,
    MAX_GRAMMAR_BYTES,
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_N,
    MAX_NGRAM_SIZE,
    MAX_STOP_STRING_BYTES,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
    MIN_P_RANGE,
    PENALTY_RANGE,
    REPETITION_PENALTY_RANGE,
    SEED_RANGE,
    TEMPERATURE_RANGE,
    TOP_P_RANGE,
)


class Grammar(msgspec.Struct, frozen=True, array_like=True):
    """What a text must look like, from its first character to its last."""

    kind: Literal["json_schema", "regex", "choice", "lark"]
    text: str
    """A JSON schema; a regular expression for the whole text; a JSON list of texts; a grammar in
    Lark's notation whose first rule is `start`."""


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """How tokens are chosen. Logits are processed in this order:

    repetition penalty, presence and frequency penalty, logit bias, bans (bad words, n-grams,
    stop ids before `min_tokens`, what the grammar excludes), temperature, top-k, top-p over what top-k left, min-p
    against the best remaining token, then Gumbel-max with counter-based noise.
    """

    max_tokens: int = 0
    """Tokens to generate at most; 0 = as many as the context holds."""
    min_tokens: int = 0
    """End-of-sequence and stop ids are banned, and stop strings ignored, before this many."""
    temperature: float = 1.0
    """0 = greedy, ties to the lowest token id."""
    top_k: int = 0
    """Keep the k best tokens; 0 = all."""
    top_p: float = 1.0
    """Keep the smallest set of best tokens whose probability reaches this."""
    min_p: float = 0.0
    """Keep tokens with at least this fraction of the best token's probability."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens in prompt or output."""
    presence_penalty: float = 0.0
    """Subtracted once from tokens in the output."""
    frequency_penalty: float = 0.0
    """Subtracted per occurrence in the output."""
    no_repeat_ngram_size: int = 0
    """No n-gram of this size occurs twice in prompt + output; 0 = off."""
    logit_bias: dict[int, float] = {}
    """Token id -> value added to its logit."""
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    """Token sequences that must not appear."""
    stop: tuple[str, ...] = ()
    """Strings that end the text; matched on text, also across tokens."""
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end the text."""
    ignore_eos: bool = False
    """Go on after the model's end-of-sequence tokens."""
    include_stop: bool = False
    """Keep the matched stop string in the text."""
    seed: int = 0
    """Key of the random numbers; drawn at admission when the caller gives none."""
    n: int = 1
    """Samples of one prompt, sharing its KV blocks."""
    logprobs: int | None = None
    """Alternatives per sampled token (0 = the sampled one only); None = no log-probabilities."""
    prompt_logprobs: int | None = None
    """The same for prompt tokens; turns the reading of cached prefixes off."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the text."""
    grammar: Grammar | None = None
    """Ban every token that cannot go on to a text of this grammar; the end is banned until one is
    complete."""

    def validate(self, vocab_size: int, field: str = "params") -> None:
        """Raise `InvalidArgument` listing every field out of range for this vocabulary."""
        violations: list[FieldViolation] = []

        def refuse(name: str, value: object, allowed: str) -> None:
            violations.append(FieldViolation(f"{field}.{name}", f"{value!r} is not {allowed}"))

        def number(name: str, bounds: tuple[float, float], *, above: bool = False) -> None:
            value, (low, high) = getattr(self, name), bounds
            if not math.isfinite(value) or not low <= value <= high or (above and value == low):
                bracket = "(" if above else "["
                refuse(name, value, f"a finite number in {bracket}{low:g}, {high:g}]")

        def integer(name: str, low: int, high: int) -> None:
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                refuse(name, value, f"an integer in [{low}, {high}]")

        number("temperature", TEMPERATURE_RANGE)
        number("top_p", TOP_P_RANGE, above=True)
        number("min_p", MIN_P_RANGE)
        number("repetition_penalty", REPETITION_PENALTY_RANGE)
        number("presence_penalty", PENALTY_RANGE)
        number("frequency_penalty", PENALTY_RANGE)
        integer("max_tokens", 0, 2**31 - 1)
        integer("min_tokens", 0, self.max_tokens or 2**31 - 1)
        integer("top_k", 0, 2**31 - 1)
        integer("no_repeat_ngram_size", 0, MAX_NGRAM_SIZE)
        integer("seed", *SEED_RANGE)
        integer("n", 1, MAX_N)
        integer("logprobs", 0, min(MAX_LOGPROBS, vocab_size))
        integer("prompt_logprobs", 0, min(MAX_LOGPROBS, vocab_size))
        self._validate_lists(vocab_size, field, violations)
        if violations:
            raise InvalidArgument(violations)

    def _validate_lists(
        self, vocab_size: int, field: str, violations: list[FieldViolation]
    ) -> None:
        def count(name: str, size: int, limit: int) -> None:
            if size > limit:
                violations.append(
                    FieldViolation(f"{field}.{name}", f"{size} entries, at most {limit} allowed")
                )

        def token(name: str, value: int) -> None:
            if not 0 <= value < vocab_size:
                allowed = f"a token id in [0, {vocab_size})"
                violations.append(FieldViolation(f"{field}.{name}", f"{value} is not {allowed}"))

        if self.grammar is not None:
            size = len(self.grammar.text.encode("utf-8", "surrogatepass"))
            if not 0 < size <= MAX_GRAMMAR_BYTES:
                allowed = f"1 to {MAX_GRAMMAR_BYTES} bytes allowed"
                violations.append(FieldViolation(f"{field}.grammar", f"{size} bytes, {allowed}"))
            if self.ignore_eos:
                text = "true cannot be combined with a grammar, which says where the text ends"
                violations.append(FieldViolation(f"{field}.ignore_eos", text))
        count("stop", len(self.stop), MAX_STOP_STRINGS)
        count("stop_token_ids", len(self.stop_token_ids), MAX_STOP_TOKEN_IDS)
        count("bad_words", len(self.bad_words_ids), 2 * MAX_BAD_WORDS)
        count("logit_bias", len(self.logit_bias), MAX_LOGIT_BIAS)
        for index, text in enumerate(self.stop):
            size = len(text.encode("utf-8", "surrogatepass"))
            if not 0 < size <= MAX_STOP_STRING_BYTES:
                allowed = f"1 to {MAX_STOP_STRING_BYTES} bytes allowed"
                violations.append(
                    FieldViolation(f"{field}.stop[{index}]", f"{size} bytes, {allowed}")
                )
        for index, value in enumerate(self.stop_token_ids):
            token(f"stop_token_ids[{index}]", value)
        for index, word in enumerate(self.bad_words_ids):
            if not 0 < len(word) <= MAX_BAD_WORD_TOKENS:
                allowed = f"1 to {MAX_BAD_WORD_TOKENS} tokens allowed"
                violations.append(
                    FieldViolation(f"{field}.bad_words[{index}]", f"{len(word)} tokens, {allowed}")
                )
            for value in word:
                token(f"bad_words[{index}]", value)
        low, high = LOGIT_BIAS_RANGE
        for key, bias in self.logit_bias.items():
            token("logit_bias", key)
            if not math.isfinite(bias) or not low <= bias <= high:
                allowed = f"a finite number in [{low:g}, {high:g}]"
                violations.append(
                    FieldViolation(f"{field}.logit_bias[{key}]", f"{bias!r} is not {allowed}")
                )
