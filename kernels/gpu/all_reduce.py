"""Sum over the ranks of a node, residual sum and RMS norm in one kernel.

Shapes: a buffer [rows, n] on every rank, mapped into every other's address space (symmetric
memory); residual [rows, n]. Bytes moved: every rank reads all buffers once over NVLink, `size` * n
elements a row, and reads and writes the residual; three kernels and two trips through memory
become one. That pays for the small messages of decoding; long prompts are better served by a sum
in two steps.

Every rank adds in rank order, in float32, so the results are bit-equal. A program holds whole
rows in registers, as the norm needs them. Programs of equal number on all ranks wait for each
other before they read; nobody waits at the end, as buffers are used in turn.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from phalanx.kernels.float8 import FLOAT8, Float8Rows
from phalanx.kernels.fused import PeerBuffers

from .conversion import float8_levels, float8_scale, float8_size, rounded
from .launch import launch
from .norm import shape

PROGRAMS = 64
"""At most: a barrier needs `size` signals for each, and all programs must run at once."""


@triton.jit
def _meet(signals_ptr, rank, RANKS: tl.constexpr):
    """Wait until the programs of this number have come here on all ranks.

    Each leaves a one in every peer's pad and takes away the one that each peer left in its own;
    release and acquire make what was written before visible after.
    """
    own = tl.load(signals_ptr + rank).to(tl.pointer_type(tl.uint32))
    place = tl.program_id(0) * RANKS
    for peer in range(RANKS):
        pad = tl.load(signals_ptr + peer).to(tl.pointer_type(tl.uint32))
        while tl.atomic_cas(pad + place + rank, 0, 1, sem="release", scope="sys") != 0:
            pass
    for peer in range(RANKS):
        while tl.atomic_cas(own + place + peer, 1, 0, sem="acquire", scope="sys") != 1:
            pass
    tl.debug_barrier()


@triton.jit
def _all_reduce_norm(
    local_ptr, addresses_ptr, signals_ptr, residual_ptr, weight_ptr, out_ptr, scale_ptr, rank, rows,
    stride, eps, offset,
    N: tl.constexpr, BLOCK: tl.constexpr, RANKS: tl.constexpr, BARRIER: tl.constexpr,
    OFFSET: tl.constexpr, QUANTIZE: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """One program: every PROGRAMS-th row. `local_ptr` is there for its type."""
    if BARRIER:
        _meet(signals_ptr, rank, RANKS)
    if AHEAD:
        tl.extra.cuda.gdc_launch_dependents()
    dtype: tl.constexpr = local_ptr.dtype.element_ty
    column = tl.arange(0, BLOCK)
    inside = column < N
    weight = tl.load(weight_ptr + column, inside, 0.0).to(tl.float32)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        total = tl.zeros([BLOCK], tl.float32)
        for peer in tl.static_range(RANKS):
            buffer = tl.load(addresses_ptr + peer).to(tl.pointer_type(dtype))
            buffer = tl.multiple_of(buffer, 16)
            total += tl.load(buffer + row * stride + column, inside, 0.0).to(tl.float32)
        # rounded between the sums, as separate kernels would
        total = rounded(total, dtype).to(tl.float32)
        total += tl.load(residual_ptr + row * N + column, inside, 0.0).to(tl.float32)
        total = rounded(total, dtype)
        tl.store(residual_ptr + row * N + column, total, inside)
        wide = total.to(tl.float32)
        wide *= tl.rsqrt(tl.sum(wide * wide, 0) / N + eps)
        if OFFSET:
            normed = wide * (offset + weight)
        else:
            normed = rounded(wide, dtype).to(tl.float32) * weight
        normed = rounded(normed, dtype)
        if QUANTIZE:
            normed = normed.to(tl.float32)
            scale = float8_scale(tl.max(float8_size(normed), 0))
            tl.store(scale_ptr + row, scale)
            normed = float8_levels(normed, scale)
        tl.store(out_ptr + row * N + column, normed, inside)


def all_reduce_add_rms_norm(
    peers: PeerBuffers,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    offset: float = 0.0,
    *,
    ahead: bool = False,
) -> Tensor:
    """Norm of residual [rows, n] + the sum of all ranks' first rows, in rank order.

    The sum is written into residual. A buffer may be written again once a later call on another
    buffer has begun: two in turn are enough. ahead: as for `rms_norm`.
    """
    out = torch.empty_like(residual)
    _launch(peers, residual, weight, eps, offset, out, None, ahead)
    return out


def all_reduce_add_rms_norm_quantize(
    peers: PeerBuffers,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    offset: float = 0.0,
    *,
    ahead: bool = False,
) -> Float8Rows:
    """As `all_reduce_add_rms_norm`, rounded to float8."""
    out = torch.empty(residual.shape, dtype=FLOAT8, device=residual.device)
    scale = torch.empty(len(residual), 1, dtype=torch.float32, device=residual.device)
    _launch(peers, residual, weight, eps, offset, out, scale, ahead)
    return Float8Rows(out, scale, residual.dtype)


def _launch(
    peers: PeerBuffers,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    offset: float,
    out: Tensor,
    scale: Tensor | None,
    ahead: bool,
) -> None:
    rows, n = residual.shape
    if not rows or not n:
        return
    block, _, warps = shape(n)
    launch(_all_reduce_norm, min(rows, PROGRAMS))(
        peers.local,
        peers.addresses,
        peers.signals,
        residual,
        weight,
        out,
        scale,
        peers.rank,
        rows,
        peers.local.stride(0),
        eps,
        offset,
        N=n,
        BLOCK=block,
        RANKS=len(peers.addresses),
        BARRIER=peers.signals is not None,
        OFFSET=bool(offset),
        QUANTIZE=scale is not None,
        AHEAD=ahead,
        num_warps=warps,
    )
