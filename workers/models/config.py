"""Typed access to a Hugging Face config: every refusal names field, value and what is allowed."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping

from phalanx.protos.errors import ModelError

MAX_INTEGER = 2**31 - 1


def nearest(value: object, supported: Iterable[str]) -> str:
    """The supported names closest to `value`, for an error text."""
    names = list(supported)
    return ", ".join(difflib.get_close_matches(str(value), names, 3, 0.0) or names)


class ConfigReader:
    """Fields of a config; null counts as absent. Raises `ModelError` for a wrong value."""

    def __init__(
        self,
        config: Mapping[str, object],
        where: str = "config",
        names: Mapping[str, str] | None = None,
    ) -> None:
        self._config, self._where, self._names = config, where, names or {}

    def renamed(self, **names: str) -> ConfigReader:
        """The same config, whose author calls some fields otherwise: usual name = its name."""
        return ConfigReader(self._config, self._where, {**self._names, **names})

    def _name(self, field: str) -> str:
        other = self._names.get(field, field)
        return other if self._config.get(other) is not None else field

    def wrong(self, field: str, value: object, allowed: str) -> ModelError:
        """The error for a wrong field."""
        shown = "missing" if value is None else f"{value!r:.80}"
        return ModelError(f"{self._where}: {self._name(field)} is {shown}, allowed: {allowed}")

    def __contains__(self, field: str) -> bool:
        return field in self._config

    def get(self, field: str) -> object:
        """The raw value, None when absent."""
        return self._config.get(self._name(field))

    def require(self, **allowed: object) -> None:
        """Refuse a field that is set to anything but the one value that is supported."""
        for field, value in allowed.items():
            found = self.get(field)
            if found is not None and found != value:
                raise self.wrong(field, found, "null" if value is None else f"{value!r}")

    def numbers(self, field: str, count: int) -> tuple[float, ...]:
        """A list of `count` positive finite numbers."""
        values = self.get(field)
        allowed = f"a list of {count} finite numbers above 0"
        if not isinstance(values, list) or len(values) != count:
            raise self.wrong(field, values, allowed)
        for value in values:
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not 0 < value < math.inf:
                raise self.wrong(field, values, allowed)
        return tuple(float(value) for value in values)

    def integer(
        self, field: str, default: int | None = None, *, most: int = MAX_INTEGER, least: int = 1
    ) -> int:
        """A whole number in [least, most]; required when there is no default."""
        value = self.get(field)
        if value is None and default is not None:
            return default
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not isinstance(value, int) or not whole or not least <= value <= most:
            raise self.wrong(field, value, f"whole numbers from {least} to {most}")
        return value

    def number(self, field: str, default: float | None = None) -> float:
        """A positive finite number; required when there is no default."""
        value = self.get(field)
        if value is None and default is not None:
            return default
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not isinstance(value, int | float) or not number or not 0 < value < math.inf:
            raise self.wrong(field, value, "finite numbers above 0")
        return float(value)

    def flag(self, field: str, default: bool = False) -> bool:
        """True or false."""
        value = self.get(field)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.wrong(field, value, "true or false")
        return value

    def choice(self, field: str, default: str | None, allowed: Iterable[str]) -> str:
        """One of the allowed texts; the error lists the nearest."""
        value = self.get(field)
        if value is None and default is not None:
            return default
        names = list(allowed)
        if not isinstance(value, str) or value not in names:
            raise self.wrong(field, value, nearest(value, names))
        return value

    def section(self, field: str) -> ConfigReader | None:
        """A nested object, None when absent or empty."""
        value = self.get(field)
        if value is None or value == {}:
            return None
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            raise self.wrong(field, value, "an object")
        return ConfigReader(value, f"{self._where}.{field}")

    def only(self, fields: Iterable[str]) -> None:
        """Refuse fields that are set and not among `fields`."""
        known = set(fields)
        for field, value in self._config.items():
            if value is not None and field not in known:
                raise self.wrong(field, value, f"only {', '.join(sorted(known))} here")
