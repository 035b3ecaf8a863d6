"""Rotary positions, alone or with the norm of heads and the write to the pools in one kernel.

Shapes: heads [T, n, D], cos and sin [T, rotary / 2], pools [K, blocks, block size, D].
Bytes moved: one read and one write of every head; the angles of a token are read once for
`HEADS` heads. A program takes HEADS heads of one token, with as many warps as give each thread
8 elements of a half, which is one 16-byte load; a batch of one still has as many programs as
there are groups of 8 heads.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .conversion import rounded, stored
from .launch import launch, next_power_of_2

HEADS = 8


@triton.jit
def _normed(
    first,
    second,
    rest,
    weight_ptr,
    head,
    eps,
    offset,
    weight_rows,
    D: tl.constexpr,
    HALF: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
    OFFSET: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """RMS norm of heads [HEADS, D] in three parts, float32 in and out, rounded as in `norm`."""
    total = tl.sum(first * first, 1, keep_dims=True) + tl.sum(second * second, 1, keep_dims=True)
    total += tl.sum(rest * rest, 1, keep_dims=True)
    scale = tl.rsqrt(total / D + eps)
    half, tail = tl.arange(0, HALF_BLOCK)[None, :], tl.arange(0, REST_BLOCK)[None, :]
    at = weight_ptr + head % weight_rows * D
    low = tl.load(at + half, half < HALF, 0.0).to(tl.float32)
    high = tl.load(at + HALF + half, half < HALF, 0.0).to(tl.float32)
    last = tl.load(at + 2 * HALF + tail, tail < D - 2 * HALF, 0.0).to(tl.float32)
    if OFFSET:
        low, high, last = low + offset, high + offset, last + offset
        first, second, rest = first * scale * low, second * scale * high, rest * scale * last
    else:
        first = rounded(first * scale, DTYPE).to(tl.float32) * low
        second = rounded(second * scale, DTYPE).to(tl.float32) * high
        rest = rounded(rest * scale, DTYPE).to(tl.float32) * last
    return (
        rounded(first, DTYPE).to(tl.float32),
        rounded(second, DTYPE).to(tl.float32),
        rounded(rest, DTYPE).to(tl.float32),
    )


@triton.jit
def _turn(
    in_ptr,
    out_ptr,
    out_offset,
    cos_ptr,
    sin_ptr,
    weight_ptr,
    token,
    head,
    inside,
    in_offset,
    eps,
    offset,
    weight_rows,
    D: tl.constexpr,
    HALF: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
    NORM: tl.constexpr,
    OFFSET: tl.constexpr,
):
    """Norm and rotate heads [HEADS, 1] of a token: from in_offset to out_offset, both [HEADS, 1].

    A head is read as two halves of the rotated part and what follows it.
    """
    half, tail = tl.arange(0, HALF_BLOCK)[None, :], tl.arange(0, REST_BLOCK)[None, :]
    turned, left = inside & (half < HALF), inside & (tail < D - 2 * HALF)
    source = in_ptr + in_offset
    dtype: tl.constexpr = in_ptr.dtype.element_ty
    first = tl.load(source + half, turned, 0.0).to(tl.float32)
    second = tl.load(source + HALF + half, turned, 0.0).to(tl.float32)
    rest = tl.load(source + 2 * HALF + tail, left, 0.0).to(tl.float32)
    if NORM:
        first, second, rest = _normed(
            first,
            second,
            rest,
            weight_ptr,
            head,
            eps,
            offset,
            weight_rows,
            D,
            HALF,
            HALF_BLOCK,
            REST_BLOCK,
            OFFSET,
            dtype,
        )
    cos = tl.load(cos_ptr + token * HALF + half, half < HALF, 0.0).to(tl.float32)
    sin = tl.load(sin_ptr + token * HALF + half, half < HALF, 0.0).to(tl.float32)
    target = out_ptr + out_offset
    out: tl.constexpr = out_ptr.dtype.element_ty
    # rounded to the heads' type first, then to the pool's
    tl.store(target + half, stored(rounded(first * cos - second * sin, dtype), out), turned)
    tl.store(target + HALF + half, stored(rounded(second * cos + first * sin, dtype), out), turned)
    tl.store(target + 2 * HALF + tail, stored(rounded(rest, dtype), out), left)


@triton.jit
def _rope(
    heads_ptr,
    out_ptr,
    cos_ptr,
    sin_ptr,
    heads,
    token_stride,
    head_stride,
    D: tl.constexpr,
    HALF: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
):
    """One program: HEADS heads of a token."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    _turn(
        heads_ptr,
        out_ptr,
        (token * heads + head) * D,
        cos_ptr,
        sin_ptr,
        cos_ptr,
        token,
        head,
        head < heads,
        token * token_stride + head * head_stride,
        0.0,
        0.0,
        1,
        D,
        HALF,
        HALF_BLOCK,
        REST_BLOCK,
        False,
        False,
    )


# fmt: off
@triton.jit
def _rope_store(
    qkv_ptr, query_ptr, key_ptr, value_ptr, cos_ptr, sin_ptr, slots_ptr, query_norm_ptr,
    key_norm_ptr, query_norm_rows, key_norm_rows, eps, offset, token_stride, pool_stride,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr,
    HALF_BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr,
    NORM: tl.constexpr, OFFSET: tl.constexpr,
):
    """One program: HEADS query heads of a token, or HEADS of its keys, or of its values."""
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    query_parts: tl.constexpr = (H + HEADS - 1) // HEADS
    key_parts: tl.constexpr = (K + HEADS - 1) // HEADS
    within = tl.arange(0, HEADS)[:, None]
    row = qkv_ptr + token * token_stride
    if part < query_parts:
        head = part * HEADS + within
        _turn(
            row, query_ptr, (token * H + head) * D, cos_ptr, sin_ptr, query_norm_ptr, token, head,
            head < H, head * D, eps, offset, query_norm_rows, D, HALF, HALF_BLOCK, REST_BLOCK,
            NORM, OFFSET,
        )
    else:
        slot = tl.load(slots_ptr + token)
        head = (part - query_parts) % key_parts * HEADS + within
        inside = (head < K) & (slot >= 0)
        target = head.to(tl.int64) * pool_stride + slot * D
        if part < query_parts + key_parts:
            _turn(
                row, key_ptr, target, cos_ptr, sin_ptr, key_norm_ptr, token, head, inside,
                (H + head) * D, eps, offset, key_norm_rows, D, HALF, HALF_BLOCK, REST_BLOCK, NORM,
                OFFSET,
            )
        else:
            column = tl.arange(0, BLOCK)[None, :]
            filled = inside & (column < D)
            value = tl.load(row + (H + K + head) * D + column, filled, 0.0)
            value = stored(value, value_ptr.dtype.element_ty)
            tl.store(value_ptr + target + column, value, filled)
# fmt: on


@triton.jit
def _store(
    key_ptr,
    value_ptr,
    key_pool_ptr,
    value_pool_ptr,
    slots_ptr,
    key_token,
    key_head,
    value_token,
    value_head,
    pool_stride,
    K: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
):
    """One program: HEADS key and value heads of a token."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    slot = tl.load(slots_ptr + token)
    inside = (head < K) & (slot >= 0) & (column < D)
    target = head.to(tl.int64) * pool_stride + slot * D + column
    key = tl.load(key_ptr + token * key_token + head * key_head + column, inside, 0.0)
    tl.store(key_pool_ptr + target, stored(key, key_pool_ptr.dtype.element_ty), inside)
    value = tl.load(value_ptr + token * value_token + head * value_head + column, inside, 0.0)
    tl.store(value_pool_ptr + target, stored(value, value_pool_ptr.dtype.element_ty), inside)


def _parts(dim: int, half: int) -> dict[str, int]:
    return {
        "D": dim,
        "HALF": half,
        "HALF_BLOCK": next_power_of_2(max(half, 1)),
        "REST_BLOCK": next_power_of_2(max(dim - 2 * half, 1)),
        "HEADS": HEADS,
    }


def _warps(elements: int) -> int:
    return min(max(HEADS * next_power_of_2(max(elements, 1)) // 256, 1), 4)


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def rope(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate heads [T, n, D], in any strides with D innermost -> [T, n, D]."""
    heads = _dense(heads)
    tokens, count, dim = heads.shape
    out = torch.empty(tokens, count, dim, dtype=heads.dtype, device=heads.device)
    if out.numel():
        launch(_rope, tokens, -(-count // HEADS))(
            heads,
            out,
            cos.contiguous(),
            sin.contiguous(),
            count,
            heads.stride(0),
            heads.stride(1),
            **_parts(dim, cos.shape[-1]),
            num_warps=_warps(cos.shape[-1] or dim),
        )
    return out


def store_kv(
    key: Tensor, value: Tensor, key_pool: Tensor, value_pool: Tensor, slots: Tensor
) -> None:
    """Write key, value [T, K, D] to their slots; a negative slot is passed over."""
    key, value = _dense(key), _dense(value)
    tokens, count, dim = key.shape
    if key.numel():
        launch(_store, tokens, -(-count // HEADS))(
            key,
            value,
            key_pool,
            value_pool,
            slots,
            key.stride(0),
            key.stride(1),
            value.stride(0),
            value.stride(1),
            key_pool.stride(0),
            K=count,
            D=dim,
            BLOCK=next_power_of_2(dim),
            HEADS=HEADS,
            num_warps=_warps(dim),
        )


def rope_store_kv(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_pool: Tensor,
    value_pool: Tensor,
    slots: Tensor,
    norms: tuple[Tensor, Tensor, float, float] | None = None,
) -> Tensor:
    """qkv [T, (H + 2 K) * D] -> rotated queries [T, H, D]; keys and values go to the pools.

    norms: (weight of query heads, of key heads, eps, offset), weights [D] or [heads, D].
    """
    qkv = _dense(qkv)
    (tokens, width), (kv_heads, dim) = qkv.shape, (key_pool.shape[0], key_pool.shape[-1])
    heads = width // dim - 2 * kv_heads
    query = torch.empty(tokens, heads, dim, dtype=qkv.dtype, device=qkv.device)
    parts = -(-heads // HEADS) + 2 * -(-kv_heads // HEADS)
    if not tokens or not parts:
        return query
    query_norm, key_norm, eps, offset = norms or (cos, cos, 0.0, 0.0)
    launch(_rope_store, tokens, parts)(
        qkv,
        query,
        key_pool,
        value_pool,
        cos.contiguous(),
        sin.contiguous(),
        slots,
        query_norm.contiguous(),
        key_norm.contiguous(),
        query_norm.numel() // dim or 1,
        key_norm.numel() // dim or 1,
        eps,
        offset,
        qkv.stride(0),
        key_pool.stride(0),
        H=heads,
        K=kv_heads,
        BLOCK=next_power_of_2(dim),
        NORM=norms is not None,
        OFFSET=bool(offset),
        **_parts(dim, cos.shape[-1]),
        num_warps=_warps(cos.shape[-1] or dim),
    )
    return query
