"""What a group of ranks has found on its disks, as the books of its tiers begin."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Protocol

from phalanx.protos.moves import DIGEST_BYTES
from phalanx.protos.specs import CacheSpec, LoadReport, TierSpec

from .tiers import LowerTiers

_log = logging.getLogger(__name__)


class Rank(Protocol):
    """`cluster.fleet.RankFacts` is one."""

    @property
    def report(self) -> LoadReport:
        """What it said when it had loaded."""


def open_tiers(spec: TierSpec, ranks: Sequence[Rank], cache: CacheSpec) -> LowerTiers:
    """The tiers of a replica whose ranks have loaded.

    A block is on disk if every rank has its part; whatever only some have is dropped. A rank that
    could not take its folder leaves the replica without a disk tier.
    """
    slots = min(spec.disk_slots, *(rank.report.disk_slots for rank in ranks))
    if slots < spec.disk_slots:
        _log.warning("a rank cannot use its folder in %s: no disk tier", spec.disk_folder)
    found = [list(_digests(rank.report.disk_digests)) for rank in ranks]
    everywhere = set(found[0]).intersection(*found[1:])
    strays = set().union(*found) - everywhere
    return LowerTiers(
        num_ranks=len(ranks),
        host_slots=spec.host_slots,
        disk_slots=slots,
        on_disk=[digest for digest in found[0] if digest in everywhere] if slots else (),
        strays=sorted(strays) if slots else (),
        refused=sum(rank.report.disk_refused for rank in ranks),
        block_tokens=cache.block_size,
        block_bytes=sum(rank.report.kv_bytes for rank in ranks) // cache.num_blocks,
    )


def _digests(joined: bytes) -> Iterator[bytes]:
    for start in range(0, len(joined), DIGEST_BYTES):
        yield joined[start : start + DIGEST_BYTES]
