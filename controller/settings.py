"""Where a configuration comes from: defaults, a TOML file, flags."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from phalanx.protos.errors import ConfigError

from .config import KINDS, RULES, ClusterConfig
from .units import parse_bytes


def parse_value(name: str, value: object) -> object:
    """The value of field `name` as a file or a flag writes it, in the field's own type.

    What cannot be read is returned as it is, for `ClusterConfig` to refuse.
    """
    rule, kind = RULES[name], KINDS[name]
    if not isinstance(value, str):
        return float(value) if kind is float and type(value) is int else value
    if rule.unset and value == rule.unset:
        return None
    if kind not in (int, float):
        return value
    try:
        return parse_bytes(value) if rule.size else kind(value)
    except ValueError:
        return value


def read_config_file(path: Path) -> dict[str, object]:
    """The fields of a TOML file, whose keys are the names of `ClusterConfig`'s fields."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"config file {path}: cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {path}: not TOML: {error}") from None
    unknown = sorted(set(table) - set(RULES))
    if unknown:
        raise ConfigError(
            f"config file {path}: {', '.join(unknown)}: no such field; allowed: {', '.join(RULES)}"
        )
    return table


def load_config(file: Path | None, flags: Mapping[str, object]) -> ClusterConfig:
    """Defaults, then the file, then the flags that are not None; the last one wins.

    Raises `ConfigError` for an unreadable file, an unknown field or a wrong value.
    """
    fields = read_config_file(file) if file else {}
    fields |= {name: value for name, value in flags.items() if value is not None}
    if "model" not in fields:
        raise ConfigError(f"model is missing, allowed: {RULES['model'].help}")
    values: dict[str, Any] = {name: parse_value(name, value) for name, value in fields.items()}
    return ClusterConfig(**values)
