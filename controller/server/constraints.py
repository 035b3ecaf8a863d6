"""What an answer must look like, under vLLM's names, which two of the fronts know."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from phalanx.protos.v1 import types_pb2

KINDS = ("json", "regex", "choice", "grammar")


def set_constraint(given: Mapping[str, Any], params: types_pb2.SamplingParams) -> str | None:
    """Write a constraint under vLLM's names into the message; what is wrong with it, if anything."""
    present = {name: value for name, value in given.items() if value is not None}
    if len(present) != 1 or not present.keys() <= set(KINDS):
        return f"exactly one of {', '.join(KINDS)} is needed"
    ((name, value),) = present.items()
    if name == "json" and (isinstance(value, dict | bool) or is_text(value)):
        params.grammar.json_schema = value if isinstance(value, str) else json.dumps(value)
    elif name == "regex" and is_text(value):
        params.grammar.regex = value
    elif name == "grammar" and is_text(value):
        params.grammar.lark = value
    elif name == "choice" and isinstance(value, list) and all(map(is_text, value)):
        params.grammar.choice.texts.extend(value)
    else:
        return f"{name} is {value!r:.60}, which is none"
    return None


def is_text(value: object) -> bool:
    """Whether this is a text that has a UTF-8 form."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
