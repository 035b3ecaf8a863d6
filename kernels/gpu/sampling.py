"""The next token of each row inside a graph: the best of greedy or Gumbel-noised logits.

Shapes: logits [n, m] of one rank's slice of the vocabulary -> float64 [n, 4] = (id, value, raw
logit, broken). Bytes moved: the logits once. A program takes `CHUNK` logits of a row, 8 a thread:
one 16-byte load of bfloat16, and enough programs for one row to fill the device. A second, small
kernel takes the best of a row's chunks; ties go to the lowest id at every stage, so the result is
the same however the vocabulary is cut.

Filters are thresholds (`tail_sums`), found by reading the logits some times more.

The noise is a pure function of (seed, sample, position, token id): SplitMix64 (Steele, Lea and
Flood, OOPSLA 2014), 52 bits, the same bits as on the CPU. The two logarithms are in float64, so
that devices and ranks agree but for their last place.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch, next_power_of_2

CHUNK, WARPS = 1024, 4
WINNER = 4  # (id, value, raw, broken)
TAILS = 16
NO_TOKEN = float(1 << 52)
"""The id of an empty slice: it loses every tie."""
WORD = 1 << 64
GAMMA = tl.constexpr(0x9E3779B97F4A7C15)
FIRST = tl.constexpr(0xBF58476D1CE4E5B9)
SECOND = tl.constexpr(0x94D049BB133111EB)


@triton.jit
def _mixed(value):
    """SplitMix64's finaliser of uint64."""
    value = (value ^ (value >> 30)) * FIRST
    value = (value ^ (value >> 27)) * SECOND
    return value ^ (value >> 31)


@triton.jit
def _noise(stem, position, token_ids):
    """Standard Gumbel noise of token ids, float64."""
    key = _mixed(stem + (position + 1).to(tl.uint64) * GAMMA)
    bits = _mixed((token_ids + 1).to(tl.uint64) * GAMMA + key) >> 12
    # the middles of 2**52 equal cells of (0, 1); 1 - uniform is exact
    uniform = (bits.to(tl.int64).to(tl.float64) + 0.5) * 2.220446049250313e-16
    return -tl.log(-tl.log(1.0 - uniform))


@triton.jit
def _best(values, token_ids, raw, broken, out_ptr):
    """Write the winner of a tile, its first where several are equal."""
    top = tl.max(values, 0)
    winner = tl.min(tl.where(values == top, token_ids, 4503599627370496), 0)
    tl.store(out_ptr, winner.to(tl.float64))
    tl.store(out_ptr + 1, top)
    tl.store(out_ptr + 2, tl.max(tl.where(token_ids == winner, raw, float("-inf")), 0))
    tl.store(out_ptr + 3, tl.max(broken, 0))


@triton.jit
def _sample(
    logits_ptr, temperatures_ptr, stems_ptr, positions_ptr, out_ptr, row_stride, width, first_id,
    chunks, CHUNK: tl.constexpr,
):  # fmt: skip
    """One program: a chunk of a row's logits."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = column < width
    raw = tl.load(logits_ptr + row * row_stride + column, inside, 0.0).to(tl.float32)
    finite = tl.abs(raw) < float("inf")
    broken = tl.where(finite, 0.0, 1.0).to(tl.float64)
    raw = tl.where(finite & inside, raw, float("-inf")).to(tl.float64)
    token_ids = (column + first_id).to(tl.int64)
    temperature = tl.load(temperatures_ptr + row)
    values = raw
    if temperature > 0.0:
        stem = tl.load(stems_ptr + row).to(tl.uint64, bitcast=True)
        values += temperature * _noise(stem, tl.load(positions_ptr + row), token_ids)
    _best(values, token_ids, raw, broken, out_ptr + (row * chunks + chunk) * 4)


@triton.jit
def _merge(
    parts_ptr, out_ptr, tokens_ptr, row_stride, part_stride, parts, BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
):  # fmt: skip
    """One program: the winner of a row's parts, chunks or ranks."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, BLOCK)
    inside = part < parts
    at = parts_ptr + row * row_stride + part * part_stride
    token_ids = tl.load(at, inside, 4503599627370496.0).to(tl.int64)
    values = tl.load(at + 1, inside, float("-inf"))
    raw = tl.load(at + 2, inside, float("-inf"))
    broken = tl.load(at + 3, inside, 0.0)
    _best(values, token_ids, raw, broken, out_ptr + row * 4)
    if TOKENS:
        top = tl.max(values, 0)
        winner = tl.min(tl.where(values == top, token_ids, 4503599627370496), 0)
        tl.store(tokens_ptr + row, winner)


@triton.jit
def _tails(
    logits_ptr, tops_ptr, warmth_ptr, lowest_ptr, out_ptr, row_stride, width, step, chunks,
    CHUNK: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """One program: a chunk of a row's logits, summed above 16 thresholds."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = column < width
    logit = tl.load(logits_ptr + row * row_stride + column, inside, 0.0)
    bits = (logit + 0.0).to(tl.int32, bitcast=True)
    key = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) + 2147483648
    weight = tl.full([CHUNK], 1.0, tl.float64)
    if WEIGHTED:
        distance = logit.to(tl.float64) - tl.load(tops_ptr + row)
        weight = tl.exp(distance / tl.load(warmth_ptr + row))
    weight = tl.where(inside, weight, 0.0)
    threshold = tl.load(lowest_ptr + row)
    apart = tl.full([1], step, tl.int64)
    out = out_ptr + (row * chunks + chunk) * 16
    for digit in tl.static_range(16):
        above = key >= threshold + digit * apart
        tl.store(out + digit, tl.sum(tl.where(above, weight, 0.0), 0))


def _mix(value: int) -> int:
    value = (value ^ value >> 30) * FIRST.value % WORD
    value = (value ^ value >> 27) * SECOND.value % WORD
    return value ^ value >> 31


def stem(seed: int, sample_index: int) -> int:
    """Of a sequence's random streams, as int64: what `sample` mixes with the position."""
    key = _mix((seed + GAMMA.value) % WORD)
    key = _mix((key + (sample_index + 1) * GAMMA.value) % WORD)
    return key - WORD if key >= WORD >> 1 else key


def sample(
    logits: Tensor, temperatures: Tensor, stems: Tensor, positions: Tensor, first_id: int
) -> Tensor:
    """The best token of logits [n, m] from `first_id` on, for each row: float64 [n, 4].

    temperatures float64 [n], 0 = greedy; stems, positions int64 [n].
    """
    if logits.stride(-1) != 1:
        logits = logits.contiguous()
    rows, width = logits.shape
    if not width:
        shape, place = (rows, WINNER), logits.device
        none = torch.full(shape, -torch.inf, dtype=torch.float64, device=place)
        none[:, 0].fill_(NO_TOKEN)
        none[:, 3].fill_(0.0)
        return none
    chunks = -(-width // CHUNK)
    parts = torch.empty(rows, chunks, WINNER, dtype=torch.float64, device=logits.device)
    if rows:
        launch(_sample, rows, chunks)(
            logits,
            temperatures,
            stems,
            positions,
            parts,
            logits.stride(0),
            width,
            first_id,
            chunks,
            CHUNK=CHUNK,
            num_warps=WARPS,
        )
    return merge(parts.transpose(0, 1))


def merge(parts: Tensor, tokens: Tensor | None = None) -> Tensor:
    """Winners over the first dimension of float64 [parts, n, 4] -> [n, 4].

    tokens int64 [n], if given, takes their ids.
    """
    count, rows, _ = parts.shape
    if parts.stride(2) != 1:
        parts = parts.contiguous()
    out = torch.empty(rows, WINNER, dtype=torch.float64, device=parts.device)
    if rows:
        launch(_merge, rows)(
            parts,
            out,
            tokens,
            parts.stride(1),
            parts.stride(0),
            count,
            BLOCK=next_power_of_2(count),
            TOKENS=tokens is not None,
            num_warps=1,
        )
    return out


def tail_sums(
    logits: Tensor, tops: Tensor, warmth: Tensor, lowest: Tensor, step: int, *, weighted: bool
) -> Tensor:
    """Number or weight of each row's logits above 16 thresholds: float64 [n, 16].

    logits float32 [n, m], m > 0; tops, warmth float64 [n]; lowest int64 [n].
    """
    if logits.stride(-1) != 1:
        logits = logits.contiguous()
    rows, width = logits.shape
    chunks = -(-width // CHUNK)
    parts = torch.empty(rows, chunks, TAILS, dtype=torch.float64, device=logits.device)
    if rows:
        launch(_tails, rows, chunks)(
            logits,
            tops,
            warmth,
            lowest,
            parts,
            logits.stride(0),
            width,
            step,
            chunks,
            CHUNK=CHUNK,
            WEIGHTED=weighted,
            num_warps=WARPS,
        )
    return parts.sum(1)
