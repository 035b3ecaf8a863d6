"""Checkpoints as they were saved in other times: names, masks and layers that differ."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from phalanx.workers.checkpoint.source import open_checkpoint

VOCAB, CONTEXT = 131, 96
TOLERANCE = 1e-4
SIZES = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
WIDE = SIZES | {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6}
WIDE |= {"intermediate_size": 77, "max_position_embeddings": CONTEXT}
GPT2 = SIZES | {"n_embd": 55, "n_layer": 2, "n_head": 5, "n_positions": CONTEXT, "n_inner": 77}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", GPT2),
    "bloom": ("BloomConfig", SIZES | {"hidden_size": 55, "n_layer": 2, "n_head": 5}),
    "falcon": ("FalconConfig", WIDE),
    "opt": ("OPTConfig", WIDE | {"ffn_dim": 77, "word_embed_proj_dim": 48}),
    "gpt_bigcode": ("GPTBigCodeConfig", GPT2),
    "mpt": (
        "MptConfig",
        SIZES | {"d_model": 55, "n_layers": 2, "n_heads": 5, "max_seq_len": CONTEXT},
    ),
    "gptj": ("GPTJConfig", GPT2 | {"rotary_dim": 6}),
    "gpt_neo": (
        "GPTNeoConfig",
        SIZES
        | {"hidden_size": 55, "num_layers": 2, "num_heads": 5, "window_size": 9}
        | {"max_position_embeddings": CONTEXT, "attention_types": [[["global", "local"], 1]]},
    ),
    "gpt_neox": ("GPTNeoXConfig", WIDE | {"hidden_size": 96}),
    "phi3": (
        "Phi3Config",
        WIDE
        | {"num_key_value_heads": 2, "original_max_position_embeddings": 16}
        | {
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0, 1.1, 1.3, 1.4],
                "long_factor": [1.5, 2.0, 4.0, 5.0],
            }
        },
    ),
    "deepseek-v3": (
        "DeepseekV3Config",
        WIDE
        | {"num_key_value_heads": 6, "kv_lora_rank": 10, "q_lora_rank": 13, "n_group": 4}
        | {"qk_nope_head_dim": 8, "qk_rope_head_dim": 6, "v_head_dim": 9, "topk_group": 2}
        | {"first_k_dense_replace": 1, "moe_intermediate_size": 17, "n_routed_experts": 12}
        | {"num_experts_per_tok": 3, "n_shared_experts": 1},
    ),
}
Difference = Callable[..., float]
Make = Callable[..., Any]


def build(random_model: Make, name: str) -> Any:
    kind, fields = MODELS[name]
    return random_model(kind, **fields)


def test_longrope_within_the_original_context(random_model: Make, scored: Make) -> None:
    """Where no more than that is served, the short factors hold."""
    model = build(random_model, "phi3")
    spec = msgspec.structs.replace(model.spec, max_context=16)
    tokens = [3 * index % VOCAB for index in range(16)]
    tops = [top for part in scored(model.folder, spec, 2, tokens) for top in part.top]
    for row, top in zip(model.logprobs(tokens)[:-1], tops, strict=True):
        for item in top:
            assert abs(float(row[item.token_id]) - item.logprob) < TOLERANCE


@pytest.mark.parametrize("name", ["gpt2", "bloom", "falcon", "opt", "gpt_bigcode", "mpt"])
def test_saved_without_the_head(
    random_model: Make, difference: Difference, tmp_path: Path, name: str
) -> None:
    """Older checkpoints were saved from the bare model: names lack the leading part."""
    model = build(random_model, name)
    model.reference.base_model.save_pretrained(tmp_path)
    stored = open_checkpoint(tmp_path).names()
    assert not any(key.startswith(("transformer.", "model.")) for key in stored)
    assert difference(model, 2, tmp_path) < TOLERANCE


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("gpt2", "transformer.h.{}.attn."),
        ("gptj", "transformer.h.{}.attn."),
        ("gpt_neo", "transformer.h.{}.attn.attention."),
        ("gpt_neox", "gpt_neox.layers.{}.attention."),
    ],
)
def test_masks_of_older_checkpoints_are_left_alone(
    random_model: Make, difference: Difference, tmp_path: Path, name: str, stem: str
) -> None:
    model = build(random_model, name)
    shutil.copytree(model.folder, tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    for layer in range(2):
        mask = torch.ones(1, 1, CONTEXT, CONTEXT, dtype=torch.bool).tril()
        tensors[stem.format(layer) + "bias"] = mask
        tensors[stem.format(layer) + "masked_bias"] = torch.tensor(-1e9)
    save_file(tensors, path)
    assert difference(model, 2, path.parent) < TOLERANCE


def test_layers_that_predict_further_tokens_are_left_alone(
    random_model: Make, difference: Difference, tmp_path: Path
) -> None:
    model = build(random_model, "deepseek-v3")
    shutil.copytree(model.folder, tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    save_file(load_file(path) | {"model.layers.2.eh_proj.weight": torch.ones(48, 96)}, path)
    assert difference(model, 2, path.parent) < TOLERANCE
