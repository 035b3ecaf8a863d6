"""What the parity tests have seen, as they wrote it down: features by family and TP size."""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Iterator
from typing import Any

from .families import FAMILIES

TOKENS, LENGTHS, HITS = "tokens", "mixed lengths", "prefix hits"
CHUNKS = "odd chunks"
"""Parts of prompts, begun and ended anywhere."""
WINDOW = "windows"
"""Contexts several times as long as the sliding windows."""
EVERYWHERE = (TOKENS, CHUNKS, LENGTHS, HITS)
GGUF = "gguf"
ONE_CALL = "one call"
"""Every step ran all layers in one call of the compiled kernels."""
_COLUMNS = {  # of the document
    TOKENS: "Tokens",
    CHUNKS: "Odd chunks",
    LENGTHS: "Mixed lengths",
    HITS: "Prefix hits",
    WINDOW: "Windows crossed",
}
Features = dict[str, tuple[int, ...]]
"""Feature -> the TP sizes at which every configuration that has it was verified."""


def records() -> dict[str, dict[str, Any]]:
    """Configuration -> its family, and features with TP sizes."""
    file = importlib.resources.files("phalanx.workers.models").joinpath("verified.json")
    found: dict[str, dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
    return found


def verified() -> dict[str, Features]:
    """Family -> what was verified of it; families that were not compared are empty."""
    found: dict[str, Features] = {name: {} for name in FAMILIES}
    for record in records().values():
        features = found[record["family"]]
        for name, sizes in record["features"].items():
            both = set(sizes) & set(features.get(name, sizes))
            features[name] = tuple(sorted(both))
    return found


def sizes_text(sizes: tuple[int, ...]) -> str:
    """TP sizes for people."""
    return " ".join(map(str, sizes)) or "–"


def document() -> Iterator[str]:
    """The lines of `workers/FAMILIES.md`."""
    yield "# Families of models"
    yield ""
    yield (
        "What the parity tests verified, at which tensor-parallel sizes, against `transformers` in "
        "float32 on random weights of odd shapes: every token and log-probability of 8 prompts and "
        "32 tokens each, by way of the scheduler. Written by `make families` from the tests' result."
    )
    yield ""
    yield (
        "In one call: of the configurations, those whose layers a CPU's compiled kernels run as one "
        "call a step, which is the path that was compared. The others go operation by operation: "
        "mixtures of experts, latent attention, state spaces."
    )
    yield ""
    yield from _table()


def _table() -> Iterator[str]:
    compared = [record["family"] for record in records().values()]
    titles = ["Family", "Models", "Configurations", *_COLUMNS.values(), "In one call"]
    titles += ["Context scaling", "GGUF"]
    yield f"| {' | '.join(titles)} |"
    yield "| --- " * len(titles) + "|"
    for family, features in sorted(verified().items()):
        scalings = [name for name in features if name not in (*_COLUMNS, GGUF, ONE_CALL)]
        scaled = ", ".join(f"{name}: {sizes_text(features[name])}" for name in sorted(scalings))
        cells = [family, FAMILIES[family].models, str(compared.count(family))]
        cells += [sizes_text(features.get(name, ())) for name in _COLUMNS]
        cells += [_in_one_call(family), scaled or "–", sizes_text(features.get(GGUF, ()))]
        yield f"| {' | '.join(cells)} |"


def _in_one_call(family: str) -> str:
    mine = [set(r["features"]) for r in records().values() if r["family"] == family]
    mine = [features for features in mine if GGUF not in features]
    count = sum(ONE_CALL in features for features in mine)
    return "all" if count == len(mine) else f"{count} of {len(mine)}" if count else "–"
