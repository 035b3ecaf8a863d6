"""GGUF files of every architecture that is read, against `transformers` on the same weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFWriter
from safetensors.numpy import load_file

from phalanx.workers.checkpoint.source import open_checkpoint
from phalanx.workers.models.registry import describe, tensor_shapes
from phalanx.workers.models.verified import GGUF, records

TP_SIZES = (1, 2, 3, 4)
SHAPE = {
    "vocab_size": 131,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "hidden_size": 48,
    "intermediate_size": 77,
    "num_hidden_layers": 7,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "max_position_embeddings": 96,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 6.0}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", SHAPE | {"num_hidden_layers": 2}),
    "qwen2": ("Qwen2Config", SHAPE | {"num_hidden_layers": 2, "hidden_size": 60}),
    "qwen3": (
        "Qwen3Config",
        SHAPE
        | {"num_hidden_layers": 2, "tie_word_embeddings": True}
        | {"rope_parameters": YARN | {"original_max_position_embeddings": 16}},
    ),
    "gemma": ("GemmaConfig", SHAPE | {"num_hidden_layers": 2}),
    "gemma2": (
        "Gemma2Config",
        SHAPE
        | {"num_hidden_layers": 3, "sliding_window": 9, "query_pre_attn_scalar": 10}
        | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 30.0},
    ),
    "gemma3": (
        "Gemma3TextConfig",
        SHAPE
        | {"sliding_window": 9, "query_pre_attn_scalar": 10}
        | {"rope_parameters": {"full_attention": LINEAR}},
    ),
}
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
GEMMA_NAMES = NAMES | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def write(folder: Path, path: Path, architecture: str) -> None:
    """The checkpoint in `folder` as llama.cpp's converter writes it."""
    config = json.loads((folder / "config.json").read_text())
    ropes = config["rope_parameters"]
    rope = ropes.get("full_attention", ropes)
    writer = GGUFWriter(path, architecture)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config.get("head_dim", 10))
    writer.add_value_length(config.get("head_dim", 10))
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if rope["rope_type"] != "default":
        writer.add_string(f"{architecture}.rope.scaling.type", rope["rope_type"])
        writer.add_rope_scaling_factor(rope["factor"])
    if "original_max_position_embeddings" in rope:
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if config.get("sliding_window"):
        writer.add_sliding_window(config["sliding_window"])
    if config.get("attn_logit_softcapping"):
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
    gemma = architecture.startswith("gemma")
    roles = GEMMA_NAMES if architecture in ("gemma2", "gemma3") else NAMES
    for name, tensor in load_file(folder / "model.safetensors").items():
        stem, suffix = name.rsplit(".", 1)
        prefix, _, role = stem.removeprefix("model.layers.").partition(".")
        target = f"blk.{prefix}.{roles[role]}" if prefix.isdigit() else roles[stem]
        shifted = tensor + 1 if gemma and "norm" in stem else tensor
        if architecture == "llama" and role in ("self_attn.q_proj", "self_attn.k_proj"):
            halves = tensor.reshape(-1, 2, config["head_dim"] // 2, tensor.shape[1])
            shifted = np.ascontiguousarray(halves.swapaxes(1, 2).reshape(tensor.shape))
        writer.add_tensor(f"{target}.{suffix}", shifted.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("tp", TP_SIZES)
@pytest.mark.parametrize("architecture", MODELS)
def test_is_the_same_model_as_the_folder(
    random_model: Callable[..., Any],
    difference: Callable[..., float],
    verify: Callable[..., None],
    tmp_path: Path,
    architecture: str,
    tp: int,
) -> None:
    kind, fields = MODELS[architecture]
    model = random_model(kind, **fields)
    path = tmp_path / "model.gguf"
    write(model.folder, path, architecture)
    checkpoint = open_checkpoint(path)
    assert describe(checkpoint.description.config) == model.spec
    found = {name: checkpoint.shape(name) for name in checkpoint.names()}
    assert tensor_shapes(model.spec, "gguf") == found
    assert difference(model, tp, path) < 2e-4
    verify(f"{architecture} ({GGUF})", model.spec.family, tp, {GGUF})


def test_the_record_is_of_these_files() -> None:
    """Else run `make families`."""
    recorded = {name: record for name, record in records().items() if GGUF in record["features"]}
    assert recorded == {
        f"{name} ({GGUF})": {"family": name, "features": {GGUF: list(TP_SIZES)}} for name in MODELS
    }
