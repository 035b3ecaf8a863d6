"""The memory of recorded decode steps, on GPUs."""

from __future__ import annotations

from phalanx.protos.recording import MAX_RECORDED_ROWS, RECORDED_LOGIT_ROWS
from phalanx.protos.shards import cut_model
from phalanx.protos.specs import DTYPE_BYTES, DecoderSpec, DType, activation_dtype

from .placement import PIECE_BYTES, activation_bytes

PIECE_RECORDED = 1 << 24  # logits that random numbers are made for at a time
GRAPHS_BYTES = 512 * 2**20  # of recorded steps, beside their temporaries


def recorded_bytes(
    model: DecoderSpec, *, dtype: DType, tp_size: int, rank: int, max_running: int
) -> int:
    """What recorded decode steps hold on a GPU, in bytes: an estimate from above.

    The graphs themselves, and the temporaries of the largest one, which all share: those of its
    layers, its logits, their float32 copies, and the random numbers of a piece of them.
    """
    rows = min(max_running, MAX_RECORDED_ROWS)
    step = activation_bytes(
        model,
        dtype=dtype,
        tp_size=tp_size,
        rank=rank,
        max_tokens_per_step=rows,
        max_running=rows,
    )
    logits = min(rows, RECORDED_LOGIT_ROWS) * cut_model(model, tp_size, rank).vocab.size
    piece = PIECE_BYTES * min(logits, PIECE_RECORDED)
    return GRAPHS_BYTES + step + logits * (DTYPE_BYTES[activation_dtype(dtype)] + 4) + piece
