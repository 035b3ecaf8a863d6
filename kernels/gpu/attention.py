"""Attention over the paged pool: one kernel for prompts, one for single queries, and a merge.

Shapes: queries [T, H, D]; pools [K, blocks, block size, D]; H = K * group. Softmax in float32,
base 2, one pass (Milakov & Gimelshein 2018); tiles as in FlashAttention-2 (Dao 2023).

The query heads of one key/value head are packed as rows of a tile, so that each key and value is
read once for all of them: bytes moved are those of the visible keys and values, once for each
query tile. A tile of `tile` tokens spans blocks; each of its rows is one token's D elements, found
by the sequence's table. Tiles start at multiples of their size, and a tile that hides all its keys
from a row leaves the row's sums as they are, so that a row's bits depend neither on its batch nor
on how its prompt was cut.

A single query has too few rows to fill the device: its keys are split (Dao 2023, Flash-Decoding),
and the parts are merged in order. A split's length is a function of the sequence's length alone.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .conversion import product, rounded

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _scores(
    query, keys, position, key_position, end, scale, softcap, window, slopes,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr,
):  # fmt: skip
    """Weighed scores [rows, tile] in units of log 2, -inf where a key is hidden from a row."""
    scores = tl.zeros([query.shape[0], keys.shape[0]], tl.float32)
    scores = product(query, tl.trans(keys), scores) * scale
    if SOFTCAP:
        # tanh(y) = 2 sigmoid(2 y) - 1
        scores = softcap * (2.0 * tl.sigmoid(2.0 * scores / softcap) - 1.0)
    distance = key_position[None, :] - position[:, None]
    if ALIBI:
        scores += slopes[:, None] * distance
    seen = (distance <= 0) & (key_position < end)[None, :]
    if WINDOW:
        seen = seen & (distance > -window)
    return tl.where(seen, scores * LOG2E, float("-inf"))


@triton.jit
def _walk(
    query, key_ptr, value_ptr, table_ptr, position, begin, end, scale, softcap, window, slopes,
    D: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr, PAGE: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Keys [begin, end) for rows of queries: (weighted values, largest score, sum of weights)."""
    rows: tl.constexpr = query.shape[0]
    mixed = tl.zeros([rows, BLOCK_D], tl.float32)
    largest = tl.full([rows], float("-inf"), tl.float32)
    total = tl.zeros([rows], tl.float32)
    column = tl.arange(0, BLOCK_D)[None, :]
    for first in tl.range(begin, end, TILE, num_stages=STAGES):
        key_position = first + tl.arange(0, TILE)
        block = tl.load(table_ptr + key_position // PAGE, key_position < end, 0).to(tl.int64)
        at = ((block * PAGE + key_position % PAGE) * D)[:, None] + column
        inside = (key_position < end)[:, None] & (column < D)
        keys = tl.load(key_ptr + at, inside, 0.0).to(query.dtype)
        scores = _scores(
            query, keys, position, key_position, end, scale, softcap, window, slopes, WINDOW,
            SOFTCAP, ALIBI,
        )  # fmt: skip
        higher = tl.maximum(largest, tl.max(scores, 1))
        # a row that has seen no key yet has no largest score to subtract
        finite = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(scores - finite[:, None])
        faded = tl.exp2(largest - finite)
        total = total * faded + tl.sum(weights, 1)
        values = tl.load(value_ptr + at, inside, 0.0).to(query.dtype)
        mixed = product(rounded(weights, query.dtype), values, mixed * faded[:, None])
        largest = higher
    return mixed, largest, total


@triton.jit
def _finished(mixed, largest, total, sinks, SINKS: tl.constexpr):
    """Weighted values [rows, D] divided by the sum of weights, a sink's included; 0 of no keys."""
    if SINKS:
        highest = tl.maximum(largest, sinks * LOG2E)
        faded = tl.exp2(largest - highest)
        mixed = mixed * faded[:, None]
        total = total * faded + tl.exp2(sinks * LOG2E - highest)
    return mixed / tl.where(total == 0.0, 1.0, total)[:, None]


@triton.jit
def _of_heads(pointer, head, inside, GIVEN: tl.constexpr):
    """A float32 of each head, or zeros."""
    if GIVEN:
        return tl.load(pointer + head, inside, 0.0)
    else:
        return tl.zeros(head.shape, tl.float32)


@triton.jit
def _first_seen(position, window, TILE: tl.constexpr, WINDOW: tl.constexpr):
    """Start of the first tile with a key that a query at `position` sees."""
    first = 0
    if WINDOW:
        first = tl.maximum(position - window + 1, 0) // TILE * TILE
    return first


@triton.jit
def attend_prompts(
    query_ptr, key_ptr, value_ptr, out_ptr, tables_ptr, lengths_ptr, starts_ptr, slopes_ptr,
    sinks_ptr, sequences, query_token, query_head, table_stride, pool_stride, scale, softcap,
    window,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, SINKS: tl.constexpr, SINGLES: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One program: ROWS // GROUP queries of a sequence, for one key/value head.

    Sequence i has its programs from starts[i] // queries + i on: a bound that needs no list of
    programs, so that the grid follows from the number of tokens. SINGLES = leave sequences of
    one query to `attend_singles`.
    """
    queries: tl.constexpr = ROWS // GROUP
    program, kv_head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    sequence, above = 0, sequences
    while above - sequence > 1:
        middle = (sequence + above) // 2
        if tl.load(starts_ptr + middle) // queries + middle <= program:
            sequence = middle
        else:
            above = middle
    start, stop = tl.load(starts_ptr + sequence), tl.load(starts_ptr + sequence + 1)
    first = (program - start // queries - sequence) * queries
    count, length = stop - start, tl.load(lengths_ptr + sequence).to(tl.int32)
    if first >= count:
        return
    if SINGLES and count == 1:
        return
    row = tl.arange(0, ROWS)
    head = (kv_head * GROUP + row % GROUP).to(tl.int32)
    index = first + row // GROUP
    inside = (index < count) & (row < queries * GROUP)
    token = (start + index).to(tl.int64)
    column = tl.arange(0, BLOCK_D)[None, :]
    filled = inside[:, None] & (column < D)
    at = token * query_token + head * query_head
    query = tl.load(query_ptr + at[:, None] + column, filled, 0.0)
    before = length - count
    begin = _first_seen(before + first, window, TILE, WINDOW)
    end = tl.minimum(before + first + queries, length)
    mixed, largest, total = _walk(
        query, key_ptr + kv_head * pool_stride, value_ptr + kv_head * pool_stride,
        tables_ptr + sequence * table_stride, before + index, begin, end, scale, softcap, window,
        _of_heads(slopes_ptr, head, inside, ALIBI), D, BLOCK_D, TILE, PAGE, WINDOW, SOFTCAP, ALIBI,
        STAGES,
    )  # fmt: skip
    out = _finished(mixed, largest, total, _of_heads(sinks_ptr, head, inside, SINKS), SINKS)
    at = (token * HEADS + head) * D
    tl.store(out_ptr + at[:, None] + column, rounded(out, out_ptr.dtype.element_ty), filled)


@triton.jit
def _splits(length, window, SPLIT: tl.constexpr, SPLITS: tl.constexpr, WINDOW: tl.constexpr):
    """(first key, length of a split, number of splits) of a single query: at most SPLITS."""
    first = _first_seen(length - 1, window, SPLIT, WINDOW)
    visible = length - first
    size = tl.maximum(tl.cdiv(tl.cdiv(visible, SPLITS), SPLIT) * SPLIT, SPLIT)
    return first, size, tl.cdiv(visible, size)


@triton.jit
def attend_singles(
    query_ptr, key_ptr, value_ptr, mixed_ptr, sums_ptr, tables_ptr, lengths_ptr, starts_ptr,
    slopes_ptr, parts, query_token, query_head, table_stride, pool_stride, scale, softcap, window,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr, PAGE: tl.constexpr, SPLIT: tl.constexpr,
    SPLITS: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One program: some splits of a sequence's keys, for one key/value head and its queries.

    Writes mixed [S, H, parts, D] and sums [S, H, parts, 2] = (largest score, sum of weights).
    """
    sequence, kv_head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    token = tl.load(starts_ptr + sequence).to(tl.int64)
    length = tl.load(lengths_ptr + sequence).to(tl.int32)
    if tl.load(starts_ptr + sequence + 1) - token != 1:
        return
    row = tl.arange(0, ROWS)
    head = (kv_head * GROUP + row).to(tl.int32)
    inside = row < GROUP
    column = tl.arange(0, BLOCK_D)[None, :]
    filled = inside[:, None] & (column < D)
    at = token * query_token + head * query_head
    query = tl.load(query_ptr + at[:, None] + column, filled, 0.0)
    slopes = _of_heads(slopes_ptr, head, inside, ALIBI)
    position = tl.zeros([ROWS], tl.int32) + (length - 1)
    first, size, count = _splits(length, window, SPLIT, SPLITS, WINDOW)
    for split in range(tl.program_id(2), count, tl.num_programs(2)):
        begin = first + split * size
        end = tl.minimum(begin + size, length)
        mixed, largest, total = _walk(
            query, key_ptr + kv_head * pool_stride, value_ptr + kv_head * pool_stride,
            tables_ptr + sequence * table_stride, position, begin, end, scale, softcap, window,
            slopes, D, BLOCK_D, TILE, PAGE, WINDOW, SOFTCAP, ALIBI, STAGES,
        )  # fmt: skip
        part = (sequence * HEADS + head) * parts + split
        tl.store(mixed_ptr + part[:, None] * D + column, mixed, filled)
        tl.store(sums_ptr + part * 2, largest, inside)
        tl.store(sums_ptr + part * 2 + 1, total, inside)


@triton.jit
def merge_splits(
    mixed_ptr, sums_ptr, out_ptr, lengths_ptr, starts_ptr, sinks_ptr, parts, window,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, SPLIT: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_S: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    """One program: a head of a single query. Parts are added BLOCK_S at a time, in order."""
    if AHEAD:
        tl.extra.cuda.gdc_launch_dependents()
    sequence, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = tl.load(starts_ptr + sequence).to(tl.int64)
    length = tl.load(lengths_ptr + sequence).to(tl.int32)
    if tl.load(starts_ptr + sequence + 1) - token != 1:
        return
    column = tl.arange(0, BLOCK_D)
    _, _, count = _splits(length, window, SPLIT, SPLITS, WINDOW)
    mixed = tl.zeros([1, BLOCK_D], tl.float32)
    largest = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    for first in range(0, count, BLOCK_S):
        split = first + tl.arange(0, BLOCK_S)
        part = (sequence * HEADS + head) * parts + split
        peak = tl.load(sums_ptr + part * 2, split < count, float("-inf"))
        weight = tl.load(sums_ptr + part * 2 + 1, split < count, 0.0)
        inside = (split < count)[:, None] & (column < D)[None, :]
        values = tl.load(mixed_ptr + part[:, None] * D + column[None, :], inside, 0.0)
        higher = tl.maximum(largest, tl.max(peak, 0))
        finite = tl.where(higher == float("-inf"), 0.0, higher)
        faded, shares = tl.exp2(largest - finite), tl.exp2(peak - finite)
        mixed = mixed * faded[:, None] + tl.sum(values * shares[:, None], 0, keep_dims=True)
        total = total * faded + tl.sum(weight * shares, 0)
        largest = higher
    sink = _of_heads(sinks_ptr, head + tl.zeros([1], tl.int32), True, SINKS)
    out = _finished(mixed, largest, total, sink, SINKS)
    at = (token * HEADS + head) * D + column[None, :]
    tl.store(out_ptr + at, rounded(out, out_ptr.dtype.element_ty), (column < D)[None, :])
