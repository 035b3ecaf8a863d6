"""The memory of recorded decode steps, on GPUs."""

from __future__ import annotations

from phalanx.protos.recording import MAX_RECORDED_ROWS, RECORDED_LOGIT_ROWS, counts_tokens
from phalanx.protos.shards import cut_model
from phalanx.protos.specs import DTYPE_BYTES, DecoderSpec, DType, activation_dtype

from .placement import activation_bytes

PIECE_RECORDED = 1 << 24  # logits that are penalised, filtered or drawn from at a time
PIECE_BYTES = 32  # of each of them, while this is done
COUNT_BYTES = 5  # of a token and a running sequence
GRAPHS_BYTES = 512 * 2**20  # of recorded steps, beside their temporaries


def recorded_bytes(
    model: DecoderSpec, *, dtype: DType, tp_size: int, rank: int, max_running: int
) -> int:
    """What recorded decode steps hold on a GPU, in bytes: an estimate from above.

    The graphs themselves, and the temporaries of the largest one, which all share: those of its
    layers, its logits, their float32 copies, and what is worked out of a piece of them; and how
    often each running sequence holds each token.
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
    vocab = cut_model(model, tp_size, rank).vocab.size
    logits = min(rows, RECORDED_LOGIT_ROWS) * vocab
    piece = PIECE_BYTES * min(logits, PIECE_RECORDED)
    counted = COUNT_BYTES * (max_running + 1) * vocab * counts_tokens(max_running)
    held = GRAPHS_BYTES + counted + step
    return held + logits * (DTYPE_BYTES[activation_dtype(dtype)] + 4) + piece
