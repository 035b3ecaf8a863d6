"""A replica with what is known of it outside its step loop."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from phalanx.protos.shards import Stage, cut_model, cut_stages
from phalanx.protos.specs import DecoderSpec

from .cluster.fleet import RankFacts
from .cluster.snapshot import RankSnapshot, ReplicaPhase, ReplicaSnapshot
from .kvcache.prefix import PrefixNaming
from .replica import Replica
from .routing.pace import Pace, PaceMeter


class ReplicaHandle:
    """The replica in slot `index`.

    block_tokens: tokens of a KV block. namespace: of the prefixes that it caches, see
    `KVCacheManager`. meter: observes its steps; None: its speed is unknown. places: samples that it
    computes together at most; None: no bound. num_stages: among which its ranks are divided.
    """

    def __init__(
        self,
        index: int,
        replica: Replica,
        ranks: Sequence[RankFacts],
        block_tokens: int,
        *,
        namespace: bytes = b"",
        meter: PaceMeter | None = None,
        places: int | None = None,
        num_stages: int = 1,
    ) -> None:
        self.index, self.replica = index, replica
        self.naming = PrefixNaming(block_tokens, namespace)
        self.places = places
        self._ranks, self._meter = tuple(ranks), meter
        self._num_stages = num_stages
        self.proven = False
        """Whether it has produced a canary token."""
        self._blocks, self._asked = b"", False
        self.leaving = False
        """Whether it ends on purpose: its streams are blamed for nothing."""
        self.left = asyncio.Event()
        """Set when its streams have been taken from it."""

    @property
    def tp(self) -> int:
        """Ranks of a stage."""
        return len(self._ranks) // self._num_stages

    @property
    def rank_places(self) -> tuple[str, ...]:
        """The node of each rank, as the cluster names it."""
        return tuple(rank.place for rank in self._ranks)

    @property
    def replica_id(self) -> str:
        """Its name for people."""
        return f"replica-{self.index}"

    @property
    def serving(self) -> bool:
        """Whether it takes requests."""
        return self.proven and not self.leaving and self.replica.lost is None

    @property
    def room(self) -> int:
        """Tokens that its KV pool holds."""
        return self.replica.stats().blocks_total * self.naming.block_size

    @property
    def token_bytes(self) -> float:
        """Bytes that a token takes in the KV pools of all its ranks."""
        return sum(rank.report.kv_bytes for rank in self._ranks) / max(self.room, 1)

    @property
    def copied_bytes(self) -> float:
        """The same where its ranks exchange blocks with those of other replicas, else 0."""
        return self.token_bytes if self.replica.transfers.exchange is not None else 0.0

    @property
    def pace(self) -> Pace:
        """How fast it is, as far as was measured."""
        return self._meter.pace if self._meter else Pace()

    @property
    def block_map(self) -> bytes:
        """The state of every KV block, see `KVCacheManager.block_map`, as it was soon after the
        last `ask_block_map`; empty before the first."""
        return self._blocks

    def ask_block_map(self) -> None:
        """Let the step loop renew `block_map`."""
        if not self._asked and self.serving:
            self._asked = True
            self.replica.map_blocks(self._take_map)

    def _take_map(self, blocks: bytes) -> None:
        self._blocks, self._asked = blocks, False

    @property
    def _phase(self) -> ReplicaPhase:
        if self.replica.lost is not None:
            return "lost"
        if self.leaving:
            return "draining"
        return "ready" if self.proven else "starting"

    def snapshot(self, model: DecoderSpec) -> ReplicaSnapshot:
        """As of its last step."""
        stats = self.replica.stats()
        stages = cut_stages(model, self._num_stages)
        return ReplicaSnapshot(
            replica_id=self.replica_id,
            state=self._phase,
            tp=self.tp,
            ranks=tuple(_rank(facts, model, stages, len(self._ranks)) for facts in self._ranks),
            running_requests=stats.running,
            waiting_requests=stats.waiting,
            kv_blocks_total=stats.blocks_total,
            kv_blocks_free=stats.blocks_free,
            kv_blocks_cached=stats.blocks_cached,
            kv_block_tokens=self.naming.block_size,
            prefix_queried_tokens=stats.prefix_queried,
            prefix_hit_tokens=stats.prefix_hit,
            preemptions=stats.preemptions,
            steps=stats.steps,
            tiers=stats.tiers,
        )


def _rank(
    facts: RankFacts, model: DecoderSpec, stages: Sequence[Stage], num_ranks: int
) -> RankSnapshot:
    tp_size = num_ranks // len(stages)
    index, place = divmod(facts.rank, tp_size)
    part, layers = cut_model(model, tp_size, place), stages[index].layers
    heads = part.heads.query
    if part.state is not None and not model.attention_layers:
        heads = part.state.units
    return RankSnapshot(
        rank=facts.rank,
        node=facts.node,
        device=facts.device,
        weight_bytes=facts.report.weight_bytes,
        kv_bytes=facts.report.kv_bytes + facts.report.state_bytes,
        head_start=heads.start,
        head_stop=heads.stop,
        stage=index,
        layer_start=layers.start,
        layer_stop=layers.stop,
    )
