"""Every kernel, compiled for sm_90a in the shapes of real models: no spills, 16-byte loads."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from phalanx.kernels.float8 import FLOAT8
from phalanx.kernels.fused import PeerBuffers
from phalanx.kernels.gpu import (
    activation,
    all_reduce,
    attention_tiles,
    int4,
    linear,
    norm,
    rope,
    sampling,
)
from phalanx.kernels.gpu.plan import GpuPlan
from phalanx.kernels.interface import AttentionSpec

META = torch.device("meta")
SHARED_MEMORY = 227 * 1024  # bytes that a block may use on sm_90


class Case(NamedTuple):
    """Something that launches kernels, and how many 16-byte loads they have at least."""

    run: Callable[[], Any]
    wide_loads: int


def _empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device=META)


def _slots(tokens: int) -> Tensor:
    return _empty(tokens, dtype=torch.int64)


def _rope_store(
    heads: int,
    kv_heads: int,
    dim: int,
    half: int,
    *,
    norms: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    pools = [_empty(kv_heads, 1000, 16, dim, dtype=dtype) for _ in range(2)]
    weights = (_empty(dim), _empty(dim), 1e-6, 0.0)
    rope.rope_store_kv(
        _empty(8, (heads + 2 * kv_heads) * dim),
        _empty(8, half),
        _empty(8, half),
        *pools,
        _slots(8),
        weights if norms else None,
    )


def _attend(
    heads: int,
    kv_heads: int,
    dim: int,
    *,
    queries: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    ahead: bool = False,
    **scores: Any,
) -> None:
    plan = GpuPlan(
        tables=_empty(8, 512, dtype=torch.int32),
        lengths=_empty(8, dtype=torch.int64),
        starts=_empty(9, dtype=torch.int32),
        prompt_lengths=_empty(9, dtype=torch.int32),
        block_size=16,
        num_tokens=8 * queries,
        max_length=8192,
        longest_query=queries,
        has_decodes=queries == 1,
        has_prefills=queries > 1,
    )
    pool = _empty(kv_heads, 4096, 16, dim, dtype=dtype)
    query = _empty(8 * queries, heads, dim)
    spec = AttentionSpec(scale=0.1, **scores)
    attention_tiles.paged_attention(query, pool, pool, plan, spec, ahead=ahead)


def _sample(vocabulary: int) -> None:
    temperatures, counts = _empty(8, dtype=torch.float64), _empty(8, dtype=torch.int64)
    sampling.sample(_empty(8, vocabulary), temperatures, counts, counts, 0)


def _tail_sums(vocabulary: int) -> None:
    numbers = [_empty(8, dtype=torch.float64) for _ in range(2)]
    logits, lowest = _empty(8, vocabulary, dtype=torch.float32), _empty(8, dtype=torch.int64)
    for weighted in (False, True):
        sampling.tail_sums(logits, *numbers, lowest, 1 << 28, weighted=weighted)


def _multiply(rows: int, **options: Any) -> None:
    linear.small_product(_empty(rows, 14336), _empty(4096, 14336), **options)


def _multiply_float8(rows: int, **options: Any) -> None:
    linear.small_product(
        _empty(rows, 14336, dtype=FLOAT8),
        _empty(4096, 14336, dtype=FLOAT8),
        None,
        _empty(4096, 1, dtype=torch.float32),
        row_scale=_empty(rows, 1, dtype=torch.float32),
        dtype=torch.bfloat16,
        **options,
    )


def _shared() -> tuple[PeerBuffers, Tensor, Tensor, float]:
    places = _empty(8, dtype=torch.int64)
    peers = PeerBuffers(0, _empty(64, 8192), places, places)
    return peers, _empty(64, 8192), _empty(8192), 1e-5


def _all_reduce(run: Callable[..., Any] = all_reduce.all_reduce_add_rms_norm) -> None:
    run(*_shared())


def _int4(rows: int, inputs: int = 4096) -> None:
    int4.GpuInt4Linear(_empty(4096, inputs), None)(_empty(rows, inputs))


CASES = {
    "product of 1 row, int4": Case(lambda: _int4(1), 2),
    "product of 64 rows, int4": Case(lambda: _int4(64), 2),
    "product of 65 rows, int4": Case(lambda: _int4(65), 1),
    "product of 1 row, int4, 1792 inputs": Case(lambda: _int4(1, 1792), 2),
    "quantise": Case(lambda: activation.quantize_rows(_empty(8, 4096)), 2),
    "all-reduce, add and rms norm, 8192": Case(_all_reduce, 10),
    "all-reduce, add, rms norm and quantise, 8192": Case(
        lambda: _all_reduce(all_reduce.all_reduce_add_rms_norm_quantize), 10
    ),
    "product of 1 row": Case(lambda: _multiply(1), 6),
    "product of 1 row, programmatic": Case(lambda: _multiply(1, programmatic=True), 6),
    "product of 2 rows": Case(lambda: _multiply(2), 4),
    "product of 4 rows": Case(lambda: _multiply(4), 4),
    "product of 1 row, float8": Case(lambda: _multiply_float8(1), 4),
    "product of 4 rows, float8": Case(lambda: _multiply_float8(4), 3),
    "product of 16 rows, float8": Case(lambda: _multiply_float8(16), 2),
    "product of 16 rows": Case(lambda: _multiply(16), 2),
    "sampling, 128256": Case(lambda: _sample(128256), 1),
    "sums above thresholds, 128256": Case(lambda: _tail_sums(128256), 2),
    "rms norm, 4096": Case(lambda: norm.rms_norm(_empty(8, 4096), _empty(4096), 1e-5), 2),
    "rms norm of heads": Case(
        lambda: norm.rms_norm(
            _empty(8, 48 * 128)[:, : 32 * 128].view(8, 32, 128), _empty(128), 1e-6
        ),
        2,
    ),
    "add and rms norm, 8192": Case(
        lambda: norm.rms_norm(_empty(8, 8192), _empty(8192), 1e-5, residual=_empty(8, 8192)), 3
    ),
    "add and rms norm, 5120, padded": Case(
        lambda: norm.rms_norm(_empty(8, 5120), _empty(5120), 1e-5, 1.0, residual=_empty(8, 5120)), 3
    ),
    "add, rms norm and quantise, 4096": Case(
        lambda: norm.rms_norm_quantize(
            _empty(8, 4096), _empty(4096), 1e-5, residual=_empty(8, 4096)
        ),
        3,
    ),
    "layer norm, 4096": Case(
        lambda: norm.layer_norm(_empty(8, 4096), _empty(4096), _empty(4096), 1e-5), 3
    ),
    "silu and up": Case(lambda: activation.activate(_empty(8, 28672), "silu", gated=True), 2),
    "gelu": Case(lambda: activation.activate(_empty(8, 16384), "gelu"), 1),
    "silu, up and quantise": Case(lambda: activation.gated_quantize(_empty(8, 28672), "silu"), 4),
    "rope": Case(lambda: rope.rope(_empty(8, 32, 128), _empty(8, 64), _empty(8, 64)), 2),
    "rope and store, 32/8 heads of 128": Case(lambda: _rope_store(32, 8, 128, 64), 4),
    "rope and store in float8": Case(lambda: _rope_store(32, 8, 128, 64, dtype=FLOAT8), 4),
    "rope and store with norms": Case(lambda: _rope_store(16, 8, 128, 64, norms=True), 4),
    "rope and store, half of 80": Case(lambda: _rope_store(32, 32, 80, 16), 4),
    "attention of single queries, 32/8 heads of 128": Case(lambda: _attend(32, 8, 128), 4),
    "attention of single queries, 9/3 heads of 64": Case(lambda: _attend(9, 3, 64), 4),
    "attention of single queries, 8/4 heads of 256": Case(
        lambda: _attend(8, 4, 256, window=4096, softcap=50.0), 4
    ),
    "attention of single queries, 32/32 heads of 80": Case(
        lambda: _attend(32, 32, 80, alibi_slopes=_empty(32, dtype=torch.float32)), 4
    ),
    "attention of prompts, 32/8 heads of 128": Case(lambda: _attend(32, 8, 128, queries=512), 4),
    "attention of single queries, 32/8 heads of 128 in float8": Case(
        lambda: _attend(32, 8, 128, dtype=FLOAT8), 4
    ),
    "attention of prompts, 32/8 heads of 128 in float8": Case(
        lambda: _attend(32, 8, 128, queries=512, dtype=FLOAT8), 4
    ),
    "attention of prompts, 64/8 heads of 64": Case(
        lambda: _attend(64, 8, 64, queries=512, window=128, sinks=_empty(64, dtype=torch.float32)),
        4,
    ),
    "attention of prompts, 8/4 heads of 256": Case(
        lambda: _attend(8, 4, 256, queries=512, window=4096, softcap=50.0), 4
    ),
    "attention of prompts, 32/32 heads of 96": Case(lambda: _attend(32, 32, 96, queries=512), 4),
    "store": Case(
        lambda: rope.store_kv(
            _empty(8, 8, 128),
            _empty(8, 8, 128),
            _empty(8, 1000, 16, 128),
            _empty(8, 1000, 16, 128),
            _slots(8),
        ),
        2,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_kernels_keep_to_registers_and_load_16_bytes(
    name: str, recorded: Callable[[], Any], compiled: Callable[[Any], Any]
) -> None:
    with recorded() as launches:
        CASES[name].run()
    made = [compiled(launch) for launch in launches]
    assert made
    assert [kernel.spills for kernel in made] == [0] * len(made)
    assert all(kernel.shared <= SHARED_MEMORY for kernel in made)
    wide = sum(kernel.wide_loads() for kernel in made)
    assert wide >= CASES[name].wide_loads, wide


def test_a_programmatic_product_loads_weights_before_it_waits(
    recorded: Callable[[], Any], compiled: Callable[[Any], Any]
) -> None:
    with recorded() as launches:
        _multiply(1, programmatic=True)
    before, waited, after = compiled(launches[0]).ptx.partition("griddepcontrol.wait")
    assert waited
    assert ".v4.b32" in before
    assert "st.global" not in before and "st.global" in after


@pytest.mark.parametrize(
    "run",
    [
        lambda: norm.rms_norm(_empty(8, 4096), _empty(4096), 1e-5, ahead=True),
        lambda: activation.activate(_empty(8, 28672), "silu", gated=True, ahead=True),
        lambda: activation.gated_quantize(_empty(8, 28672), "silu", ahead=True),
        lambda: _attend(32, 8, 128, ahead=True),
        lambda: all_reduce.all_reduce_add_rms_norm(*_shared(), ahead=True),
    ],
)
def test_what_a_product_waits_for_lets_it_begin(
    run: Callable[[], Any], recorded: Callable[[], Any], compiled: Callable[[Any], Any]
) -> None:
    """The last kernel before a product, and before it writes anything."""
    with recorded() as launches:
        run()
    made = compiled(launches[-1])
    before, said, after = made.ptx.partition("griddepcontrol.launch_dependents")
    assert said and made.spills == 0
    assert "st.global" not in before and "st.global" in after


def test_a_barrier_is_visible_to_all_devices(
    recorded: Callable[[], Any], compiled: Callable[[Any], Any]
) -> None:
    with recorded() as launches:
        _all_reduce()
    ptx = compiled(launches[0]).ptx
    assert "atom.global.release.sys.cas" in ptx
    assert "atom.global.acquire.sys.cas" in ptx


@pytest.mark.parametrize(("dim", "tokens"), [(64, 128), (128, 64), (256, 32)])
def test_single_queries_keep_two_tiles_in_flight(
    dim: int, tokens: int, recorded: Callable[[], Any], compiled: Callable[[Any], Any]
) -> None:
    with recorded() as launches:
        _attend(32, 8, dim)
    made = compiled(launches[0])
    assert made.shared >= 2 * 2 * tokens * dim * 2  # tiles, keys and values, bytes
    assert made.shared <= SHARED_MEMORY // 3
    assert re.search(r"cp\.async\.cg\S* .*0x10", made.ptx)


@pytest.mark.parametrize("run", [lambda: _attend(32, 8, 128, queries=512), lambda: _multiply(16)])
def test_matrix_work_is_done_by_warpgroups(
    run: Callable[[], Any], recorded: Callable[[], Any], compiled: Callable[[Any], Any]
) -> None:
    with recorded() as launches:
        run()
    assert "wgmma.mma_async" in compiled(launches[0]).ptx
