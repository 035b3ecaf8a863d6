"""The same workload on several layouts of one cluster, and how well each uses its ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from phalanx.protos.errors import ConfigError

FIELDS = ("tp", "pp", "replicas", "placement", "collectives", "threads")
COUNTS = ("tp", "pp", "replicas")


@dataclass(frozen=True, slots=True)
class Layout:
    """Ranks in a shape: fields of the configuration, as texts."""

    fields: tuple[tuple[str, str], ...]

    @classmethod
    def parse(cls, text: str) -> Layout:
        """From "tp=2,replicas=2". Raises `ConfigError` naming the field."""
        pairs = [part.strip().partition("=") for part in text.split(",")]
        allowed = f"{', '.join(FIELDS)}, such as tp=2,replicas=2"
        for name, separator, value in pairs:
            if name not in FIELDS or not separator or not value:
                raise ConfigError(f"layout is {text!r}: {name!r}, allowed: {allowed}")
            if name in COUNTS and not (value.isascii() and value.isdigit() and int(value) >= 1):
                raise ConfigError(f"layout is {text!r}: {name} is {value!r}, allowed: at least 1")
        names = [name for name, _, _ in pairs]
        if len(set(names)) < len(names):
            raise ConfigError(f"layout is {text!r}: a field comes twice")
        return cls(tuple((name, value) for name, _, value in pairs))

    @property
    def name(self) -> str:
        """For people, and what `parse` reads."""
        return ",".join(f"{name}={value}" for name, value in self.fields)

    @property
    def ranks(self) -> int:
        """Processes that compute."""
        counts = dict(self.fields)
        product = 1
        for name in COUNTS:
            product *= int(counts.get(name, "1"))
        return product

    @property
    def flags(self) -> list[str]:
        """As `phalanx serve` takes them."""
        return [word for name, value in self.fields for word in (f"--{name}", value)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One layout's measurement: the report of `run_benchmark`, or why there is none."""

    layout: Layout
    report: dict[str, Any] | None
    error: str = ""

    @property
    def tokens_per_s(self) -> float | None:
        """Output tokens of completed requests."""
        if self.report is None:
            return None
        return float(self.report["results"]["output_tokens_per_s"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaling:
    """A run beside the first one that was measured: `speedup` is the ratio of their output tokens
    a second, `efficiency` that of output tokens a second and rank."""

    run: Run
    speedup: float | None
    efficiency: float | None


def scaling(runs: list[Run]) -> list[Scaling]:
    """Every run beside the first that has figures; None where one has none."""
    rates = [(run, run.tokens_per_s) for run in runs]
    base = next(((run, rate) for run, rate in rates if rate), None)
    found = []
    for run, rate in rates:
        if base is None or rate is None:
            found.append(Scaling(run=run, speedup=None, efficiency=None))
            continue
        speedup = rate / base[1]
        efficiency = speedup * base[0].layout.ranks / run.layout.ranks
        found.append(Scaling(run=run, speedup=speedup, efficiency=efficiency))
    return found
