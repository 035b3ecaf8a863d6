"""Tokens to text, one token at a time, and the stop strings in that text.

Everything here is a pure function of the list of output tokens: how they are cut into events
changes neither the text, nor where it is cut, nor why.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from tokenizers import Tokenizer

from phalanx.protos.errors import ModelError

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Stage(Protocol):
    """A part of a tokenizer's decoder, fed piece by piece."""

    def push(self, piece: str) -> Sequence[str]:
        """The pieces that are final now that `piece` has come."""

    def flush(self) -> Sequence[str]:
        """The pieces held back until now; the text is over."""


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet: a printable character for each byte (Radford et al. 2019)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    pairs = [(chr(byte), byte) for byte in printable]
    return dict(pairs + [(chr(256 + index), byte) for index, byte in enumerate(others)])


class _ByteLevel:
    """Pieces spell bytes; a character is given out with its last byte, U+FFFD for broken ones."""

    alphabet = _byte_alphabet()

    def __init__(self, whole: dict[str, str | None]) -> None:
        """whole: pieces of whole characters with their text, None for others; filled here."""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._whole, self._amid = whole, False

    def push(self, piece: str) -> Sequence[str]:
        try:
            text = self._whole[piece]
        except KeyError:
            text = self._whole[piece] = self._alone(piece)
        if self._amid or text is None:
            text = self._decoder.decode(self._bytes(piece))
            self._amid = self._decoder.getstate() != (b"", 0)
        return (text,)

    def flush(self) -> Sequence[str]:
        self._amid = False
        return (self._decoder.decode(b"", True),)

    def _bytes(self, piece: str) -> bytes:
        try:
            return bytes([self.alphabet[char] for char in piece])
        except KeyError:  # an added token outside the alphabet stands for itself
            return piece.encode()

    def _alone(self, piece: str) -> str | None:
        try:
            return self._bytes(piece).decode()
        except UnicodeDecodeError:
            return None


class _ByteFallback:
    """Joins a run of byte pieces.

    One wrong byte turns every byte of its run into U+FFFD, as the tokenizers library does: hence
    a run is given out when it is over, not before.
    """

    def __init__(self) -> None:
        self._run = bytearray()

    def push(self, piece: str) -> Sequence[str]:
        if match := _BYTE_PIECE.fullmatch(piece):
            self._run.append(int(match[1], 16))
            return ()
        return (*self.flush(), piece) if self._run else (piece,)

    def flush(self) -> Sequence[str]:
        if not self._run:
            return ()
        run, self._run = self._run, bytearray()
        try:
            return (run.decode(),)
        except UnicodeDecodeError:
            return ("\ufffd" * len(run),)


class _Replace:
    def __init__(self, old: str, new: str) -> None:
        self._old, self._new = old, new

    def push(self, piece: str) -> Sequence[str]:
        return (piece.replace(self._old, self._new),)

    def flush(self) -> Sequence[str]:
        return ()


class _Metaspace:
    """The replacement character is a space, and nothing within the first piece."""

    def __init__(self, mark: str, drop_first: bool) -> None:
        self._mark, self._space = mark, "" if drop_first else " "

    def push(self, piece: str) -> Sequence[str]:
        text, self._space = piece.replace(self._mark, self._space), " "
        return (text,)

    def flush(self) -> Sequence[str]:
        return ()


class _StripStart:
    """Removes up to `count` leading characters of the whole text."""

    def __init__(self, char: str, count: int) -> None:
        self._char, self._left = char, count

    def push(self, piece: str) -> Sequence[str]:
        while self._left and piece:
            if piece[0] != self._char:
                self._left = 0
                break
            piece, self._left = piece[1:], self._left - 1
        return (piece,)

    def flush(self) -> Sequence[str]:
        return ()


class TokenTexts:
    """How one model's tokens become text, exactly as `tokenizer.decode` does it.

    The tokenizer's decoder is read once and its steps are followed token by token, at a constant
    cost per token. Raises `ModelError` for a decoder that cannot be followed this way.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder().values()
        self._special = frozenset(token.content for token in added if token.special)
        self._pieces: dict[int, str | None] = {}
        self._whole: dict[str, str | None] = {}
        self._steps = _flatten(json.loads(tokenizer.to_str())["decoder"])
        self._stages()
        self._alone: dict[int, str] = {}

    def piece(self, token_id: int) -> str | None:
        """The vocabulary's spelling; None for an id that the tokenizer does not have."""
        try:
            return self._pieces[token_id]
        except KeyError:
            piece = self._pieces[token_id] = self._tokenizer.id_to_token(token_id)
            return piece

    def is_special(self, piece: str) -> bool:
        return piece in self._special

    def alone(self, token_id: int) -> str:
        """The text of one token on its own, with its leading space; "" for unknown ids."""
        if token_id not in self._alone:
            piece = self.piece(token_id)
            stages = [stage for stage in self._stages() if not isinstance(stage, _StripStart)]
            for stage in stages:
                if isinstance(stage, _Metaspace):
                    stage.push("")  # not the first piece of a text
            self._alone[token_id] = "" if piece is None else _run(stages, piece, last=True)
        return self._alone[token_id]

    def stream(self, skip_special: bool) -> TokenStream:
        """A fresh text of this model."""
        return TokenStream(self, self._stages(), skip_special)

    def _stages(self) -> list[Stage]:
        stages: list[Stage] = []
        fused = False
        for step in self._steps:
            match step:
                case {"type": "ByteLevel"}:
                    stages.append(_ByteLevel(self._whole))
                case {"type": "ByteFallback"}:
                    stages.append(_ByteFallback())
                case {"type": "Fuse"}:
                    fused = True
                    continue
                case {"type": "Replace", "pattern": {"String": old}, "content": new} if not fused:
                    stages.append(_Replace(old, new))
                case {"type": "Metaspace", "replacement": mark, "prepend_scheme": scheme}:
                    stages.append(_Metaspace(mark, scheme != "never"))
                case {"type": "Strip", "content": char, "start": count, "stop": 0} if fused:
                    stages.append(_StripStart(char, count))
                case _:
                    raise ModelError(
                        "the tokenizer's decoder is not supported: it has a step of type "
                        f"{step.get('type')!r:.40} that needs the whole text"
                    )
            if fused and not isinstance(stages[-1], _StripStart):
                raise ModelError("the tokenizer's decoder is not supported: steps after Fuse")
        return stages


def _flatten(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    if decoder is None:
        raise ModelError("the tokenizer has no decoder: its tokens cannot become text")
    if decoder["type"] != "Sequence":
        return [decoder]
    return [step for part in decoder["decoders"] for step in _flatten(part)]


def _run(stages: Iterable[Stage], piece: str | None, *, last: bool) -> str:
    """Send a piece through all stages; with `last`, also what they hold back."""
    pieces: Sequence[str] = () if piece is None else (piece,)
    for stage in stages:
        through = [text for piece in pieces for text in stage.push(piece)]
        pieces = [*through, *stage.flush()] if last else through
    return "".join(pieces)


class TokenStream:
    """The text of one sample. All pieces joined equal `tokenizer.decode` of all the tokens."""

    def __init__(self, texts: TokenTexts, stages: list[Stage], skip_special: bool) -> None:
        self._texts, self._stages, self._skip = texts, stages, skip_special

    def push(self, token_id: int) -> str:
        """The text that is certain now. Incomplete characters are held back."""
        piece = self._texts.piece(token_id)
        if piece is None or (self._skip and self._texts.is_special(piece)):
            return ""
        if len(self._stages) == 1:
            return "".join(self._stages[0].push(piece))
        return _run(self._stages, piece, last=False)

    def flush(self) -> str:
        """What was held back: the sample is over. Incomplete characters become U+FFFD."""
        return _run(self._stages, None, last=True)


class StopStrings:
    """Finds the stop string whose match ends first; of those that end together, the longest.

    Text is held back while it could be the beginning of a stop string.
    """

    def __init__(self, stops: Sequence[str], include: bool) -> None:
        self._stops, self._include = tuple(stops), include
        self._held = ""

    def push(self, text: str, *, armed: bool = True) -> tuple[str, str | None]:
        """(text to give out, the stop string that ended it or None).

        Only matches that end within `text` are looked for, and none unless `armed`.
        """
        if not self._stops:
            return text, None
        known = len(self._held)
        text = self._held + text
        if armed and (found := self._find(text, known)):
            end, stop = found
            return text[: end if self._include else end - len(stop)], stop
        start = self._first_open(text)
        self._held = text[start:]
        return text[:start], None

    def flush(self) -> str:
        """What was held back, after the last push."""
        held, self._held = self._held, ""
        return held

    def _find(self, text: str, known: int) -> tuple[int, str] | None:
        best: tuple[int, str] | None = None
        for stop in self._stops:
            start = text.find(stop, max(0, known - len(stop) + 1))
            if start < 0:
                continue
            end = start + len(stop)
            if best is None or end < best[0] or (end == best[0] and len(stop) > len(best[1])):
                best = end, stop
        return best

    def _first_open(self, text: str) -> int:
        """Where the longest end of `text` starts that is a proper beginning of a stop string."""
        first = len(text)
        for stop in self._stops:
            start = text.find(stop[0], max(0, len(text) - len(stop) + 1))
            while 0 <= start < first:
                if stop.startswith(text[start:]):
                    first = start
                    break
                start = text.find(stop[0], start + 1)
        return first


class SampleText:
    """The text of one sample with its stop strings: tokens in, pieces of text out."""

    def __init__(
        self, stream: TokenStream, stops: Sequence[str] = (), *, include: bool, min_tokens: int
    ) -> None:
        self._stream, self._min_tokens = stream, min_tokens
        self._stops = StopStrings(stops, include)
        self.count = 0
        """Tokens pushed."""
        self.stopped: str | None = None
        """The stop string that ended the text; nothing may be pushed after it."""

    def push(self, token_id: int) -> str:
        """The text that this token makes certain; a match counts from `min_tokens` tokens on."""
        self.count += 1
        return self._match(self._stream.push(token_id))

    def skip(self) -> None:
        """Count a token that adds no text: the one that ended the sample."""
        self.count += 1

    def finish(self) -> str:
        """The rest of the text, unless a stop string has ended it."""
        if self.stopped is not None:
            return ""
        text = self._match(self._stream.flush())
        return text if self.stopped is not None else text + self._stops.flush()

    def _match(self, text: str) -> str:
        if not text:
            return ""
        text, self.stopped = self._stops.push(text, armed=self.count >= self._min_tokens)
        return text
