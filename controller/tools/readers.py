"""The formats in which models call tools."""

from __future__ import annotations

import ast
import json
import re

from .scanning import END, Read, ToolReader

MAX_CALL_CHARS = 64 * 1024
MAX_CALL_DEPTH = 32
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_.\-]*")


class HermesReader(ToolReader):
    """`<tool_call>{"name": ..., "arguments": ...}</tool_call>`, as Hermes and Qwen write it."""

    def read(self) -> Read[None]:
        while (yield from self.until("<tool_call>", say=self.say)):
            if not (yield from self.call("<tool_call>", marked=True)):
                continue
            character = yield from self.solid()
            self.back(character)
            yield from self.marker("</tool_call>")


class MistralReader(ToolReader):
    """`[TOOL_CALLS]` before a list of objects, or before each `name[ARGS]{...}`."""

    def read(self) -> Read[None]:
        while (yield from self.until("[TOOL_CALLS]", say=self.say)):
            self.note()
            character = yield from self.solid()
            taken = self.noted()
            if character == "[":
                yield from self._list()
            else:
                self.back(taken)
                yield from self._named()

    def _list(self) -> Read[None]:
        lead = "[TOOL_CALLS]["
        while (yield from self.call(lead, marked=True)):
            lead = ""
            if (character := (yield from self.solid())) != ",":
                if character != "]":
                    self.back(character)
                return

    def _named(self) -> Read[None]:
        self.note()
        name: list[str] = []
        found = yield from self.until("[ARGS]", "[CALL_ID]", "{", say=name.append)
        if found == "[CALL_ID]":
            found = yield from self.until("[ARGS]", "{", say=lambda _: None)
        called = "".join(name).strip()
        taken = self.noted()
        if not found:
            self.back(END)
        if not found or not _IDENTIFIER.fullmatch(called):
            self.say("[TOOL_CALLS]" + "".join(taken))
            return
        self.begin(called)
        if found == "{":
            self.back(found)
        yield from self.value(self.argue)


class BareReader(ToolReader):
    """Objects with a name and parameters and nothing else, as Llama 3 writes them.

    Only what the answer begins with can be a call: `{...}`, several of them with `;` between, or
    a list of them.
    """

    def read(self) -> Read[None]:
        yield from self.marker("<|python_tag|>")
        self.note()
        character = yield from self.solid()
        taken = self.noted()
        listed = character == "["
        lead = "".join(taken) if listed else ""
        if not listed:
            self.back(taken)
        while (yield from self.call(lead, marked=False)):
            lead = ""
            if (character := (yield from self.solid())) not in (";", ","):
                if character != "]" or not listed:
                    self.back(character)
                break
        yield from self.rest()


class PythonicReader(ToolReader):
    """`[name(key=value, ...), ...]`, calls of Python with literals, as Llama 4 writes them."""

    def read(self) -> Read[None]:
        yield from self.marker("<|python_start|>")
        self.note()
        character = yield from self.solid()
        taken = self.noted()
        called = False
        while (character == "[" or called) and (yield from self._python_call()):
            called = True
            if (character := (yield from self.solid())) != ",":
                if character != "]":
                    self.back(character)
                break
        if not called:
            self.back(taken)
        yield from self.marker("<|python_end|>")
        yield from self.rest()

    def _python_call(self) -> Read[bool]:
        """One call, given out as a whole; False with nothing taken if it is none."""
        self.note()
        character = yield from self.solid()
        text, depth, quote, escaped = "", 0, "", False
        while character and len(text) <= MAX_CALL_CHARS and depth <= MAX_CALL_DEPTH:
            text += character
            if quote:
                quote = "" if character == quote and not escaped else quote
                escaped = character == "\\" and not escaped
            elif character in "'\"":
                quote = character
            else:
                depth += (character in "([{") - (character in ")]}")
                if depth <= 0 and not (character.isalnum() or character in "_.-"):
                    break
            if not depth and not any(name.startswith(text) for name in self.names):
                break
            character = yield from self.take()
        found = _python_call(text) if character == ")" else None
        if found is None or found[0] not in self.names:
            self.back(self.noted())
            return False
        self.noted()
        self.begin(found[0])
        self.argue(found[1])
        return True


def _python_call(text: str) -> tuple[str, str] | None:
    """(name, arguments as JSON) of a call with literals as its keyword arguments."""
    name, _, rest = text.partition("(")
    try:
        call = ast.parse(f"_({rest}", mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            return None
        values = {item.arg: ast.literal_eval(item.value) for item in call.keywords}
        if None in values:  # f(**something)
            return None
        return name, json.dumps(values, ensure_ascii=False, allow_nan=False)
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        return None


class HarmonyReader(ToolReader):
    """Messages in channels, as gpt-oss writes them: analysis is reasoning, a message to a function
    is a call, and the rest is text."""

    def read(self) -> Read[None]:
        if not (yield from self.marker("<|channel|>", "<|start|>")):
            yield from self.rest()
            return
        while True:
            header: list[str] = []
            if not (yield from self.until("<|message|>", say=header.append)):
                return
            words = "".join(header)
            called = re.search(r"to=functions\.([^\s<]+)", words)
            if called:
                self.begin(called[1])
            say = self.argue if called else self.think if "analysis" in words else self.say
            ends = ("<|end|>", "<|call|>", "<|return|>", "<|start|>")
            if not (yield from self.until(*ends, say=say)):
                return
