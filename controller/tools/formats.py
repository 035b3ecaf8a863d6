"""Which format a model calls tools in, and texts that are held to it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from phalanx.protos.sampling import Grammar

from .readers import BareReader, HarmonyReader, HermesReader, MistralReader, PythonicReader
from .scanning import ToolReader

ANY_ARGUMENTS = '{"type":"object"}'
_PLAIN = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""JSON as it stands in what models learn calls from: on one line, a space behind each mark."""


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that may be called. parameters: a JSON schema as text, "" for none."""

    name: str
    description: str
    parameters: str


class Reading(msgspec.Struct, frozen=True, array_like=True):
    """How the calls of one answer are read."""

    format: str
    names: tuple[str, ...] = ()
    single: bool = False

    def reader(self) -> ToolReader:
        """A fresh one."""
        return FORMATS[self.format].reader(self.names, single=self.single)

    def call_id(self, digest: str) -> str:
        """An id in the shape that the family's template takes, out of 64 hex digits."""
        return digest[:9] if self.format == "mistral" else f"call_{digest[:24]}"


Spell = Callable[[str], str]
"""A marker to how a grammar spells it: as a text, or as the one token that it is."""


@dataclass(frozen=True, slots=True)
class Format:
    """One family's way to call tools. signs: what a template of it holds, each or several of
    one entry. special: whether its marks are special tokens, which text leaves out otherwise."""

    reader: type[ToolReader]
    signs: tuple[tuple[str, ...], ...]
    special: bool
    forced: Callable[[Sequence[str], Spell, bool], str]
    member: str = "arguments"


def _hermes(calls: Sequence[str], spell: Spell, single: bool) -> str:
    one = f'{spell("<tool_call>")} "\\n" object "\\n" {spell("</tool_call>")}'
    return f"start: call{_more(single, _quoted(chr(10)))}\ncall: {one}\n{_objects(calls)}"


def _mistral(calls: Sequence[str], spell: Spell, single: bool) -> str:
    more = _more(single, _quoted(", ")).replace("call", "object")
    return f'start: {spell("[TOOL_CALLS]")} "[" object{more} "]"\n{_objects(calls)}'


def _bare(calls: Sequence[str], spell: Spell, single: bool) -> str:
    return (
        f"start: object{_more(single, _quoted('; ')).replace('call', 'object')}\n{_objects(calls)}"
    )


def _harmony(calls: Sequence[str], spell: Spell, single: bool) -> str:
    """One call: the model ends its answer after it."""
    start = f'{spell("<|channel|>")} "commentary to=functions."'
    middle = f' " " {spell("<|constrain|>")} "json" {spell("<|message|>")} '
    rules = [f"call{at}: {call}" for at, call in enumerate(calls)]
    names = " | ".join(f"call{at}" for at in range(len(calls)))
    whole = "\n".join(rules).replace("<MIDDLE>", middle)
    return f"start: {start} ({names})\n{whole}"


def _more(single: bool, between: str) -> str:
    return "" if single else f" ({between} call)*"


def _objects(calls: Sequence[str]) -> str:
    rules = [f"object{at}: {call}" for at, call in enumerate(calls)]
    return "\n".join([f"object: {' | '.join(f'object{at}' for at in range(len(calls)))}", *rules])


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


FORMATS = {
    "hermes": Format(HermesReader, (("<tool_call>", "arguments"),), False, _hermes),
    "mistral": Format(MistralReader, (("[TOOL_CALLS]",),), True, _mistral),
    "harmony": Format(HarmonyReader, (("<|channel|>", "<|message|>"),), True, _harmony),
    "llama3": Format(
        BareReader,
        (("<|python_tag|>",), ("ipython",), ('"parameters": dictionary of argument name',)),
        True,
        _bare,
        "parameters",
    ),
    "pythonic": Format(
        PythonicReader,
        (("[func_name1(",), ("<|python_start|>",)),
        True,
        _bare,
        "parameters",
    ),
    "json": Format(BareReader, (), False, _bare),
}
"""Format name to what there is to know of it; an earlier one is taken before a later one."""

FORMAT_NAMES = tuple(FORMATS)
_OTHERS = ("<function=", "<arg_key>", "<\uff5ctool\u2581call", "<invoke ", "<|tool_call_start|>")
"""Signs of formats that are not read here, though they may share others' marks."""


def detect(template: str) -> str | None:
    """The format of a model whose template takes tools; None for one that is not known."""
    if any(sign in template for sign in _OTHERS):
        return None
    for name, known in FORMATS.items():
        if any(all(sign in template for sign in signs) for signs in known.signs):
            return name
    return None


def forced_calls(name: str, tools: Sequence[Tool], spell: Spell, *, single: bool) -> Grammar:
    """Texts that are calls of these tools, in this format, and nothing else."""
    known = FORMATS[name]
    calls = []
    for tool in tools:
        schema = json.loads(tool.parameters or ANY_ARGUMENTS)
        arguments = f"%json {json.dumps(schema | {'x-guidance': _PLAIN})}"
        if known.forced is _harmony:
            calls.append(f"{_quoted(tool.name)}<MIDDLE>{arguments}")
        else:
            start = f'{{"name": {_quoted(tool.name)}, "{known.member}": '
            calls.append(f'{_quoted(start)} {arguments} "}}"')
    return Grammar("lark", known.forced(calls, spell, single))
