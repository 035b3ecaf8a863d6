"""Where ranks would find places: pure arithmetic on what nodes have free."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

Free = Mapping[str, int]
"""Node to the ranks that it could take now. Nodes that are gone are not in it."""


def has_room(free: Free, tp: int, pp: int, strategy: str) -> bool:
    """Whether `pp` stages of `tp` ranks find places under one of Ray's strategies.

    Of one stage each rank is a bundle of its own; of several, each stage is one, as `RayFleet`
    asks for them.
    """
    bundles, size = (tp, 1) if pp == 1 else (pp, tp)
    fitting = [places // size for places in free.values()]
    if strategy == "STRICT_PACK":
        return max(fitting, default=0) >= bundles
    if strategy == "STRICT_SPREAD":
        return sum(count > 0 for count in fitting) >= bundles
    return sum(fitting) >= bundles


def largest_tp(free: Free, most: int, pp: int, strategy: str) -> int:
    """The largest TP size up to `most` that finds places; 0: none does."""
    return next((tp for tp in range(most, 0, -1) if has_room(free, tp, pp, strategy)), 0)


def freed(free: Free, places: Iterable[str]) -> dict[str, int]:
    """What would be free without the ranks on these nodes, one entry a rank."""
    back = Counter(places)
    return {place: count + back[place] for place, count in free.items()}
