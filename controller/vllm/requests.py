"""Requests of the vLLM engine's protocol as messages of the service.

A field is read, or has no meaning for tokens, or is refused by name.
"""

from __future__ import annotations

import json
from typing import Any

from phalanx.controller.server.convert import unknown_fields
from phalanx.protos.errors import FieldViolation, InvalidArgument
from phalanx.protos.v1 import serving_pb2, types_pb2

ANY_OBJECT = json.dumps({"type": "object"})
UNSUPPORTED = ("kv_transfer_params", "mm_inputs", "media_refs")
UNSUPPORTED_LISTS = ("extra_mm_inputs",)
_SAME = ("min_p", "frequency_penalty", "presence_penalty", "min_tokens", "top_k", "ignore_eos")
_OPTIONAL = ("temperature", "max_tokens", "logprobs", "prompt_logprobs", "seed")
_ZERO_IS_ABSENT = ("top_p", "repetition_penalty", "n")
NAMES = {"token_ids": "tokenized", "lark": "grammar", "include_stop": "include_stop_str_in_output"}


def read_request(request: Any) -> serving_pb2.GenerateRequest:
    """A `GenerateRequest` of theirs. Raises `InvalidArgument` with every violation."""
    violations = unknown_fields(request)
    found = serving_pb2.GenerateRequest(request_id=request.request_id)
    kind = request.WhichOneof("input")
    if kind == "tokenized":
        found.token_ids.ids.extend(request.tokenized.input_ids)
        found.token_ids.SetInParent()
    elif kind == "text":
        found.text = request.text
    for name in UNSUPPORTED:
        if request.HasField(name):
            violations.append(FieldViolation(name, "is not supported here, leave it out"))
    for name in UNSUPPORTED_LISTS:
        if len(getattr(request, name)):
            violations.append(FieldViolation(name, "is not supported here, leave it out"))
    if request.kv_transfer_params_json not in ("", "{}", "null"):
        text = "is not supported here, leave it out"
        violations.append(FieldViolation("kv_transfer_params_json", text))
    if request.HasField("data_parallel_rank") and request.data_parallel_rank not in (-1, 0):
        text = f"{request.data_parallel_rank} is not 0: replicas are chosen here"
        violations.append(FieldViolation("data_parallel_rank", text))
    _read_params(request.sampling_params, found.params, violations)
    if violations:
        raise InvalidArgument(violations)
    return found


def _read_params(
    given: Any, params: types_pb2.SamplingParams, violations: list[FieldViolation]
) -> None:
    values = {name: getattr(given, name) for name in _SAME}
    values |= {name: getattr(given, name) for name in _OPTIONAL if given.HasField(name)}
    values |= {name: getattr(given, name) for name in _ZERO_IS_ABSENT if getattr(given, name)}
    values |= {
        "include_stop": given.include_stop_str_in_output,
        "skip_special_tokens": given.skip_special_tokens,
    }
    for name, value in values.items():
        try:
            setattr(params, name, value)
        except ValueError:  # negative, where the service has none
            text = f"{value} is not 0 or more"
            violations.append(FieldViolation(f"sampling_params.{name}", text))
    params.stop.extend(given.stop)
    params.stop_token_ids.extend(given.stop_token_ids)
    for token, bias in given.logit_bias.items():
        if token < 0:
            text = f"{token} is not a token id"
            violations.append(FieldViolation("sampling_params.logit_bias", text))
        else:
            params.logit_bias[token] = bias
    if given.HasField("truncate_prompt_tokens"):
        text = "is not supported here: nothing is cut silently"
        violations.append(FieldViolation("sampling_params.truncate_prompt_tokens", text))
    _read_constraint(given, params, violations)


def _read_constraint(
    given: Any, params: types_pb2.SamplingParams, violations: list[FieldViolation]
) -> None:
    kind = given.WhichOneof("constraint")
    if kind == "json_schema":
        params.grammar.json_schema = given.json_schema
    elif kind == "regex":
        params.grammar.regex = given.regex
    elif kind == "grammar":
        params.grammar.lark = given.grammar
    elif kind == "choice":
        params.grammar.choice.texts.extend(given.choice.choices)
    elif kind == "json_object" and given.json_object:
        params.grammar.json_schema = ANY_OBJECT
    elif kind == "structural_tag":
        text = "is not supported here; json_schema, regex, grammar and choice are"
        violations.append(FieldViolation("sampling_params.structural_tag", text))


def in_their_names(error: InvalidArgument) -> InvalidArgument:
    """The service's refusal, in the names of this protocol."""
    return InvalidArgument(
        [FieldViolation(_their_name(item.field), item.description) for item in error.violations]
    )


def _their_name(field: str) -> str:
    if field.startswith("params."):
        name = field.removeprefix("params.")
        return f"sampling_params.{NAMES.get(name, name)}"
    return field.replace("token_ids.ids", "tokenized.input_ids").replace("token_ids", "tokenized")
