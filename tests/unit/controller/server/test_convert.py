"""Messages to values: floats as they were written, unknown fields, words that must not appear."""

from __future__ import annotations

import math
import struct
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phalanx.controller.server.convert import read_params, shortest, unknown_fields
from phalanx.protos.errors import FieldViolation
from phalanx.protos.sampling import SamplingParams
from phalanx.protos.v1 import serving_pb2, types_pb2


def significant_digits(value: float) -> int:
    return len(Decimal(repr(value)).normalize().as_tuple().digits)


def letters(text: str) -> list[int]:
    return [ord(char) for char in text]


@pytest.mark.parametrize("value", [0.7, 0.01, 0.1, 1.1, -0.3, 1e-5, 2.5, 0.0, 100.0, 0.333333])
def test_a_decimal_survives_the_wire(value: float) -> None:
    message = types_pb2.SamplingParams(temperature=value)
    assert message.temperature == pytest.approx(value)
    assert shortest(message.temperature) == value


@given(st.floats(width=32))
def test_the_float32_is_always_the_same(value: float) -> None:
    found = shortest(value)
    assert struct.pack("f", found) == struct.pack("f", value) or math.isnan(value)
    assert significant_digits(found) <= significant_digits(value)


def test_an_empty_message_gives_the_defaults() -> None:
    violations: list[FieldViolation] = []
    assert read_params(types_pb2.SamplingParams(), letters, violations) == SamplingParams()
    assert violations == []


def test_a_word_is_banned_with_and_without_its_space() -> None:
    violations: list[FieldViolation] = []
    message = types_pb2.SamplingParams(bad_words=["ab", " ab", "c", "\n"])
    found = read_params(message, letters, violations).bad_words_ids
    assert found == ((97, 98), (32, 97, 98), (99,), (32, 99), (10,), (32, 10))
    assert violations == []


def test_as_many_words_as_allowed_pass_validation() -> None:
    violations: list[FieldViolation] = []
    message = types_pb2.SamplingParams(bad_words=[f"w{index}" for index in range(64)])
    params = read_params(message, letters, violations)
    assert len(params.bad_words_ids) == 128
    params.validate(1000)
    assert violations == []


def test_unknown_fields_are_found_at_every_depth() -> None:
    extra = b"\x98\x06\x01"  # field 99, varint 1
    message = serving_pb2.ChatRequest.FromString(
        b"\x12\x06" + b"\x0a\x01u" + extra  # messages[0]
        + b"\x12\x03" + b"\x0a\x01u"  # messages[1]
        + b"\x1a\x03" + extra  # params
        + extra
    )  # fmt: skip
    assert [str(item) for item in unknown_fields(message)] == [
        "request: field number 99 is not known here",
        "messages[0]: field number 99 is not known here",
        "params: field number 99 is not known here",
    ]
    clean = serving_pb2.GenerateRequest(text="a", params={"logit_bias": {1: 0.5}, "stop": ["x"]})
    assert unknown_fields(clean) == []
