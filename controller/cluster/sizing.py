"""From "auto" to numbers: what a group of ranks is told, given where its ranks stand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Literal, Protocol, cast

from phalanx.controller.config import ClusterConfig
from phalanx.controller.model import ServedModel
from phalanx.controller.weightcache import weight_cache
from phalanx.protos.errors import ConfigError
from phalanx.protos.recording import records_steps
from phalanx.protos.specs import DType, TierSpec, WorkerSpec, activation_dtype, foreign_formats

from .placement import MemoryPlan, plan_memory
from .recording import recorded_bytes

GPU_PART = 0.9  # the rest is for the allocator, the driver and the collectives' buffers
CPU_PART = 0.5  # host memory is shared with the page cache, which holds the checkpoint
CPU_KV_BYTES = 2 * 2**30  # "auto" takes no more on a host that others use too


class Node(Protocol):
    """What sizing needs to know of a rank's place; `workers.actor.NodeFacts` has it."""

    @property
    def address(self) -> str:
        """Ranks with equal addresses share a machine."""

    @property
    def memory_available(self) -> int:
        """Free bytes, before any rank has loaded."""

    @property
    def fast_bfloat16(self) -> bool:
        """Whether bfloat16 is multiplied natively."""


def plan_config(
    config: ClusterConfig,
    served: ServedModel,
    *,
    auto_dtype: DType,
    memory_per_rank: Sequence[int] | None,
    kv_tokens: int | None,
    state_slots: int | None = None,
) -> MemoryPlan:
    """The memory plan of a configuration; one full context is the least cache that is accepted.

    auto_dtype: what "auto" means here. The other arguments are those of `plan_memory`.
    """
    dtype = cast(DType, auto_dtype if config.dtype == "auto" else config.dtype)
    auto_kv = activation_dtype(dtype)
    kv_dtype = cast(DType, auto_kv if config.kv_dtype == "auto" else config.kv_dtype)
    return plan_memory(
        served.spec,
        dtype=dtype,
        kv_dtype=kv_dtype,
        tp_size=config.tp,
        pp_size=config.pp,
        block_size=config.block_size,
        max_tokens_per_step=config.max_tokens_per_step,
        max_running=config.max_running,
        memory_per_rank=memory_per_rank,
        kv_tokens=kv_tokens,
        min_kv_tokens=served.max_context,
        state_slots=config.state_slots or state_slots,
    )


def plan_unplaced(config: ClusterConfig, served: ServedModel) -> MemoryPlan:
    """The plan before any place is known, in bfloat16 unless the configuration says otherwise.

    Without `memory_per_rank` and `kv_tokens` the cache holds one full context. Raises
    `ConfigError` for what no machine could run.
    """
    memory = None
    if config.memory_per_rank is not None:
        memory = [config.memory_per_rank] * config.ranks_per_replica
    kv_tokens = config.kv_tokens or (served.max_context if memory is None else None)
    plan = plan_config(
        config, served, auto_dtype="bfloat16", memory_per_rank=memory, kv_tokens=kv_tokens
    )
    plan_tiers(config, served, plan)
    return plan


def size_group(
    config: ClusterConfig,
    served: ServedModel,
    device: Literal["cpu", "cuda"],
    nodes: Sequence[Node],
    *,
    epoch: int = 0,
) -> tuple[WorkerSpec, MemoryPlan]:
    """What to build on `nodes`, one entry a rank. Raises `ConfigError` when it does not fit."""
    if wrong := foreign_formats(config.dtype, config.kv_dtype, device):
        raise ConfigError("; ".join(wrong))
    auto: DType = "bfloat16" if all(node.fast_bfloat16 for node in nodes) else "float32"
    memory = _memory_per_rank(config, device, nodes)
    records = config.record_steps and records_steps(served.spec, config.pp)
    if device == "cuda" and records and config.memory_per_rank is None:
        dtype = cast(DType, auto if config.dtype == "auto" else config.dtype)
        for rank, available in enumerate(memory):
            held = recorded_bytes(
                served.spec,
                dtype=dtype,
                tp_size=config.tp,
                rank=rank,
                max_running=config.max_running,
            )
            memory[rank] = max(available - held, 0)

    def plan(kv_tokens: int | None, state_slots: int | None = None) -> MemoryPlan:
        return plan_config(
            config,
            served,
            auto_dtype=auto,
            memory_per_rank=memory,
            kv_tokens=kv_tokens,
            state_slots=state_slots,
        )

    result = plan(config.kv_tokens)
    if config.memory_per_rank is None and device == "cpu":
        tokens, slots = _modest(result, served.max_context)
        result = plan(config.kv_tokens or tokens, slots)
    spec = WorkerSpec(
        checkpoint=served.checkpoint,
        model=served.spec,
        dtype=result.dtype,
        tp_size=config.tp,
        pp_size=config.pp,
        cache=result.cache,
        max_tokens_per_step=config.max_tokens_per_step,
        max_running=config.max_running,
        eos_token_ids=served.eos_token_ids,
        device=device,
        record_steps=config.record_steps,
        epoch=epoch,
        tokenizer=served.tokenizer.to_str(),
        trace_endpoint=config.trace_endpoint or "",
        weight_cache=weight_cache(config, device),
    )
    return spec, result


def plan_tiers(
    config: ClusterConfig, served: ServedModel, plan: MemoryPlan, replica: int = 0
) -> TierSpec | None:
    """The tiers below the pool of a replica, if any are wanted.

    Raises `ConfigError` where the model or the memory has no use for them.
    """
    if config.host_kv_memory is None:
        return None
    if served.spec.state is not None:
        raise ConfigError(
            "host_kv_memory: a model with state spaces keeps states beside its KV blocks, which "
            "cannot be moved; allowed: off"
        )
    block_bytes = max(rank.kv_per_token for rank in plan.ranks) * plan.cache.block_size
    host, disk = config.host_kv_memory // block_bytes, 0
    if config.disk_kv_path is not None:
        disk = config.disk_kv_memory // block_bytes
    wanted = {"host_kv_memory": (config.host_kv_memory, host)}
    if config.disk_kv_path is not None:
        wanted["disk_kv_memory"] = (config.disk_kv_memory, disk)
    for name, (size, blocks) in wanted.items():
        if not blocks:
            raise ConfigError(f"{name} is {size}, allowed: at least a KV block, {block_bytes}")
    folder = f"{config.disk_kv_path}/replica-{replica}" if disk else ""
    return TierSpec(host_slots=host, disk_slots=disk, disk_folder=folder)


def _modest(plan: MemoryPlan, max_context: int) -> tuple[int, int | None]:
    """Tokens and slots for states of a plan, but no more than a host shared with others gives."""
    widest = max(rank.kv_per_token for rank in plan.ranks)
    tokens = plan.kv_tokens
    if widest:
        tokens = min(tokens, max(CPU_KV_BYTES // widest, max_context))
    slots = plan.cache.num_states
    if slots:
        slots = min(slots, max(CPU_KV_BYTES // max(rank.state_slot for rank in plan.ranks), 1))
    return tokens, slots or None


def _memory_per_rank(
    config: ClusterConfig, device: Literal["cpu", "cuda"], nodes: Sequence[Node]
) -> list[int]:
    """Bytes that each rank may use."""
    if config.memory_per_rank is not None:
        return [config.memory_per_rank] * len(nodes)
    if device == "cuda":
        return [int(node.memory_available * GPU_PART) for node in nodes]
    ranks = Counter(node.address for node in nodes)
    tier = config.host_kv_memory or 0
    # replicas that are not yet loaded want their part of the same memory
    shares = {address: count * config.num_replicas for address, count in ranks.items()}
    parts = (int(node.memory_available * CPU_PART) // shares[node.address] for node in nodes)
    return [max(part - tier, 0) for part in parts]
