"""Fields of a JSON object, read one by one; what is wrong is gathered, what is left over refused."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from phalanx.controller.server.constraints import is_text
from phalanx.protos.errors import FieldViolation, InvalidArgument

SHOWN_CHARS = 40
SHOWN_FIELDS = 8
SHOWN_VIOLATIONS = 32
_FLOAT32_MAX = 3.4028234e38


def parse_object(data: bytes) -> dict[str, Any]:
    """The JSON object that these bytes are. Raises `InvalidArgument`."""
    try:
        value = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeError, ValueError, RecursionError):
        raise InvalidArgument.of("body", "is not valid JSON") from None
    if not isinstance(value, dict):
        raise InvalidArgument.of("body", "is not a JSON object")
    return value


def shown(value: object) -> str:
    """A value for a message, in few characters."""
    if isinstance(value, int) and value.bit_length() > 128:
        return "a number of very many digits"
    text = value[: SHOWN_CHARS + 1] if isinstance(value, str) else value
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "an object"
    return f"{text!r:.{SHOWN_CHARS}}"


def refuse(violations: list[FieldViolation]) -> None:
    """Raise `InvalidArgument` if there are any; of very many, the first ones are told."""
    if not violations:
        return
    more = len(violations) - SHOWN_VIOLATIONS
    if more > 0:
        rest = FieldViolation("body", f"{more} more things are wrong")
        violations = [*violations[:SHOWN_VIOLATIONS], rest]
    raise InvalidArgument(violations)


class Fields:
    """The fields of one object; null is the same as absent.

    path: where the object is in the request, "" for the request itself. Each reader gives None
    (or an empty value) for a field that is absent or wrong; wrong ones are in `violations`.
    """

    def __init__(
        self, given: Mapping[str, Any], violations: list[FieldViolation], path: str = ""
    ) -> None:
        self._given, self.violations, self._path = given, violations, path
        self._known: set[str] = set()

    def name(self, field: str) -> str:
        """The field's dotted name in the request."""
        return f"{self._path}.{field}" if self._path else field

    def refuse(self, field: str, description: str) -> None:
        """Add a violation."""
        self.violations.append(FieldViolation(self.name(field), description))

    def has(self, field: str) -> bool:
        """Whether the field is given and not null."""
        return self._given.get(field) is not None

    def value(self, field: str) -> Any:
        """The field as it is."""
        self._known.add(field)
        return self._given.get(field)

    def flag(self, field: str, default: bool = False) -> bool:
        """A boolean."""
        value = self.value(field)
        if value is not None and not isinstance(value, bool):
            self.refuse(field, f"{shown(value)} is neither true nor false")
            return default
        return default if value is None else value

    def integer(self, field: str, low: int, high: int) -> int | None:
        """An integer in [`low`, `high`]."""
        value = self.value(field)
        if value is None:
            return None
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not _is_integer(value) or not low <= value <= high:
            self.refuse(field, f"{shown(value)} is not an integer in [{low}, {high}]")
            return None
        return int(value)

    def number(self, field: str, low: float, high: float) -> float | None:
        """A number in [`low`, `high`]."""
        value = self.value(field)
        if value is None:
            return None
        number = as_number(value)
        if number is None or not low <= number <= high:
            self.refuse(field, f"{shown(value)} is not a number in [{low:g}, {high:g}]")
            return None
        return number

    def text(self, field: str) -> str | None:
        """A text."""
        value = self.value(field)
        if value is None:
            return None
        if not is_text(value):
            self.refuse(field, f"{shown(value)} is not a text")
            return None
        return str(value)

    def texts(self, field: str) -> list[str]:
        """A text, or a list of texts."""
        value = self.value(field)
        items = [value] if isinstance(value, str) else value
        if items is None:
            return []
        if not isinstance(items, list) or not all(map(is_text, items)):
            self.refuse(field, "is neither a text nor a list of texts")
            return []
        return items

    def integers(self, field: str) -> list[int]:
        """A list of token ids."""
        value = self.value(field)
        if value is None:
            return []
        if not isinstance(value, list) or not all(map(is_token_id, value)):
            self.refuse(field, "is not a list of token ids")
            return []
        return value

    def ignore(self, fields: Iterable[str]) -> None:
        """Take these fields, whatever they are: they change nothing here."""
        self._known.update(fields)

    def only(self, field: str, allowed: Iterable[object], words: str) -> None:
        """Take the field if it has a value that asks for nothing; null is such a value."""
        value = self.value(field)
        # equality alone would take 1 for true
        if value is not None and not any(
            value == item and type(value) is type(item) for item in allowed
        ):
            self.refuse(field, f"is not supported here; {words}")

    def finish(self) -> None:
        """Refuse every field that was not read."""
        unknown = [field for field in self._given if field not in self._known]
        for field in unknown[:SHOWN_FIELDS]:
            self.refuse(field[: 2 * SHOWN_CHARS], "is not known here")
        if len(unknown) > SHOWN_FIELDS:
            text = f"{len(unknown) - SHOWN_FIELDS} more fields are not known here"
            self.violations.append(FieldViolation(self._path or "body", text))


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def as_number(value: object) -> float | None:
    """The value as a float that fits a float32; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    fits = -_FLOAT32_MAX <= value <= _FLOAT32_MAX and math.isfinite(value)
    return float(value) if fits else None


def is_token_id(value: object) -> bool:
    """Whether this could be a token id of some vocabulary."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**32
