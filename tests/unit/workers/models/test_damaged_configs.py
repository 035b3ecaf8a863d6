"""A config is somebody else's file: whatever it says, it is a spec or a `ModelError`."""

from __future__ import annotations

import copy
import random
from typing import Any

import msgspec
import pytest

from phalanx.protos.errors import ModelError
from phalanx.protos.shards import (
    cut_model,
    kv_bytes_per_token,
    state_bytes_per_slot,
    weight_parameters,
)
from phalanx.protos.specs import DecoderSpec
from phalanx.workers.layers.rope import inverse_frequencies
from phalanx.workers.models.families import ARCHITECTURES
from phalanx.workers.models.registry import describe, tensor_shapes

SHAPE: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 77,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 131,
    "max_position_embeddings": 96,
    "rms_norm_eps": 1e-5,
    "sliding_window": 9,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    # other authors' words for the same
    "n_embd": 48,
    "n_embed": 48,
    "d_model": 48,
    "n_head": 6,
    "n_heads": 6,
    "num_heads": 6,
    "n_layer": 3,
    "n_layers": 3,
    "num_layers": 3,
    "n_positions": 96,
    "max_seq_len": 96,
    "ffn_dim": 77,
    "n_inner": 77,
    "ffn_hidden_size": 77,
    "window_size": 9,
    "num_kv_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 33,
    "attention_types": [[["global", "local", "global"], 1]],
    "attn_config": {"alibi": True},
}
LATENT: dict[str, Any] = {
    "num_key_value_heads": 6,
    "q_lora_rank": 13,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 6,
    "v_head_dim": 9,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 1.5,
}
CHATGLM: dict[str, Any] = {"multi_query_attention": True, "multi_query_group_num": 2}
STATES: dict[str, Any] = {"state_size": 5, "conv_kernel": 4, "expand": 2, "time_step_rank": "auto"}
OTHERWISE: dict[str, dict[str, Any]] = {
    "MistralForCausalLM": {"layer_types": None},
    "CodeGenForCausalLM": {"n_head": 4},
    "ChatGLMModel": CHATGLM,
    "ChatGLMForConditionalGeneration": CHATGLM,
    "DeepseekV2ForCausalLM": LATENT | {"topk_method": "group_limited_greedy"},
    "DeepseekV3ForCausalLM": LATENT | {"topk_method": "noaux_tc"},
    "MambaForCausalLM": STATES,
    "FalconMambaForCausalLM": STATES,
    "Mamba2ForCausalLM": STATES
    | {"head_dim": 16, "n_groups": 3, "time_step_limit": [0.0, {"__float__": "Infinity"}]},
}
JUNK = [
    *(None, True, False, 0, -1, 1, 2, 3, 5, 7, 2**31, 10**30, 0.0, 0.5, 1.5, -2.0, 1e300),
    *(float("nan"), float("inf"), "", "silu", "relu2", "yarn", "longrope", "sliding_attention"),
    *([], [0], [None], ["full_attention"] * 3, [1.0] * 4, [[["local"], 3]], [[["local"], "x"]]),
    *({}, {"rope_type": "yarn"}, {"rope_type": "linear", "factor": 2}, {"type": []}, {"": {}}),
    *({"full_attention": {"rope_theta": -1}}, {"full_attention": 3}, {"alibi": 1}),
    *(
        {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1.0},
        {"rope_type": "dynamic", "factor": 3},
        {"rope_type": "dynamic", "factor": 1e307},
    ),
    *(
        {
            "rope_type": "longrope",
            "factor": 2.0,
            "short_factor": [1.0] * 4,
            "long_factor": [2.0] * 4,
        },
    ),
    *({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 1},),
    *({"rope_type": "yarn", "factor": 2.0, "beta_fast": 1e300, "beta_slow": 1e-300},),
    *({"rope_type": "longrope", "short_factor": "x"}, {"rope_type": "yarn", "factor": 1e308}),
]
FIELDS = [
    *SHAPE,
    *("head_dim", "hidden_act", "hidden_activation", "activation_function", "activation"),
    *("tie_word_embeddings", "attention_bias", "mlp_bias", "use_bias", "bias", "norm_eps"),
    *("rope_theta", "rope_scaling", "partial_rotary_factor", "rotary_pct", "rotary_dim"),
    *("original_max_position_embeddings", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon"),
    *("use_sliding_window", "max_window_layers", "sliding_window_pattern", "query_pre_attn_scalar"),
    *("attn_logit_softcapping", "final_logit_softcapping", "rope_local_base_freq", "alibi"),
    *("multi_query", "parallel_attn", "new_decoder_architecture", "num_ln_in_parallel_attn"),
    *("qk_layernorm", "use_qk_norm", "use_parallel_residual", "use_qkv_bias", "clip_qkv"),
    *("do_layer_norm_before", "word_embed_proj_dim", "enable_bias", "expansion_ratio", "no_bias"),
    *("num_experts", "mlp_only_layers", "decoder_sparse_step", "shared_expert_intermediate_size"),
    *("norm_topk_prob", "no_rope_layers", "no_rope_layer_interval", "embedding_multiplier"),
    *(*STATES, "n_groups", "time_step_limit", "use_conv_bias", "mixer_rms_eps"),
    *(*LATENT, "topk_method", "scoring_func", "moe_layer_freq", "rope_interleave"),
    *("residual_multiplier", "attention_multiplier", "logits_scaling", "logit_scale", "seq_length"),
    *("rope_ratio", "kv_channels", "multi_query_attention", "multi_query_group_num", "rmsnorm"),
]


def usual(architecture: str) -> dict[str, Any]:
    own = {"architectures": [architecture], **OTHERWISE.get(architecture, {})}
    return copy.deepcopy(SHAPE) | own


def check_spec(spec: DecoderSpec) -> None:
    """What the planner does with a spec works, and it survives the way to the workers."""
    assert msgspec.json.decode(msgspec.json.encode(spec), type=DecoderSpec) == spec
    assert spec.num_heads % max(spec.num_kv_heads, 1) == 0
    assert len(spec.windows) in (0, spec.num_layers)
    if spec.num_layers > 8 or (spec.experts and spec.experts.num_experts > 8):
        return
    for rank in range(3):
        assert weight_parameters(spec, 3, rank) > 0
        assert kv_bytes_per_token(spec, 3, rank, "float32") >= 0
        cut_model(spec, 3, rank)
        assert state_bytes_per_slot(spec, 3, rank, "float32") >= 0
    if spec.num_heads < 1000:
        assert tensor_shapes(spec, "safetensors")
    for rope in (spec.rope, spec.local_rope):
        if rope is not None and rope.rotary_dim < 1000:
            for length in (spec.max_context, spec.longest_context):
                assert not inverse_frequencies(rope, length).isnan().any()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_usual_config_is_a_spec(architecture: str) -> None:
    check_spec(describe(usual(architecture)))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_damaged_config_is_a_spec_or_refused(architecture: str) -> None:
    rng = random.Random(architecture)
    refused = 0
    for _ in range(400):
        config = usual(architecture)
        for field in rng.sample(FIELDS, rng.choice([1, 1, 2, 3])):
            config[field] = copy.deepcopy(rng.choice(JUNK))
        try:
            spec = describe(config)
        except ModelError as error:
            refused += 1
            assert str(error).startswith("config") or "rope" in str(error)
        else:
            check_spec(spec)
    assert 20 < refused < 400
