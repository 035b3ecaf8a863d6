"""Tokens to text one by one, against the tokenizers library on the whole; stops against the
whole text."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from phalanx.controller.server.tokens import SampleText, TokenTexts
from phalanx.protos.errors import ModelError

PIECES = [
    "the",
    "qu",
    "ick",
    "東",
    "京",
    "é",
    "a",
    "b",
    "<",
    ">",
    "x1",
    "\u2581",
    "\u2581the",
    "\u2581a",
]
BYTE_PIECES = [f"<0x{byte:02X}>" for byte in range(256)]
KINDS = ("byte-level", "llama-2", "gemma", "metaspace", "metaspace-never")


@cache
def tokenizer(kind: str) -> Tokenizer:
    if kind == "byte-level":
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        pieces = [*alphabet, "the", "Ġthe", "Ġquick", "ðŁ", "ðŁĺĢ", "Ã", "æĿ", "Ġ", "ĠĠ", "©Ã"]
        decoder: object = decoders.ByteLevel()
    else:
        pieces = [*PIECES, *BYTE_PIECES]
        mark = decoders.Replace("\u2581", " ")
        steps = [mark, decoders.ByteFallback(), decoders.Fuse()]
        decoder = {
            "llama-2": decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)]),
            "gemma": decoders.Sequence(steps),
            "metaspace": decoders.Metaspace(),
            "metaspace-never": decoders.Metaspace(prepend_scheme="never"),
        }[kind]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.decoder = decoder  # type: ignore[assignment]
    made.add_special_tokens([AddedToken("<|end|>"), AddedToken("<ünï>")])
    made.add_tokens([AddedToken("<plain 東京>"), AddedToken("\u2581added")])
    return made


def ids_of(kind: str) -> st.SearchStrategy[list[int]]:
    size = tokenizer(kind).get_vocab_size()
    return st.lists(st.integers(0, size + 2), max_size=24)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_pieces_joined_equal_the_decoded_whole(kind: str, skip: bool) -> None:
    texts = TokenTexts(tokenizer(kind))

    @settings(max_examples=150, deadline=None)
    @given(ids_of(kind))
    def check(ids: list[int]) -> None:
        stream = texts.stream(skip)
        pieces = [stream.push(token) for token in ids]
        whole = tokenizer(kind).decode(ids, skip_special_tokens=skip)
        assert "".join(pieces) + stream.flush() == whole

    check()


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_given_out_is_never_taken_back(kind: str) -> None:
    """Every piece given out belongs to the text, however it goes on."""
    texts = TokenTexts(tokenizer(kind))

    @settings(max_examples=100, deadline=None)
    @given(ids_of(kind), ids_of(kind))
    def check(ids: list[int], more: list[int]) -> None:
        stream = texts.stream(False)
        given_out = "".join(stream.push(token) for token in ids)
        whole = tokenizer(kind).decode(ids + more, skip_special_tokens=False)
        assert whole.startswith(given_out)

    check()


def test_characters_come_out_with_their_last_byte() -> None:
    made = tokenizer("byte-level")
    stream = TokenTexts(made).stream(True)
    smile = [made.token_to_id(piece) for piece in ("ðŁ", "ĺ", "Ģ")]
    assert [stream.push(token) for token in smile] == ["", "", "😀"]


def test_a_lone_token_has_its_leading_space() -> None:
    for kind, piece, text in (
        ("byte-level", "Ġthe", " the"),
        ("llama-2", "\u2581the", " the"),
        ("gemma", "\u2581", " "),
        ("metaspace", "\u2581the", " the"),
        ("llama-2", "<0x41>", "A"),
        ("byte-level", "ðŁ", "\ufffd"),
        ("llama-2", "<|end|>", "<|end|>"),
    ):
        made = tokenizer(kind)
        texts = TokenTexts(made)
        assert texts.alone(made.token_to_id(piece)) == text
        assert texts.alone(10**6) == ""


@pytest.mark.parametrize(
    "decoder",
    [
        None,
        decoders.WordPiece(),
        decoders.CTC(),
        decoders.Sequence([decoders.Fuse(), decoders.Replace("a", "b")]),
        decoders.Sequence([decoders.Strip(" ", 1, 0)]),
    ],
)
def test_decoders_that_cannot_be_followed_are_refused(decoder: object) -> None:
    made = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    if decoder is not None:
        made.decoder = decoder  # type: ignore[assignment]
    with pytest.raises(ModelError, match="decoder"):
        TokenTexts(made)


# --- stop strings ---

LETTERS = Tokenizer(
    models.BPE(vocab={p: i for i, p in enumerate(["a", "b", "c", "ab", "ba", "abc"])}, merges=[])
)
LETTERS.decoder = decoders.ByteLevel()
Ids = st.lists(st.integers(0, 5), max_size=20)
Stops = st.lists(st.text("abc", min_size=1, max_size=4), max_size=4)


def lengths(ids: list[int]) -> list[int]:
    """Characters after each number of tokens."""
    return [len(LETTERS.decode(ids[:count])) for count in range(len(ids) + 1)]


@settings(max_examples=300, deadline=None)
@given(Ids, Stops, st.booleans(), st.integers(0, 8))
def test_stops_equal_a_search_in_the_whole_text(
    ids: list[int], stops: list[str], include: bool, min_tokens: int
) -> None:
    whole, sizes = LETTERS.decode(ids), lengths(ids)
    ignored = sizes[min(max(0, min_tokens - 1), len(ids))]
    found = [
        (end, -len(stop), stop)
        for stop in stops
        for end in range(len(whole) + 1)
        if whole[:end].endswith(stop) and end > ignored
    ]
    expected, reason, count = whole, None, len(ids)
    if found:
        end, size, reason = min(found)
        expected = whole[: end if include else end + size]
        count = next(n for n, length in enumerate(sizes) if length >= end)

    sample = SampleText(
        TokenTexts(LETTERS).stream(True), stops, include=include, min_tokens=min_tokens
    )
    text = ""
    for token in ids:
        text += sample.push(token)
        assert expected.startswith(text)
        if sample.stopped:
            break
    text += sample.finish()
    assert (text, sample.stopped, sample.count) == (expected, reason, count)


@settings(max_examples=150, deadline=None)
@given(Ids, Stops)
def test_no_more_text_is_held_back_than_could_begin_a_stop(
    ids: list[int], stops: list[str]
) -> None:
    sample = SampleText(TokenTexts(LETTERS).stream(True), stops, include=False, min_tokens=0)
    text = ""
    for count, token in enumerate(ids, 1):
        text += sample.push(token)
        if sample.stopped:
            return
        held = LETTERS.decode(ids[:count])[len(text) :]
        assert not held or any(stop.startswith(held) for stop in stops)


def test_a_stop_in_what_only_the_end_makes_certain() -> None:
    """A broken character becomes U+FFFD at the end; it may be the stop string."""
    made = tokenizer("byte-level")
    sample = SampleText(TokenTexts(made).stream(True), ["\ufffd"], include=False, min_tokens=0)
    assert sample.push(made.token_to_id("the")) == "the"
    assert sample.push(made.token_to_id("ðŁ")) == ""
    assert sample.finish() == ""
    assert sample.stopped == "\ufffd"
