"""What readers of tool calls share: characters in, pieces out, one character at a time.

A reader is a generator that is sent one character after the other, so what it makes of a text
cannot depend on how the text was cut.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Collection, Generator, Sequence
from dataclasses import dataclass
from typing import TypeVar

Value = TypeVar("Value")
Read = Generator[None, str, Value]

END = ""
"""Sent after the last character."""

MAX_NAME_CHARS = 256
MAX_NUMBER_CHARS = 1024
ARGUMENTS = ("arguments", "parameters")
_SPACE = " \t\r\n"


@dataclass(frozen=True, slots=True)
class Piece:
    """What was found: text, reasoning, or a part of call `call`, whose first part has its name."""

    text: str = ""
    reasoning: str = ""
    call: int | None = None
    name: str = ""
    arguments: str = ""


class ToolReader:
    """Reads the calls of one answer. `read` is what formats differ in.

    names: of the tools that there are; where a format has no marks of its own, nothing else is a
    call. single: only the first call counts, others are dropped.
    """

    def __init__(self, names: Collection[str], *, single: bool = False) -> None:
        self.names, self._single = frozenset(names), single
        self._pieces: list[Piece] = []
        self._again: deque[str] = deque()
        self._noted: list[str] | None = None
        self._space = ""
        self._calls = 0
        self._fresh = False  # nothing was said since the last call
        self._reading = self.read()
        next(self._reading)

    def read(self) -> Read[None]:
        """Take characters with `take` until `END`, and say what they are."""
        raise NotImplementedError

    def push(self, text: str) -> Sequence[Piece]:
        """What is certain now."""
        for character in text:
            self._reading.send(character)
        return self._taken()

    def finish(self) -> Sequence[Piece]:
        """What was held back: the answer is over."""
        try:
            self._reading.send(END)
        except StopIteration:
            if not self._calls:
                self._add(Piece(text=self._space))
        return self._taken()

    def _taken(self) -> Sequence[Piece]:
        pieces, self._pieces = self._pieces, []
        return pieces

    # --- for readers: in ---

    def take(self) -> Read[str]:
        """The next character."""
        character = self._again.popleft() if self._again else (yield)
        if self._noted is not None:
            self._noted.append(character)
        return character

    def solid(self) -> Read[str]:
        """The next character that is no white space."""
        while (character := (yield from self.take())) and character in _SPACE:
            pass
        return character

    def back(self, text: str | Sequence[str]) -> None:
        """Have these characters taken again."""
        self._again.extendleft(reversed(text or [END]))
        if self._noted is not None and text:
            del self._noted[-len(text) :]
        elif self._noted is not None:
            self._noted.pop()

    def note(self) -> None:
        """From here on, remember what is taken."""
        self._noted = []

    def noted(self) -> list[str]:
        """What was taken since `note`, which ends."""
        found, self._noted = self._noted or [], None
        return found

    def marker(self, *markers: str) -> Read[str]:
        """The marker that comes next; "" where none does, with nothing taken."""
        seen = ""
        while True:
            character = yield from self.take()
            seen += character
            if seen in markers:
                return seen
            if not character or not any(item.startswith(seen) for item in markers):
                self.back([*seen, END] if not character else seen)
                return ""

    def rest(self) -> Read[None]:
        """Say all that is left."""
        while character := (yield from self.take()):
            self.say(character)

    def until(self, *markers: str, say: Callable[[str], None]) -> Read[str]:
        """Say characters up to a marker, which is taken; "" where the text ends without one."""
        firsts = {item[0] for item in markers}
        while True:
            character = yield from self.take()
            if not character:
                return ""
            if character in firsts:
                self.back(character)
                if found := (yield from self.marker(*markers)):
                    return found
                yield from self.take()
            say(character)

    # --- for readers: out ---

    def say(self, text: str) -> None:
        """Text of the answer. White space around calls is dropped."""
        for character in text:
            if character in _SPACE:
                self._space += "" if self._fresh else character
            else:
                self._add(Piece(text=self._space + character))
                self._space, self._fresh = "", False

    def think(self, text: str) -> None:
        """Text before the answer."""
        self._add(Piece(reasoning=text))

    def begin(self, name: str) -> None:
        """A call begins."""
        self._calls += 1
        self._space, self._fresh = "", True
        self._add(Piece(call=self._calls - 1, name=name))

    def argue(self, text: str) -> None:
        """More of its arguments."""
        self._add(Piece(call=self._calls - 1, arguments=text))

    def _add(self, piece: Piece) -> None:
        if piece.call is not None and piece.call > 0 and self._single:
            return
        last = self._pieces[-1] if self._pieces else Piece()
        if last.call == piece.call and not piece.name and self._pieces:
            self._pieces[-1] = Piece(
                last.text + piece.text,
                last.reasoning + piece.reasoning,
                last.call,
                last.name,
                last.arguments + piece.arguments,
            )
        elif piece != Piece():
            self._pieces.append(piece)

    # --- JSON ---

    def value(self, say: Callable[[str], None]) -> Read[bool]:
        """Say the characters of the JSON value that comes next; whether it came to its end."""
        depth, size, quoted, escaped = 0, 0, False, False
        character = yield from self.solid()
        bare = character not in '{["'
        while character:
            if bare and character in ",}]" + _SPACE:
                self.back(character)
                return True
            say(character)
            if quoted:
                quoted = escaped or character != '"'
                escaped = character == "\\" and not escaped
            elif character == '"':
                quoted = True
            else:
                depth += (character in "{[") - (character in "}]")
            if not bare and not quoted and depth == 0:
                return True
            size += 1
            if bare and size > MAX_NUMBER_CHARS:
                return False
            character = yield from self.take()
        self.back(character)
        return False

    def call(self, lead: str = "", *, marked: bool) -> Read[bool]:
        """An object with a name and its arguments. What is none is text, after `lead`, and is not
        read again: the work grows with the text, not with its square.

        marked: what comes is meant to be a call, so that any name will do.
        """
        found = _Found(self, marked)
        self.note()
        whole = (yield from self._members(found)) and found.end()
        taken = self.noted()
        if not whole and END in taken:
            self.back(END)
        if not found.begun:
            self.say(lead + "".join(taken))
        return found.begun

    def _members(self, found: _Found) -> Read[bool]:
        if (yield from self.solid()) != "{":
            return False
        while True:
            character = yield from self.solid()
            if character in ("}", ","):
                if character == "}":
                    return True
                continue
            if character != '"':
                if not character:
                    self.back(character)
                return False
            self.back(character)
            key: list[str] = []
            if not (yield from self.value(key.append)) or (yield from self.solid()) != ":":
                return False
            character = yield from self.solid()
            self.back(character)
            if not (yield from self._member(_text(key), character, found)):
                return False

    def _member(self, key: str, first: str, found: _Found) -> Read[bool]:
        if key in ARGUMENTS:
            return first == "{" and (yield from self.value(found.argue))
        value: list[str] = []
        if not (yield from self.value(value.append)):
            return False
        return found.called(_text(value)) if key == "name" else True


class _Found:
    """A call that is being read; it begins once its name and arguments are known to come."""

    def __init__(self, reader: ToolReader, marked: bool) -> None:
        self._reader, self._marked = reader, marked
        self._name, self._early = "", ""
        self.begun = False

    def called(self, name: str) -> bool:
        """Its name; whether it can be one."""
        self._name = self._name or name
        if self._early:
            self._begin()
        return 0 < len(name) <= MAX_NAME_CHARS and (self._marked or name in self._reader.names)

    def argue(self, text: str) -> None:
        """A character of its arguments."""
        if self.begun:
            self._reader.argue(text)
            return
        self._early += text
        if self._name:
            self._begin()

    def end(self) -> bool:
        """It is complete; whether it was a call."""
        if not self.begun and self._name and (self._marked or self._early):
            self._early = self._early or "{}"
            self._begin()
        return self.begun

    def _begin(self) -> None:
        if self._marked or self._name in self._reader.names:
            self.begun = True
            self._reader.begin(self._name)
            self._reader.argue(self._early)


def _text(characters: Sequence[str]) -> str:
    """The text that a JSON string is, "" for another value."""
    try:
        value = json.loads("".join(characters))
    except ValueError:
        return ""
    return value if isinstance(value, str) else ""
