"""Conversations and tools as callers send them, checked and put into a template's words."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from phalanx.controller.tools.formats import Tool
from phalanx.protos.errors import FieldViolation
from phalanx.protos.limits import (
    MAX_CHAT_MESSAGES,
    MAX_TEXT_BYTES,
    MAX_TOOL_CALLS,
    MAX_TOOL_DEPTH,
    MAX_TOOL_NAME_CHARS,
    MAX_TOOLS,
    MAX_TOOLS_BYTES,
)
from phalanx.protos.v1 import serving_pb2, types_pb2

ROLES = ("system", "developer", "user", "assistant", "tool")
_NAME = re.compile(rf"[A-Za-z0-9_.\-]{{1,{MAX_TOOL_NAME_CHARS}}}")
_MAY_BE_EMPTY = ("assistant", "tool")

Violations = list[FieldViolation]


def plain_messages(
    messages: Sequence[types_pb2.ChatMessage], violations: Violations
) -> list[dict[str, Any]]:
    """Messages as templates take them; what is wrong with them is added to `violations`."""
    if not 1 <= len(messages) <= MAX_CHAT_MESSAGES:
        text = f"{len(messages)} entries, 1 to {MAX_CHAT_MESSAGES} allowed"
        violations.append(FieldViolation("messages", text))
        return []
    size = sum(item.ByteSize() for item in messages)
    if size > MAX_TEXT_BYTES:
        text = f"{size} bytes, at most {MAX_TEXT_BYTES} allowed"
        violations.append(FieldViolation("messages", text))
        return []
    called: dict[str, str] = {}
    return [_plain(item, f"messages[{at}]", called, violations) for at, item in enumerate(messages)]


def _plain(
    message: types_pb2.ChatMessage, field: str, called: dict[str, str], violations: Violations
) -> dict[str, Any]:
    """called: ids to names of the calls so far."""

    def refuse(name: str, description: str) -> None:
        violations.append(FieldViolation(f"{field}.{name}", description))

    role = message.role
    if role not in ROLES:
        refuse("role", f"{role!r:.40} is not one of {', '.join(ROLES)}")
    if not message.content and role not in _MAY_BE_EMPTY:
        refuse("content", "is empty, a text is allowed; only an assistant's or tool's may be empty")
    if message.tool_calls and role != "assistant":
        refuse("tool_calls", "are an assistant's, leave them out")
    if (message.tool_call_id or message.name) and role != "tool":
        name = "tool_call_id" if message.tool_call_id else "name"
        refuse(name, "is of a tool's message, leave it out")
    if len(message.tool_calls) > MAX_TOOL_CALLS:
        refuse("tool_calls", f"{len(message.tool_calls)} entries, at most {MAX_TOOL_CALLS} allowed")
        return {}
    plain: dict[str, Any] = {"role": role, "content": message.content}
    calls = [
        _plain_call(call, f"{field}.tool_calls[{at}]", called, violations)
        for at, call in enumerate(message.tool_calls)
    ]
    if calls:
        plain["tool_calls"] = calls
    if role == "tool":
        name = message.name or called.get(message.tool_call_id, "")
        plain |= {"tool_call_id": message.tool_call_id} if message.tool_call_id else {}
        plain |= {"name": name} if name else {}
    return plain


def _plain_call(
    call: types_pb2.ToolCall, field: str, called: dict[str, str], violations: Violations
) -> dict[str, Any]:
    if not _NAME.fullmatch(call.name):
        violations.append(FieldViolation(f"{field}.name", _not_a_name(call.name)))
    called[call.id] = call.name
    arguments = _object(call.arguments or "{}", f"{field}.arguments", violations)
    function = {"name": call.name, "arguments": arguments}
    return {"id": call.id, "type": "function", "function": function}


def read_tools(request: serving_pb2.ChatRequest, violations: Violations) -> list[Tool]:
    """The tools of a request; what is wrong with them is added to `violations`."""
    tools, use = request.tools, request.tool_use
    if len(tools) > MAX_TOOLS:
        text = f"{len(tools)} entries, at most {MAX_TOOLS} allowed"
        violations.append(FieldViolation("tools", text))
        return []
    if (size := sum(item.ByteSize() for item in tools)) > MAX_TOOLS_BYTES:
        text = f"{size} bytes, at most {MAX_TOOLS_BYTES} allowed"
        violations.append(FieldViolation("tools", text))
        return []
    found = [_tool(item, f"tools[{at}]", violations) for at, item in enumerate(tools)]
    names = [tool.name for tool in found]
    if twice := next((name for name in names if names.count(name) > 1), None):
        violations.append(FieldViolation("tools", f"{twice!r} is listed twice"))
    if use not in types_pb2.ToolUse.values():
        violations.append(FieldViolation("tool_use", f"{use} is not known here"))
    required = use == types_pb2.TOOL_USE_REQUIRED
    if required and not found:
        violations.append(FieldViolation("tools", "are missing, but a call is required"))
    if request.tool_name and not required:
        text = "is of a call that is required, leave it out"
        violations.append(FieldViolation("tool_name", text))
    elif request.tool_name and request.tool_name not in names:
        text = f"{request.tool_name!r:.80} is none of the tools"
        violations.append(FieldViolation("tool_name", text))
    return found


def template_tools(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """Tools in the shape that templates take."""
    return [
        {
            "type": "function",
            "function": {
                "name": tool.name,
                "description": tool.description,
                "parameters": json.loads(tool.parameters or '{"type":"object","properties":{}}'),
            },
        }
        for tool in tools
    ]


def _tool(message: types_pb2.Tool, field: str, violations: Violations) -> Tool:
    if not _NAME.fullmatch(message.name):
        violations.append(FieldViolation(f"{field}.name", _not_a_name(message.name)))
    if message.parameters:
        _object(message.parameters, f"{field}.parameters", violations)
    return Tool(message.name, message.description, message.parameters)


def _not_a_name(name: str) -> str:
    return f"{name!r:.80} is not 1 to {MAX_TOOL_NAME_CHARS} letters, digits and _ . -"


def _object(text: str, field: str, violations: Violations) -> dict[str, Any]:
    """The JSON object that a text is, of bounded depth."""
    try:
        value = json.loads(text, parse_constant=_refuse_constant, parse_int=_read_integer)
        if isinstance(value, dict) and _depth_within(value, MAX_TOOL_DEPTH):
            return value
    except (ValueError, RecursionError):
        pass
    allowed = f"a JSON object of at most {MAX_TOOL_DEPTH} levels"
    violations.append(FieldViolation(field, f"is not {allowed}"))
    return {}


def _refuse_constant(name: str) -> None:
    raise ValueError(name)


def _read_integer(digits: str) -> int:
    if len(digits) > 400:
        raise ValueError("a number of very many digits")
    return int(digits)


def _depth_within(value: object, levels: int) -> bool:
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels > 0 and all(
        _depth_within(item, levels - 1) for item in items if isinstance(item, dict | list)
    )
