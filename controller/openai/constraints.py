"""What an answer must look like: `response_format`, and vLLM's `structured_outputs`."""

from __future__ import annotations

import json

from phalanx.controller.server.constraints import set_constraint
from phalanx.protos.v1 import types_pb2

from .fields import Fields, shown

ANY_OBJECT = json.dumps({"type": "object"})


def read_response_format(fields: Fields, params: types_pb2.SamplingParams) -> None:
    """`{"type": "json_schema", "json_schema": {"name": ..., "schema": ...}}` and its like."""
    given = fields.value("response_format")
    if given is None:
        return
    if not isinstance(given, dict):
        fields.refuse("response_format", f"{shown(given)} is not an object")
        return
    inner = Fields(given, fields.violations, "response_format")
    kind = inner.value("type")
    if kind == "json_object":
        params.grammar.json_schema = ANY_OBJECT
    elif kind == "json_schema":
        _read_schema(inner, params)
    elif kind != "text":
        inner.refuse("type", f"{shown(kind)} is not text, json_object or json_schema")
    inner.finish()


def _read_schema(fields: Fields, params: types_pb2.SamplingParams) -> None:
    given = fields.value("json_schema")
    if not isinstance(given, dict):
        fields.refuse("json_schema", f"{shown(given)} is not an object with a schema")
        return
    inner = Fields(given, fields.violations, fields.name("json_schema"))
    inner.ignore(("name", "description", "strict"))  # it is kept to in any case
    schema = inner.value("schema")
    if isinstance(schema, dict | bool):
        params.grammar.json_schema = json.dumps(schema)
    else:
        inner.refuse("schema", f"{shown(schema)} is not a JSON schema")
    inner.finish()


def read_structured_outputs(fields: Fields, params: types_pb2.SamplingParams) -> None:
    """`{"json": ...}`, `{"regex": ...}`, `{"choice": [...]}` or `{"grammar": ...}`."""
    given = fields.value("structured_outputs")
    if given is None:
        return
    if not isinstance(given, dict):
        fields.refuse("structured_outputs", f"{shown(given)} is not an object")
        return
    if params.HasField("grammar"):
        fields.refuse("structured_outputs", "is not allowed beside response_format")
        return
    if error := set_constraint(given, params):
        fields.refuse("structured_outputs", error)
