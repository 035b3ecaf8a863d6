"""What a group of ranks is told at birth: the model's shape, the cut, the cache."""

from __future__ import annotations

from typing import Literal

import msgspec

DType = Literal["float32", "bfloat16", "float16"]
DTYPE_BYTES: dict[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}


class RopeSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Rotary positions. `scaling` names the rule; its numbers follow Hugging Face's config."""

    theta: float = 10000.0
    rotary_dim: int
    scaling: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


class DecoderSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A decoder-only transformer as data: everything that the one decoder needs to know."""

    family: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_context: int
    """Positions the model was made for (tokens)."""
    norm_eps: float
    rope: RopeSpec
    activation: Literal["silu"] = "silu"
    tie_embeddings: bool = False
    attention_bias: bool = False
    """Bias on the query, key and value projections."""
    output_bias: bool = False
    """Bias on the attention output projection."""
    mlp_bias: bool = False


class CacheSpec(msgspec.Struct, frozen=True, kw_only=True):
    """The paged KV pool, the same number of blocks on every rank."""

    block_size: int
    """Tokens a block."""
    num_blocks: int
    dtype: DType


class WorkerSpec(msgspec.Struct, frozen=True, kw_only=True):
    """All that one group of ranks needs to build its shard. Equal on every rank."""

    checkpoint: str
    """Folder or .gguf file, readable at this path on every node."""
    model: DecoderSpec
    dtype: DType
    tp_size: int
    cache: CacheSpec
    max_tokens_per_step: int
    max_running: int
    eos_token_ids: tuple[int, ...]
    device: Literal["cpu", "cuda"]
    epoch: int = 0


class LoadReport(msgspec.Struct, frozen=True, kw_only=True, array_like=True, tag="ready"):
    """A rank's account of what it loaded. Sizes in bytes."""

    rank: int
    weight_bytes: int
    kv_bytes: int
    tensors_used: int
    tensors_ignored: list[str]
    kernels: str
