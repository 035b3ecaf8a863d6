"""A rank's tiers below its KV pool, from opening to closing."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import msgspec
import torch

from phalanx.protos.moves import MoveReport
from phalanx.protos.shards import Span, Stage
from phalanx.protos.specs import LoadReport, WorkerSpec
from phalanx.protos.steps import StepPlan

from .cache import PagedCache
from .disk import DiskTier, fingerprint
from .moving import BlockMover, check_moves

_log = logging.getLogger(__name__)


class RankTiers:
    """Host memory and disk of one rank; nothing at all where the spec asks for none."""

    def __init__(
        self, spec: WorkerSpec, stage: Stage, place: int, heads: Span, cache: PagedCache
    ) -> None:
        """place: of the rank in its stage. heads: the KV heads whose parts of blocks it holds."""
        self._spec, self._stage, self._heads = spec, stage, heads
        self._cache, self._blocks = cache, cache.blocks
        self._rank = stage.index * spec.tp_size + place
        self._mover: BlockMover | None = None

    def open(self, report: LoadReport, say: Callable[[MoveReport], None]) -> LoadReport:
        """Take what the spec says, and answer what was found beside `report`.

        say: called for moves that have ended, on another thread. Raises `ConfigError`.
        """
        tiers = self._spec.tiers
        if tiers is None:
            return report
        disk = None
        if tiers.disk_slots:
            disk = self._open_disk(Path(tiers.disk_folder))
        if disk is not None:
            found = disk.scan()
            report = msgspec.structs.replace(
                report,
                disk_slots=tiers.disk_slots,
                disk_digests=b"".join(found.digests),
                disk_refused=found.refused,
            )
        device = torch.device(self._spec.device)
        self._mover = BlockMover(self._blocks, tiers, disk, device, say)
        return report

    def begin(self, plan: StepPlan) -> None:
        """Take a plan's orders. Raises `GroupLost` for those that cannot be meant."""
        if plan.moves:
            check_moves(plan.moves, self._spec.cache.num_blocks, self._spec.tiers)
            if self._mover is not None:
                self._mover.begin(plan.moves)

    def close(self) -> None:
        """Let go of everything; what is on disk stays."""
        if self._mover is not None:
            self._mover.close()
            self._mover = None

    def _open_disk(self, folder: Path) -> DiskTier | None:
        """This rank's own folder, or the one for a successor that starts beside its predecessor."""
        marks = fingerprint(self._spec, self._stage, self._heads, self._cache.arrangement)
        for name in (f"rank-{self._rank}", f"rank-{self._rank}-beside"):
            disk = DiskTier(folder / name, marks, self._blocks.num_bytes)
            if disk.acquire():
                return disk
            disk.close()
        _log.warning("disk_kv_path: %s is in use, so rank %d has no disk tier", folder, self._rank)
        return None
