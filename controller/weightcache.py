"""Where ranks keep weights as they packed them: the fields of the configuration, and their sense."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from phalanx.protos.specs import WeightCacheSpec

from .rules import option

AUTO = "auto"


@dataclass(frozen=True, kw_only=True)
class WeightCacheFields:
    """Those of `ClusterConfig` that are about this."""

    weights_cache: str | None = option(
        AUTO,
        "Folder in which CPU ranks keep weights as they packed them, for their next start. auto is "
        "this user's, below XDG_CACHE_HOME, and used where packing takes long.",
        unset="off",
        group="Advanced",
    )
    weights_cache_bytes: int = option(
        32 * 2**30,
        "Size of that folder at most; the least recently used files make room.",
        low=1,
        size=True,
        group="Advanced",
    )


INHERITED = frozenset(item.name for item in dataclasses.fields(WeightCacheFields))


def weight_cache(config: WeightCacheFields, device: str) -> WeightCacheSpec | None:
    """What ranks are told; nothing on GPUs, where weights are not packed."""
    if config.weights_cache is None or device != "cpu":
        return None
    folder = "" if config.weights_cache == AUTO else config.weights_cache
    return WeightCacheSpec(folder=folder, most_bytes=config.weights_cache_bytes)
