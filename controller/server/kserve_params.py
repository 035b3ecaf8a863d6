"""Sampling parameters under vLLM's names, as a message of ours."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from phalanx.protos.errors import FieldViolation, InvalidArgument
from phalanx.protos.v1 import types_pb2

from .constraints import set_constraint
from .convert import FLOAT_PARAMETERS

Violations = list[FieldViolation]

TENSOR = "sampling_parameters"
MAX_BYTES = 64 * 1024
SHOWN = 60
_UINT32, _UINT64 = 2**32 - 1, 2**64 - 1
_INTEGER = re.compile(r"[+-]?[0-9]{1,20}")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?")
_WORDS = {"true": True, "false": False}

_RENAMED = {
    "include_stop_str_in_output": "include_stop",
    "structured_outputs": "grammar",
}
"""vLLM's name -> ours, where they differ."""
_OURS = {ours: theirs for theirs, ours in _RENAMED.items()}


class _Refused(ValueError):
    """A value that cannot be taken; the text says what is allowed."""


def read_parameters(
    given: Mapping[str, Any], field: str, violations: Violations
) -> types_pb2.SamplingParams:
    """What a JSON object asks for. null is as good as absent; numbers and booleans may also be
    strings. Ranges are left to the service; what does not fit the message is added to
    `violations`, below `field`."""
    message = types_pb2.SamplingParams()
    for key, value in given.items():
        reader = _READERS.get(key)
        if reader is None:
            text = f"{key!a:.{SHOWN}} is not known here, allowed are {', '.join(sorted(_READERS))}"
            violations.append(FieldViolation(field, text))
        elif value is not None:
            try:
                _set(message, _RENAMED.get(key, key), reader(value))
            except _Refused as error:
                violations.append(FieldViolation(f"{field}.{key}", str(error)))
    return message


def _set(message: types_pb2.SamplingParams, name: str, value: Any) -> None:
    if isinstance(value, types_pb2.Grammar):
        message.grammar.CopyFrom(value)
    elif isinstance(value, list):
        getattr(message, name).extend(value)
    elif isinstance(value, dict):
        getattr(message, name).update(value)
    else:
        setattr(message, name, value)


def in_their_names(error: InvalidArgument, field: str) -> InvalidArgument:
    """The same error with fields as callers of this protocol know them; those of the sampling
    parameters are below `field`."""
    return InvalidArgument(
        [
            FieldViolation(_their_name(item.field, field), item.description)
            for item in error.violations
        ]
    )


def _their_name(name: str, field: str) -> str:
    if name in ("text", "prompt"):
        return "text_input"
    head, dot, rest = name.partition(".")
    return f"{field}.{_OURS.get(rest, rest)}" if head == "params" and dot else name


def parse(data: bytes, violations: Violations) -> dict[str, Any]:
    """The JSON object of the tensor; empty when it is none, with a violation."""
    if len(data) > MAX_BYTES:
        text = f"{len(data)} bytes, at most {MAX_BYTES} allowed"
        violations.append(FieldViolation(TENSOR, text))
        return {}
    try:
        value = json.loads(data.decode(), object_pairs_hook=_once_each, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        text = f"is not JSON: {error}" if str(error) else "is not JSON"
        violations.append(FieldViolation(TENSOR, text[:200]))
        return {}
    if not isinstance(value, dict):
        violations.append(FieldViolation(TENSOR, f"{_shown(value)} is not a JSON object"))
        return {}
    return value


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is given twice")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _shown(value: Any) -> str:
    return f"{json.dumps(value):.{SHOWN}}"


def _integer(high: int) -> Callable[[Any], int]:
    def read(value: Any) -> int:
        number = value
        if isinstance(value, str) and _INTEGER.fullmatch(value):
            number = int(value)
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number <= high:
            raise _Refused(f"{_shown(value)} is not an integer in [0, {high}]")
        return number

    return read


def _top_k(value: Any) -> int:
    # -1 is how vLLM spells "all"
    return 0 if value in (-1, "-1") else _integer(_UINT32)(value)


def _number(value: Any) -> float:
    number = value
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        number = float(value)
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise _Refused(f"{_shown(value)} is not a number")
    try:
        return float(number)
    except OverflowError:
        raise _Refused(f"{_shown(value)} is too large a number") from None


def _boolean(value: Any) -> bool:
    known = _WORDS.get(value.lower()) if isinstance(value, str) else value
    if not isinstance(known, bool):
        raise _Refused(f"{_shown(value)} is not true or false")
    return known


def _texts(value: Any) -> list[str]:
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, list) or not all(isinstance(item, str) for item in found):
        raise _Refused(f"{_shown(value)} is not a string or a list of strings")
    try:
        "".join(found).encode()
    except UnicodeEncodeError:
        raise _Refused("holds a surrogate, which is no character") from None
    return found


def _ids(value: Any) -> list[int]:
    if not isinstance(value, list):
        raise _Refused(f"{_shown(value)} is not a list of token ids")
    return [_integer(_UINT32)(item) for item in value]


def _biases(value: Any) -> dict[int, float]:
    if not isinstance(value, dict):
        raise _Refused(f"{_shown(value)} is not an object of token ids and numbers")
    found = {_integer(_UINT32)(key): _number(bias) for key, bias in value.items()}
    if len(found) < len(value):
        raise _Refused("a token id is given twice")
    return found


def _constraint(value: Any) -> types_pb2.Grammar:
    params = types_pb2.SamplingParams()
    if not isinstance(value, dict):
        raise _Refused(f"{_shown(value)} is not an object")
    if error := set_constraint(value, params):
        raise _Refused(error)
    return params.grammar


_READERS: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(
        ("max_tokens", "min_tokens", "no_repeat_ngram_size", "n", "logprobs"), _integer(_UINT32)
    ),
    "seed": _integer(_UINT64),
    "top_k": _top_k,
    **dict.fromkeys(FLOAT_PARAMETERS, _number),
    **dict.fromkeys(("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"), _boolean),
    **dict.fromkeys(("stop", "bad_words"), _texts),
    "stop_token_ids": _ids,
    "logit_bias": _biases,
    "structured_outputs": _constraint,
}
