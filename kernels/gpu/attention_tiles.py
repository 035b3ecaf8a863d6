"""Tiles of the attention kernels, and their launches.

Rows and tokens of a tile, warps and stages are fixed for each head dimension and element size:
nothing is tuned at run time, where a captured graph could not follow.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from phalanx.kernels.interface import AttentionSpec

from .attention import attend_prompts, attend_singles, merge_splits
from .flash import FlashAttention
from .launch import launch, next_power_of_2
from .plan import GpuPlan

PROGRAMS = 4096
"""Programs that share the splits: enough to even out lengths, few enough to start quickly."""
MERGED = 8  # splits that the merge reads at once


class Tile(NamedTuple):
    """Query rows and tokens of a tile, warps of a program, stages of its loop.

    Keys wait for the ids of their blocks, so that two stages make one more tile in flight.
    """

    rows: int
    tokens: int
    warps: int
    stages: int


PROMPT_TILES = {
    # 64 rows a warpgroup, as wgmma takes them; sums of 64 x 128 float32 are half its registers
    (2, 64): Tile(128, 64, 8, 3),
    (2, 128): Tile(128, 64, 8, 3),
    (2, 256): Tile(128, 32, 8, 2),
    # float32 is for checks: products without tensor cores, so tiles that fit the registers
    (4, 64): Tile(32, 32, 4, 2),
    (4, 128): Tile(16, 32, 4, 2),
    (4, 256): Tile(16, 16, 4, 1),
}
"""By (bytes of a query element, head dimension padded to a power of two)."""
SINGLE_TILES = {
    # few rows, so all is in the tiles: two of keys and two of values are 64 KB, and three
    # programs on a multiprocessor keep 192 KB of reads on their way
    (2, 64): Tile(16, 128, 4, 5),
    (2, 128): Tile(16, 64, 4, 5),
    (2, 256): Tile(16, 32, 4, 5),
    (4, 64): Tile(16, 32, 4, 2),
    (4, 128): Tile(16, 32, 4, 2),
    (4, 256): Tile(16, 16, 4, 2),
}


def _tile(tiles: dict[tuple[int, int], Tile], query: Tensor, group: int) -> Tile:
    padded = max(next_power_of_2(query.shape[-1]), 64)
    tile = tiles.get((query.element_size(), padded))
    if tile is None:
        raise ValueError(
            f"attention: heads of {query.shape[-1]} elements of {query.dtype}; "
            "there are kernels for up to 256 elements of 2 or 4 bytes"
        )
    return tile._replace(rows=max(tile.rows, next_power_of_2(group)))


def split_of(kv_heads: int) -> tuple[int, int]:
    """(least tokens of a split, most splits of a sequence) for a rank's key/value heads.

    Few heads need more splits to fill the device. A split of 128 tokens adds 3 % to the bytes
    of a group of 4 heads of 128.
    """
    return (256 if kv_heads >= 8 else 128), min(max(256 // kv_heads, 32), 128)


def paged_attention(
    query: Tensor,
    key_pool: Tensor,
    value_pool: Tensor,
    plan: GpuPlan,
    spec: AttentionSpec,
    flash: FlashAttention | None = None,
    *,
    ahead: bool = False,
) -> Tensor:
    """Causal attention of query [T, H, D] to the tokens in the pools -> [T, H, D].

    Prompts are handed to `flash` where it takes them. ahead: as for `rms_norm`.
    """
    if query.stride(-1) != 1:
        query = query.contiguous()
    if query.numel() == 0 or key_pool.shape[0] == 0:
        return torch.empty(query.shape, dtype=query.dtype, device=query.device)
    flashed = plan.has_prefills and flash is not None and flash.takes(query, key_pool, spec)
    if flash is not None and flashed:
        out = flash.prompts(query, key_pool, value_pool, plan, spec)
    else:
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    scores = {
        "WINDOW": bool(spec.window),
        "SOFTCAP": bool(spec.softcap),
        "ALIBI": spec.alibi_slopes is not None,
    }
    if plan.has_prefills and not flashed:
        _prompts(query, key_pool, value_pool, out, plan, spec, scores)
    if plan.has_decodes:
        _singles(query, key_pool, value_pool, out, plan, spec, scores, ahead)
    return out


def _prompts(
    query: Tensor,
    key_pool: Tensor,
    value_pool: Tensor,
    out: Tensor,
    plan: GpuPlan,
    spec: AttentionSpec,
    scores: dict[str, bool],
) -> None:
    (tokens, heads, dim), (kv_heads, _, page, _) = query.shape, key_pool.shape
    group = heads // kv_heads
    tile = _tile(PROMPT_TILES, query, group)
    sequences = len(plan.lengths)
    programs = tokens // (tile.rows // group) + sequences
    launch(attend_prompts, programs, kv_heads)(
        query,
        key_pool,
        value_pool,
        out,
        plan.tables,
        plan.lengths,
        plan.starts,
        spec.alibi_slopes,
        spec.sinks,
        sequences,
        query.stride(0),
        query.stride(1),
        plan.tables.stride(0),
        key_pool.stride(0),
        float(spec.scale),
        float(spec.softcap),
        spec.window,
        HEADS=heads,
        GROUP=group,
        D=dim,
        BLOCK_D=max(next_power_of_2(dim), 16),
        ROWS=tile.rows,
        TILE=tile.tokens,
        PAGE=page,
        SINKS=spec.sinks is not None,
        SINGLES=plan.has_decodes,
        STAGES=tile.stages,
        **scores,
        num_warps=tile.warps,
    )


def _singles(
    query: Tensor,
    key_pool: Tensor,
    value_pool: Tensor,
    out: Tensor,
    plan: GpuPlan,
    spec: AttentionSpec,
    scores: dict[str, bool],
    ahead: bool,
) -> None:
    (_, heads, dim), (kv_heads, _, page, _) = query.shape, key_pool.shape
    tile = _tile(SINGLE_TILES, query, heads // kv_heads)
    split, splits = split_of(kv_heads)
    # sizes by the longest length possible: known without asking the device
    visible = min(plan.max_length, spec.window + split) if spec.window else plan.max_length
    used = max(min(-(-visible // split), splits), 1)
    sequences = len(plan.lengths)
    mixed = torch.empty(sequences, heads, used, dim, dtype=torch.float32, device=query.device)
    sums = torch.empty(sequences, heads, used, 2, dtype=torch.float32, device=query.device)
    sizes = {"HEADS": heads, "D": dim, "BLOCK_D": max(next_power_of_2(dim), 16)}
    sizes |= {"SPLIT": split, "SPLITS": splits}
    programs = min(used, -(-PROGRAMS // (sequences * kv_heads)))
    launch(attend_singles, sequences, kv_heads, programs)(
        query,
        key_pool,
        value_pool,
        mixed,
        sums,
        plan.tables,
        plan.lengths,
        plan.starts,
        spec.alibi_slopes,
        used,
        query.stride(0),
        query.stride(1),
        plan.tables.stride(0),
        key_pool.stride(0),
        float(spec.scale),
        float(spec.softcap),
        spec.window,
        GROUP=heads // kv_heads,
        ROWS=tile.rows,
        TILE=tile.tokens,
        PAGE=page,
        STAGES=tile.stages,
        **sizes,
        **scores,
        num_warps=tile.warps,
    )
    _merge(mixed, sums, out, plan, spec, sizes, ahead)


def _merge(
    mixed: Tensor,
    sums: Tensor,
    out: Tensor,
    plan: GpuPlan,
    spec: AttentionSpec,
    sizes: dict[str, int],
    ahead: bool,
) -> None:
    sequences, heads, used, _ = mixed.shape
    launch(merge_splits, sequences, heads)(
        mixed,
        sums,
        out,
        plan.lengths,
        plan.starts,
        spec.sinks,
        used,
        spec.window,
        BLOCK_S=MERGED,
        WINDOW=bool(spec.window),
        SINKS=spec.sinks is not None,
        AHEAD=ahead,
        **sizes,
        num_warps=2,
    )
