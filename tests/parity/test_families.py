"""Every family of models, at several tensor-parallel sizes, against `transformers`.

Each model is small and of odd shapes: heads, columns and vocabulary do not divide evenly.
"""

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
from phalanx.workers.models.families import ARCHITECTURES
from phalanx.workers.models.registry import tensor_names, tensor_shapes

VOCAB, CONTEXT = 131, 96
TOLERANCE = 1e-4
SIZES = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LLAMA = SIZES | {
    "hidden_size": 48,
    "intermediate_size": 77,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
}
NORMED = {"head_dim": 10}
GPT2 = SIZES | {"n_embd": 55, "n_layer": 2, "n_head": 5, "n_positions": CONTEXT, "n_inner": 77}
FALCON = SIZES | {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6}
FALCON |= {"max_position_embeddings": CONTEXT}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.3],
    "long_factor": [1.5, 2.0, 4.0],
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 6.0,
    "original_max_position_embeddings": 16,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1e6, "factor": 4.0}
GEMMA3_ROPES = {
    "full_attention": LINEAR,
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}
SLIDING, FULL = "sliding_attention", "full_attention"
OLMO3_ROPES = {
    "full_attention": YARN,
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}
EXPERTS = {"num_local_experts": 5, "num_experts_per_tok": 2}
QWEN_EXPERTS = EXPERTS | {"moe_intermediate_size": 33, "head_dim": 10}
LATENT = LLAMA | {
    "hidden_size": 55,
    "num_attention_heads": 5,
    "num_key_value_heads": 5,
    "kv_lora_rank": 10,
    "q_lora_rank": 13,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 6,
    "v_head_dim": 9,
    "rms_norm_eps": 1e-2,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 17,
    "n_routed_experts": 12,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 1.7,
}
LATENT_YARN = YARN | {"mscale": 0.7, "mscale_all_dim": 1.3}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("Qwen2Config", LLAMA),
    "qwen2-window": (
        "Qwen2Config",
        LLAMA | {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3Config", LLAMA | NORMED | {"rope_parameters": YARN}),
    "mistral": ("MistralConfig", LLAMA | {"sliding_window": 11}),
    "gemma": ("GemmaConfig", LLAMA | NORMED),
    "gemma2": (
        "Gemma2Config",
        LLAMA | NORMED | {"sliding_window": 7, "query_pre_attn_scalar": 14, "num_hidden_layers": 3,
                          "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    ),
    "gemma3": (
        "Gemma3TextConfig",
        LLAMA | NORMED | {"sliding_window": 7, "query_pre_attn_scalar": 14, "num_hidden_layers": 3,
                          "sliding_window_pattern": 2, "rope_parameters": GEMMA3_ROPES},
    ),
    "phi3": ("Phi3Config", LLAMA | {"sliding_window": 13}),
    "phi3-longrope": (
        "Phi3Config",
        LLAMA | {"original_max_position_embeddings": 16,
                 "rope_parameters": LONG | {"partial_rotary_factor": 0.75}},
    ),
    "stablelm": (
        "StableLmConfig",
        LLAMA | {"use_qkv_bias": True, "hidden_size": 96, "qk_layernorm": True},
    ),
    "stablelm-parallel": ("StableLmConfig", LLAMA | {"use_parallel_residual": True}),
    "gpt2": ("GPT2Config", GPT2),
    "opt": (
        "OPTConfig",
        SIZES | {"hidden_size": 55, "ffn_dim": 77, "num_hidden_layers": 2, "num_attention_heads": 5,
                 "max_position_embeddings": CONTEXT, "word_embed_proj_dim": 55},
    ),
    "falcon-7b": ("FalconConfig", FALCON | {"multi_query": True, "parallel_attn": True}),
    "falcon-40b": (
        "FalconConfig",
        FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": True},
    ),
    "falcon-11b": (
        "FalconConfig",
        FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2,
                  "num_ln_in_parallel_attn": 1},
    ),
    "falcon-rw": (
        "FalconConfig",
        FALCON | {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True},
    ),
    "bloom": ("BloomConfig", SIZES | {"hidden_size": 55, "n_layer": 2, "n_head": 5}),
    "mpt": (
        "MptConfig",
        SIZES | {"d_model": 55, "n_layers": 2, "n_heads": 5, "max_seq_len": CONTEXT,
                 "attn_config": {"clip_qkv": 1.0, "softmax_scale": 0.4}},
    ),
    "gpt_bigcode": ("GPTBigCodeConfig", GPT2),
    "gpt_bigcode-multi-head": ("GPTBigCodeConfig", GPT2 | {"multi_query": False}),
    "starcoder2": ("Starcoder2Config", LLAMA | {"sliding_window": 11}),
    "glm": ("GlmConfig", LLAMA | {"head_dim": 12}),
    "glm4": ("Glm4Config", LLAMA | {"head_dim": 12}),
    "gpt_neox": ("GPTNeoXConfig", LLAMA | {"hidden_size": 96}),
    "gptj": ("GPTJConfig", GPT2 | {"rotary_dim": 6}),
    "codegen": ("CodeGenConfig", GPT2 | {"n_embd": 80, "n_head": 8, "rotary_dim": 6}),
    "phi": ("PhiConfig", LLAMA),
    "olmo2": ("Olmo2Config", LLAMA),
    "cohere": ("CohereConfig", LLAMA | {"logit_scale": 0.3}),
    "cohere-normed": ("CohereConfig", LLAMA | {"use_qk_norm": True}),
    "ministral": (
        "MinistralConfig",
        LLAMA | {"sliding_window": 9, "layer_types": [SLIDING, FULL], "head_dim": 8},
    ),
    "helium": ("HeliumConfig", LLAMA | {"head_dim": 8, "attention_bias": True}),
    "ernie4_5": ("Ernie4_5Config", LLAMA | NORMED | {"use_bias": True}),
    "exaone4": (
        "Exaone4Config",
        LLAMA | {"num_hidden_layers": 3, "sliding_window": 9, "sliding_window_pattern": 2},
    ),
    "exaone4-full": ("Exaone4Config", LLAMA | {"sliding_window": None, "layer_types": [FULL, FULL]}),
    "cohere2": ("Cohere2Config", LLAMA | {"num_hidden_layers": 3, "sliding_window": 9,
                                          "layer_types": [SLIDING, FULL, SLIDING]}),
    "olmo": ("OlmoConfig", LLAMA | {"clip_qkv": 0.8}),
    "olmo3": (
        "Olmo3Config",
        LLAMA | {"num_hidden_layers": 3, "sliding_window": 9, "rope_parameters": OLMO3_ROPES,
                 "layer_types": [SLIDING, FULL, SLIDING]},
    ),
    "olmoe": (
        "OlmoeConfig",
        LLAMA | {"num_experts": 5, "num_experts_per_tok": 2, "intermediate_size": 33},
    ),
    "smollm3": ("SmolLM3Config", LLAMA | {"no_rope_layers": [1, 0]}),
    "granite": (
        "GraniteConfig",
        LLAMA | {"embedding_multiplier": 3.0, "residual_multiplier": 0.4,
                 "attention_multiplier": 0.2, "logits_scaling": 2.5},
    ),
    "seed_oss": ("SeedOssConfig", LLAMA | NORMED | {"attention_out_bias": True}),
    "arcee": ("ArceeConfig", LLAMA | {"mlp_bias": True}),
    "nemotron": ("NemotronConfig", LLAMA),
    "gpt_neo": (
        "GPTNeoConfig",
        SIZES | {"hidden_size": 55, "num_layers": 2, "num_heads": 5, "window_size": 9,
                 "max_position_embeddings": CONTEXT, "attention_types": [[["global", "local"], 1]]},
    ),
    "qwen2-moe": (
        "Qwen2MoeConfig",
        LLAMA | {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 33,
                 "shared_expert_intermediate_size": 41},
    ),
    "mixtral": ("MixtralConfig", LLAMA | EXPERTS | {"sliding_window": 11}),
    "qwen3-moe": ("Qwen3MoeConfig", LLAMA | QWEN_EXPERTS | {"norm_topk_prob": True}),
    "qwen3-moe-mixed": (
        "Qwen3MoeConfig",
        LLAMA | QWEN_EXPERTS | {"num_hidden_layers": 3, "mlp_only_layers": [1]},
    ),
    "deepseek-v2": ("DeepseekV2Config", LATENT | {"topk_method": "group_limited_greedy"}),
    "deepseek-v2-lite": (
        "DeepseekV2Config",
        LATENT | {"q_lora_rank": None, "topk_method": "greedy", "rope_parameters": LATENT_YARN},
    ),
    "deepseek-v3": ("DeepseekV3Config", LATENT | {"rope_parameters": LATENT_YARN}),
    "deepseek-v3-other": (
        "DeepseekV3Config",
        LATENT | {"q_lora_rank": None, "norm_topk_prob": False, "first_k_dense_replace": 0,
                  "v_head_dim": 14, "n_group": 2, "topk_group": 1},
    ),
    "deepseek-v3-dense": ("DeepseekV3Config", LATENT | {"first_k_dense_replace": 3}),
}  # fmt: skip


Difference = Callable[..., float]
Make = Callable[..., Any]


def build(random_model: Make, name: str) -> Any:
    kind, fields = MODELS[name]
    return random_model(kind, **fields)


@pytest.mark.parametrize("tp", [1, 2, 3, 5])
@pytest.mark.parametrize("name", MODELS)
def test_tokens_and_probabilities_equal_transformers(
    random_model: Make, difference: Difference, name: str, tp: int
) -> None:
    assert difference(build(random_model, name), tp) < TOLERANCE


@pytest.mark.parametrize("name", MODELS)
def test_with_torch_operators_alone(random_model: Make, difference: Difference, name: str) -> None:
    """Where no kernels can be compiled."""
    assert difference(build(random_model, name), 2, kernels="cpu-torch") < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("tp", [4, 6, 7, 8])
@pytest.mark.parametrize("name", MODELS)
def test_at_further_sizes(random_model: Make, difference: Difference, name: str, tp: int) -> None:
    assert difference(build(random_model, name), tp) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", MODELS)
def test_in_half_precision(random_model: Make, score: Make, name: str, dtype: str) -> None:
    """Every operation takes the narrow dtypes; the probabilities are those of float32, roughly."""
    model = build(random_model, name)
    tokens = [(11 * index * index + index) % VOCAB for index in range(40)]
    tops = score(model.folder, model.spec, 2, tokens, dtype)
    expected = model.logprobs(tokens)[:-1]
    pairs = [
        (float(row[item.token_id]), item.logprob)
        for row, top in zip(expected, tops, strict=True)
        for item in top
    ]
    assert sum(abs(ours - theirs) for theirs, ours in pairs) / len(pairs) < 0.1


def test_longrope_within_the_original_context(random_model: Make, score: Make) -> None:
    """Where no more than that is served, the short factors hold."""
    model = build(random_model, "phi3-longrope")
    spec = msgspec.structs.replace(model.spec, max_context=16)
    tokens = [3 * index % VOCAB for index in range(16)]
    tops = score(model.folder, spec, 2, tokens)
    for row, top in zip(model.logprobs(tokens)[:-1], tops, strict=True):
        for item in top:
            assert abs(float(row[item.token_id]) - item.logprob) < TOLERANCE


@pytest.mark.parametrize("name", ["gpt2", "bloom", "falcon-7b", "opt", "gpt_bigcode", "mpt"])
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
    save_file(load_file(path) | {"model.layers.3.eh_proj.weight": torch.ones(55, 110)}, path)
    assert difference(model, 2, path.parent) < TOLERANCE


@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_is_expected_with_its_shape(random_model: Make, name: str) -> None:
    model = build(random_model, name)
    checkpoint = open_checkpoint(model.folder)
    stored = checkpoint.names()
    ignored = tensor_names(model.spec, "safetensors", stored).ignored
    found = {key: checkpoint.shape(key) for key in stored if not key.startswith(ignored)}
    assert tensor_shapes(model.spec, "safetensors", stored) == found


def test_every_architecture_is_compared() -> None:
    import transformers

    compared = {"LlamaForCausalLM", "MPTForCausalLM"}  # elsewhere; an older name
    for kind, fields in MODELS.values():
        config = getattr(transformers, kind)(**fields)
        compared.add(transformers.AutoModelForCausalLM._model_mapping[type(config)].__name__)
    assert compared == set(ARCHITECTURES)
