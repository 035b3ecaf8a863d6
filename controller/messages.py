"""Request messages from plain Python values."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from phalanx.protos.errors import FieldViolation, InvalidArgument
from phalanx.protos.v1 import serving_pb2, types_pb2

Prompt = str | Sequence[int]
Messages = str | Sequence[Mapping[str, Any]]

TOOL_FIELDS = ("tools", "tool_choice", "parallel_tool_calls")
_OPTIONS = frozenset(serving_pb2.RequestOptions.DESCRIPTOR.fields_by_name)
_FIELDS: dict[str, Any] = dict(types_pb2.SamplingParams.DESCRIPTOR.fields_by_name)


def generate_request(
    prompt: Prompt, request_id: str, params: Mapping[str, Any]
) -> serving_pb2.GenerateRequest:
    """Raises `TypeError` for an unknown parameter, `InvalidArgument` for a value that no message
    can hold; ranges are checked by the server."""
    request = serving_pb2.GenerateRequest(request_id=request_id)
    _set_params(request, params)
    if isinstance(prompt, str):
        request.text = prompt
        return request
    try:
        request.token_ids.ids.extend(prompt)
        request.token_ids.SetInParent()
    except (TypeError, ValueError) as error:
        raise InvalidArgument.of("token_ids", f"a text or token ids are needed: {error}") from None
    return request


def chat_request(
    messages: Messages, request_id: str, params: Mapping[str, Any]
) -> serving_pb2.ChatRequest:
    """The same for a conversation; a text is one user's message.

    Beside sampling parameters there may be `tools` (functions in OpenAI's shape, or objects with
    name, description and parameters), `tool_choice` ("auto", "none", "required" or a tool's name)
    and `parallel_tool_calls`.
    """
    params = dict(params)
    tools = {name: params.pop(name, None) for name in TOOL_FIELDS}
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    request = serving_pb2.ChatRequest(request_id=request_id)
    _set_params(request, params)
    for index, message in enumerate(messages):
        try:
            request.messages.add(**message)
        except (TypeError, ValueError) as error:
            raise InvalidArgument.of(
                f"messages[{index}]", f"texts named role and content are needed: {error}"
            ) from None
    _set_tools(request, **tools)
    return request


def _set_tools(
    request: serving_pb2.ChatRequest, tools: Any, tool_choice: Any, parallel_tool_calls: Any
) -> None:
    for index, tool in enumerate(tools or ()):
        try:
            values = dict(tool.get("function", tool))
            if not isinstance(values.get("parameters", ""), str):
                values["parameters"] = json.dumps(values["parameters"])
            request.tools.add(**values)
        except (AttributeError, TypeError, ValueError) as error:
            text = f"a function's name, description and parameters are needed: {error}"
            raise InvalidArgument.of(f"tools[{index}]", text) from None
    if tool_choice in ("none", "required"):
        none = tool_choice == "none"
        request.tool_use = types_pb2.TOOL_USE_NONE if none else types_pb2.TOOL_USE_REQUIRED
    elif isinstance(tool_choice, str) and tool_choice != "auto":
        request.tool_use, request.tool_name = types_pb2.TOOL_USE_REQUIRED, tool_choice
    elif tool_choice not in (None, "auto"):
        text = f"{tool_choice!r:.80} is not auto, none, required or the name of a tool"
        raise InvalidArgument.of("tool_choice", text)
    request.single_tool_call = parallel_tool_calls is False


def _set_params(
    request: serving_pb2.GenerateRequest | serving_pb2.ChatRequest, given: Mapping[str, Any]
) -> None:
    """Sampling parameters, and beside them the fields of `RequestOptions`."""
    params = {name: value for name, value in given.items() if name not in _OPTIONS}
    request.params.CopyFrom(sampling_params(params))
    for name in _OPTIONS & given.keys():
        if given[name] is None:
            continue
        try:
            setattr(request.options, name, given[name])
        except (TypeError, ValueError) as error:
            raise InvalidArgument.of(f"options.{name}", str(error)) from None


def sampling_params(params: Mapping[str, Any]) -> types_pb2.SamplingParams:
    """The message of keyword arguments; None is as good as absent, one text as a list of one."""
    unknown = [name for name in params if name not in _FIELDS]
    if unknown:
        near = difflib.get_close_matches(unknown[0], _FIELDS, 1)
        hint = f"; did you mean {near[0]}?" if near else f"; allowed: {', '.join(_FIELDS)}"
        raise TypeError(f"{', '.join(unknown)}: no such sampling parameter{hint}")
    message = types_pb2.SamplingParams()
    violations = []
    for name, value in params.items():
        if value is None:
            continue
        try:
            _set(message, name, value)
        except (TypeError, ValueError) as error:
            violations.append(FieldViolation(f"params.{name}", f"{value!r:.80}: {error}"))
    if violations:
        raise InvalidArgument(violations)
    return message


def _set(message: types_pb2.SamplingParams, name: str, value: Any) -> None:
    if name == "logit_bias":
        message.logit_bias.update(value)
    elif name == "grammar":
        _set_grammar(message.grammar, value)
    elif _FIELDS[name].is_repeated:
        getattr(message, name).extend([value] if isinstance(value, str | int) else value)
    else:
        setattr(message, name, value)


def _set_grammar(message: types_pb2.Grammar, value: Any) -> None:
    """`{"json_schema": a schema or its text}`, `{"regex": ...}`, `{"choice": [...]}` or
    `{"lark": ...}`."""
    kinds = [field.name for field in message.DESCRIPTOR.fields]
    if not isinstance(value, Mapping) or len(value) != 1 or not value.keys() <= set(kinds):
        raise ValueError(f"exactly one of {', '.join(kinds)} is needed")
    ((kind, content),) = value.items()
    if kind == "choice":
        message.choice.texts.extend(content)
    elif kind == "json_schema" and not isinstance(content, str):
        message.json_schema = json.dumps(content)
    else:
        setattr(message, kind, content)
