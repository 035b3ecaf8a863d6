"""What each tenant may have: its share, its quotas, and how urgent it may call its requests."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from pathlib import Path

import msgspec

from phalanx.protos.errors import ConfigError
from phalanx.protos.limits import PRIORITY_RANGE

CANARY_TENANT = "phalanx-canary"
"""Whose requests prove that a replica works. They take no share from anybody."""


class TenantLimits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One tenant's. None: no bound of its own."""

    weight: float = 1.0
    """Share of the service where several tenants wait."""
    max_requests: int | None = None
    """Open at the same time, waiting or running."""
    max_queued: int | None = None
    """Samples that wait in one replica; None: as many as the cluster's `max_queued`."""
    tokens_per_minute: int | None = None
    """Prompt and output together; up to a minute's worth may come at once."""
    priorities: tuple[int, int] = PRIORITY_RANGE
    """The lowest and the highest number that its requests may have."""


class Tenants:
    """The limits of all tenants."""

    def __init__(
        self,
        named: Mapping[str, TenantLimits] | None = None,
        others: TenantLimits | None = None,
    ) -> None:
        """others: of each tenant that has no entry."""
        self._named, self._others = dict(named or {}), others or TenantLimits()

    def of(self, tenant: str) -> TenantLimits:
        """The limits of this tenant."""
        return self._named.get(tenant, self._others)


def read_tenants(path: str | None) -> Tenants:
    """From a TOML file: a table `[tenants.NAME]` for each, `[others]` for those that have none.

    Raises `ConfigError` naming the tenant and the field.
    """
    if path is None:
        return Tenants()
    try:
        tables = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"tenants_file {path!r} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"tenants_file {path!r} is not TOML: {error}") from None
    named = tables.pop("tenants", {})
    others = tables.pop("others", {})
    if tables or not isinstance(named, dict):
        raise ConfigError("tenants_file: allowed are tables [tenants.NAME] and [others]")
    limits = {name: _limits(f"tenants.{name}", table) for name, table in named.items()}
    return Tenants(limits, _limits("others", others))


def _limits(where: str, table: object) -> TenantLimits:
    try:
        limits = msgspec.convert(table, TenantLimits)
    except msgspec.ValidationError as error:
        raise ConfigError(f"tenants_file: {where}: {error}") from None
    wrong = []
    if not 0.0 < limits.weight < math.inf:
        wrong.append(f"weight is {limits.weight}, allowed: finite and above 0")
    for name in ("max_requests", "max_queued", "tokens_per_minute"):
        value = getattr(limits, name)
        if value is not None and value < 1:
            wrong.append(f"{name} is {value}, allowed: at least 1")
    low, high = limits.priorities
    if not PRIORITY_RANGE[0] <= low <= high <= PRIORITY_RANGE[1]:
        allowed = f"a pair within {list(PRIORITY_RANGE)}, the lower one first"
        wrong.append(f"priorities is {[low, high]}, allowed: {allowed}")
    if wrong:
        raise ConfigError(f"tenants_file: {where}: {'; '.join(wrong)}")
    return limits
