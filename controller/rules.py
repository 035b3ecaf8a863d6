"""What a field of the configuration allows, and how it is described."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Rule:
    """What a field allows, and how it is described.

    `choices` or the closed range `low` to `high` bound the value. `unset` is the word that means
    None in a file or flag ("auto", "off"); fields without one are never None. `size` accepts
    texts such as "2GiB".
    """

    help: str
    choices: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None
    unset: str = ""
    size: bool = False
    group: str = "Engine"

    @property
    def allowed(self) -> str:
        """The allowed values, in words."""
        if self.choices:
            return "one of " + ", ".join(self.choices)
        if self.high is not None:
            text = f"{self.low:g} to {self.high:g}"
        elif self.low is not None:
            text = f"at least {self.low:g}"
        else:
            text = "a text"
        text += " bytes, such as 2GiB" if self.size else ""
        return f"{text}, or {self.unset}" if self.unset else text

    def violations(self, name: str, kind: type, value: object) -> list[str]:
        """What is wrong with the value of field `name`, whose values are of type `kind`."""
        if value is None and self.unset:
            return []
        is_bool = isinstance(value, bool)
        fits = isinstance(value, (int, float) if kind is float else kind)
        fits = fits and is_bool == (kind is bool)
        if fits and isinstance(value, str):
            fits = value in self.choices if self.choices else value != ""
        elif fits and isinstance(value, int | float) and not is_bool:
            above = self.low is None or self.low <= value
            fits = above and (self.high is None or value <= self.high)
        allowed = "true or false" if kind is bool else self.allowed
        return [] if fits else [f"{name} is {value!r}, allowed: {allowed}"]


def option(default: Any, help: str, **rule: Any) -> Any:
    """A field with its default and its rule."""
    return field(default=default, metadata={"rule": Rule(help, **rule)})
