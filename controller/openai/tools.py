"""Tools in requests: `tools`, `tool_choice`, and calls in the conversation."""

from __future__ import annotations

import json
from typing import Any

from phalanx.protos.errors import FieldViolation
from phalanx.protos.limits import MAX_TOOL_CALLS, MAX_TOOLS
from phalanx.protos.v1 import serving_pb2, types_pb2

from .fields import Fields, shown

NAMES = {"tool_use": "tool_choice", "tool_name": "tool_choice.function.name"}
"""Field of the service to what the caller calls it."""


def read_tools(fields: Fields, request: serving_pb2.ChatRequest) -> None:
    """`tools`, `tool_choice` and `parallel_tool_calls` into the message."""
    given = fields.value("tools")
    if given is not None and not isinstance(given, list):
        fields.refuse("tools", f"{shown(given)} is not a list of tools")
    elif given is not None and len(given) > MAX_TOOLS:
        fields.refuse("tools", f"{len(given)} entries, at most {MAX_TOOLS} allowed")
    else:
        for at, item in enumerate(given or ()):
            request.tools.append(_tool(item, f"tools[{at}]", fields.violations))
    _read_choice(fields, request)
    request.single_tool_call = not fields.flag("parallel_tool_calls", True)


def _inner(given: object, path: str, violations: list[FieldViolation]) -> Fields | None:
    """The fields of an object; None, with a violation, for anything else."""
    if isinstance(given, dict):
        return Fields(given, violations, path)
    text = "is missing" if given is None else f"{shown(given)} is not an object"
    violations.append(FieldViolation(path, text))
    return None


def _function(fields: Fields) -> Fields | None:
    """The function of something of type "function"."""
    if (kind := fields.value("type")) != "function":
        fields.refuse("type", f"{shown(kind)} is not supported here, only 'function' is")
    return _inner(fields.value("function"), fields.name("function"), fields.violations)


def _tool(given: object, path: str, violations: list[FieldViolation]) -> types_pb2.Tool:
    tool = types_pb2.Tool()
    fields = _inner(given, path, violations)
    function = None if fields is None else _function(fields)
    if fields is None or function is None:
        return tool
    tool.name = function.text("name") or ""
    tool.description = function.text("description") or ""
    function.flag("strict")
    parameters = function.value("parameters")
    if isinstance(parameters, dict):
        tool.parameters = json.dumps(parameters)
    elif parameters is not None:
        function.refuse("parameters", f"{shown(parameters)} is not a JSON schema")
    function.finish()
    fields.finish()
    return tool


def _read_choice(fields: Fields, request: serving_pb2.ChatRequest) -> None:
    choice = fields.value("tool_choice")
    if choice in (None, "auto"):
        return
    if choice == "none":
        request.tool_use = types_pb2.TOOL_USE_NONE
        return
    request.tool_use = types_pb2.TOOL_USE_REQUIRED
    if isinstance(choice, dict):
        inner = Fields(choice, fields.violations, "tool_choice")
        if (function := _function(inner)) is not None:
            request.tool_name = function.text("name") or ""
            if not request.tool_name:
                function.refuse("name", "is missing")
            function.finish()
        inner.finish()
    elif choice != "required":
        text = "is not none, auto, required or an object that names a function"
        fields.refuse("tool_choice", f"{shown(choice)} {text}")


def read_calls(fields: Fields, message: types_pb2.ChatMessage) -> None:
    """`tool_calls`, `tool_call_id` and `name` of a message of the conversation."""
    message.tool_call_id = fields.text("tool_call_id") or ""
    message.name = fields.text("name") or ""
    given = fields.value("tool_calls")
    if given is None:
        return
    if not isinstance(given, list) or len(given) > MAX_TOOL_CALLS:
        fields.refuse("tool_calls", f"is not a list of at most {MAX_TOOL_CALLS} calls")
        return
    for at, item in enumerate(given):
        inner = _inner(item, f"{fields.name('tool_calls')}[{at}]", fields.violations)
        function = None if inner is None else _function(inner)
        if inner is None or function is None:
            continue
        message.tool_calls.add(
            id=inner.text("id") or "",
            name=function.text("name") or "",
            arguments=function.text("arguments") or "",
        )
        inner.ignore(("index",))
        function.finish()
        inner.finish()


def shown_calls(calls: list[types_pb2.ToolCall]) -> list[dict[str, Any]]:
    """Calls of a whole answer, out of their pieces."""
    found: dict[int, types_pb2.ToolCall] = {}
    for piece in calls:
        call = found.setdefault(piece.index, types_pb2.ToolCall())
        call.id, call.name = call.id or piece.id, call.name or piece.name
        call.arguments += piece.arguments
    return [
        {
            "id": call.id,
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        }
        for call in found.values()
    ]


def call_chunks(calls: list[types_pb2.ToolCall]) -> list[dict[str, Any]]:
    """Pieces of calls for a chunk of a stream."""
    return [
        {
            "index": piece.index,
            "id": piece.id,
            "type": "function",
            "function": {"name": piece.name, "arguments": piece.arguments},
        }
        if piece.name
        else {"index": piece.index, "function": {"arguments": piece.arguments}}
        for piece in calls
    ]
