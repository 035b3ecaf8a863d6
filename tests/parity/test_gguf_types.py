"""Every packed type of GGUF, read by slice on several ranks, against `transformers`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize

SHAPE = {
    "vocab_size": 131, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "hidden_size": 256,
    "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 96, "rms_norm_eps": 1e-5,
}  # fmt: skip
NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip
# Bytes of a block at which its scales stand, as float16
SCALES = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q2_K": (80, 82),
    "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
}  # fmt: skip
KINDS = ["F32", "F16", "BF16", *SCALES]


def packed(kind: str, shape: tuple[int, int], random: np.random.Generator) -> np.ndarray:
    """Rows of random values of the size that weights have, [rows, bytes]."""
    wanted = shape[1] ** -0.5
    if kind not in SCALES:
        plain = torch.from_numpy(random.normal(0, wanted, shape))
        dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind]
        return plain.to(dtype).view(torch.uint8).numpy()
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    raw = random.integers(0, 256, (shape[0], shape[1] // block, size), dtype=np.uint8)
    scale = 1.0
    for _ in range(2):
        for place in SCALES[kind]:
            # the second of two scales is taken off what the first makes, or added to it
            part = -scale * 7 if kind in ("Q4_1", "Q5_1") and place else scale
            raw[..., place : place + 2] = np.array([part], np.float16).view(np.uint8)
        rows = raw.reshape(shape[0], -1)
        scale *= wanted / float(dequantize(rows, GGMLQuantizationType[kind]).std())
    return rows


def write(path: Path, kind: str, model: Any) -> dict[str, torch.Tensor]:
    """A file of random packed matrices; the state that `transformers` gives them."""
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(SHAPE["num_hidden_layers"])
    writer.add_context_length(SHAPE["max_position_embeddings"])
    writer.add_embedding_length(SHAPE["hidden_size"])
    writer.add_feed_forward_length(SHAPE["intermediate_size"])
    writer.add_head_count(SHAPE["num_attention_heads"])
    writer.add_head_count_kv(SHAPE["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(SHAPE["rms_norm_eps"])
    writer.add_rope_freq_base(10000.0)
    random, state = np.random.default_rng(KINDS.index(kind)), {}
    for name, tensor in model.reference.state_dict().items():
        stem = name.removesuffix(".weight")
        prefix, _, role = stem.removeprefix("model.layers.").partition(".")
        target = f"blk.{prefix}.{NAMES[role]}" if prefix.isdigit() else NAMES[stem]
        state[name] = tensor
        if tensor.dim() == 1:
            writer.add_tensor(f"{target}.weight", tensor.numpy())
            continue
        quant = GGMLQuantizationType[kind]
        raw = packed(kind, tuple(tensor.shape), random)
        writer.add_tensor(f"{target}.weight", raw, raw_shape=raw.shape, raw_dtype=quant)
        values = torch.from_numpy(np.array(dequantize(raw, quant), np.float32))
        values = values.reshape(tensor.shape)
        if role in ("self_attn.q_proj", "self_attn.k_proj"):  # stored in neighbouring pairs
            pairs = values.reshape(-1, SHAPE["head_dim"] // 2, 2, tensor.shape[1])
            values = pairs.transpose(1, 2).reshape(tensor.shape)
        state[name] = values
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return state


@pytest.mark.parametrize("kind", KINDS)
def test_packed_weights_are_those_that_gguf_unpacks(
    random_model: Callable[..., Any], difference: Callable[..., float], tmp_path: Path, kind: str
) -> None:
    """Three ranks: cuts fall inside blocks, 171 of 512 columns, 3 of 8 heads."""
    model = random_model("LlamaConfig", **SHAPE)
    state = write(tmp_path / "model.gguf", kind, model)
    assert all(bool(value.isfinite().all()) for value in state.values())
    reference = copy.deepcopy(model.reference)
    reference.load_state_dict(state)
    same = replace(model, reference=reference, known={})
    assert difference(same, 3, tmp_path / "model.gguf") < 2e-4
