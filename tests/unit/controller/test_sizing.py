"""What a group is told, given where its ranks stand."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest

from phalanx.controller.cluster.recording import recorded_bytes
from phalanx.controller.cluster.sizing import GPU_PART, plan_tiers, plan_unplaced, size_group
from phalanx.controller.config import ClusterConfig
from phalanx.controller.model import resolve_model
from phalanx.protos.errors import ConfigError
from phalanx.protos.specs import StateSpec

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """A place of one rank."""

    address: str
    memory_available: int
    fast_bfloat16: bool = True


@pytest.mark.parametrize("tp", [1, 2])
def test_a_gpu_keeps_room_for_recorded_steps(tiny_llama: Callable[..., Path], tp: int) -> None:
    folder = str(tiny_llama())
    served, config = resolve_model(folder), ClusterConfig(model=folder, tp=tp)
    gpus = [Gpu("10.0.0.1", 2 * GIB), Gpu("10.0.0.1", 3 * GIB)][:tp]
    spec, plan = size_group(config, served, "cuda", gpus)
    assert (spec.device, spec.dtype, spec.cache.dtype) == ("cuda", "bfloat16", "bfloat16")
    left = []
    for gpu, rank in zip(gpus, plan.ranks, strict=True):
        held = recorded_bytes(
            served.spec, dtype="bfloat16", tp_size=tp, rank=rank.rank, max_running=64
        )
        assert held > GIB // 2
        left.append(gpu.memory_available * GPU_PART - rank.total - held)
    assert 0 <= min(left) < plan.ranks[0].kv_per_token * spec.cache.block_size + 1


def test_a_gpu_too_small_for_them_is_refused(tiny_llama: Callable[..., Path]) -> None:
    folder = str(tiny_llama())
    with pytest.raises(ConfigError, match="rank 0 needs"):
        size_group(
            ClusterConfig(model=folder), resolve_model(folder), "cuda", [Gpu("here", GIB // 2)]
        )


def test_unrecorded_steps_need_no_room(tiny_llama: Callable[..., Path]) -> None:
    folder, gpus = str(tiny_llama()), [Gpu("here", 2 * GIB)]
    config = ClusterConfig(model=folder, record_steps=False)
    spec, plan = size_group(config, resolve_model(folder), "cuda", gpus)
    assert not spec.record_steps
    assert plan.ranks[0].total > gpus[0].memory_available * GPU_PART - 2**20


def test_stages_record_nothing_and_need_no_room(tiny_llama: Callable[..., Path]) -> None:
    folder, gpus = str(tiny_llama()), [Gpu("here", 2 * GIB), Gpu("there", 2 * GIB)]
    _, plan = size_group(ClusterConfig(model=folder, pp=2), resolve_model(folder), "cuda", gpus)
    assert max(rank.total for rank in plan.ranks) > gpus[0].memory_available * GPU_PART - 2**20


def test_old_gpus_compute_in_float32(tiny_llama: Callable[..., Path]) -> None:
    folder = str(tiny_llama())
    gpus = [Gpu("10.0.0.1", 2 * GIB, fast_bfloat16=False)]
    spec, _ = size_group(ClusterConfig(model=folder), resolve_model(folder), "cuda", gpus)
    assert spec.dtype == "float32"


def test_tiers_are_counted_in_blocks_of_the_widest_rank(tiny_llama: Callable[..., Path]) -> None:
    folder = str(tiny_llama())
    served = resolve_model(folder)
    fields = {"tp": 3, "block_size": 4, "disk_kv_path": "/kv", "disk_kv_memory": 4500}
    config = ClusterConfig(model=folder, host_kv_memory=3000, **fields)  # type: ignore[arg-type]
    plan = plan_unplaced(config, served)
    # 2 layers, keys and values of one head of 8, bfloat16: 4 tokens are 256 bytes
    tiers = plan_tiers(config, served, plan, 2)
    assert tiers is not None
    assert (tiers.host_slots, tiers.disk_slots) == (11, 17)
    assert tiers.disk_folder == "/kv/replica-2"
    small = dataclasses.replace(config, host_kv_memory=100)
    with pytest.raises(ConfigError, match="host_kv_memory is 100, allowed: at least .* 256"):
        plan_unplaced(small, served)


def test_tiers_are_refused_where_states_would_have_to_move(tiny_llama: Callable[..., Path]) -> None:
    folder = str(tiny_llama())
    served = resolve_model(folder)
    state = StateSpec(inner_size=8, state_size=4, conv_width=4, step_rank=2, layers=(0,))
    hybrid = dataclasses.replace(served, spec=msgspec.structs.replace(served.spec, state=state))
    config = ClusterConfig(model=folder, host_kv_memory=2**20)
    with pytest.raises(ConfigError, match="state spaces .* cannot be moved"):
        plan_unplaced(config, hybrid)
