"""Configs become specs, and what is not supported is refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from phalanx.protos.errors import ModelError
from phalanx.protos.specs import RopeSpec
from phalanx.workers.models.registry import describe, tensor_names, tensor_shapes

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 72,
    "intermediate_size": 101,
    "num_hidden_layers": 2,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 515,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}


def test_reads_a_plain_config() -> None:
    spec = describe(CONFIG)
    assert (spec.family, spec.num_layers, spec.hidden_size, spec.head_dim) == ("llama", 2, 72, 8)
    assert (spec.num_heads, spec.num_kv_heads, spec.vocab_size) == (9, 3, 515)
    assert (spec.intermediate_size, spec.max_context, spec.norm_eps) == (101, 2048, 1e-5)
    assert spec.rope == RopeSpec(theta=10000.0, rotary_dim=8)
    assert not (spec.tie_embeddings or spec.attention_bias or spec.output_bias or spec.mlp_bias)


def test_derived_and_explicit_values() -> None:
    plain = {name: value for name, value in CONFIG.items() if name != "num_key_value_heads"}
    assert describe(plain).num_kv_heads == 9
    assert describe(CONFIG | {"head_dim": 16}).head_dim == 16
    assert describe(CONFIG | {"head_dim": None}).head_dim == 8
    spec = describe(CONFIG | {"attention_bias": True, "tie_word_embeddings": True})
    assert spec.attention_bias and spec.output_bias and spec.tie_embeddings


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"rope_theta": 5e5}, {"theta": 5e5}),
        ({"rope_theta": 5e5, "rope_scaling": None}, {"theta": 5e5}),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, {"theta": 5e5}),
        (
            {"rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 2}},
            {"theta": 1e6, "scaling": "linear", "factor": 2.0},
        ),
        (
            {"rope_theta": 5e5, "rope_scaling": LLAMA3 | {"rope_type": "llama3"}},
            {"theta": 5e5, "scaling": "llama3", "factor": 8.0, "original_max_position": 512},
        ),
        (
            {"rope_parameters": LLAMA3 | {"rope_type": "llama3", "rope_theta": 5e5}},
            {"theta": 5e5, "scaling": "llama3", "factor": 8.0, "original_max_position": 512},
        ),
    ],
)
def test_both_forms_of_rope(fields: dict[str, Any], expected: dict[str, Any]) -> None:
    assert describe(CONFIG | fields).rope == RopeSpec(rotary_dim=8, **expected)


@pytest.mark.parametrize("rope_type", ["default", "linear", "llama3"])
def test_rope_agrees_with_transformers(rope_type: str) -> None:
    """Frequencies computed from the spec equal those that transformers computes."""
    torch = pytest.importorskip("torch")
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    from phalanx.workers.layers.rope import inverse_frequencies

    numbers = {"default": {}, "linear": {"factor": 3.0}, "llama3": LLAMA3}[rope_type]
    rope = {"rope_type": rope_type, "rope_theta": 5e5, **numbers}
    config = LlamaConfig(**(CONFIG | {"head_dim": 64, "rope_parameters": rope}))
    spec = describe(config.to_dict() | {"architectures": ["LlamaForCausalLM"]})
    expected = LlamaRotaryEmbedding(config).inv_freq
    torch.testing.assert_close(inverse_frequencies(spec.rope), expected)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architectures": ["LlamaForCausalLN"]}, "allowed: LlamaForCausalLM"),
        ({"architectures": ["MistralForCausal"]}, "allowed: MistralForCausalLM"),
        ({"architectures": []}, "architectures is \\[\\]"),
        ({"architectures": None}, "architectures is missing"),
        ({"architectures": ["A", "B"]}, "a list with one name"),
        ({"hidden_size": 0}, "hidden_size is 0, allowed: whole numbers from 1"),
        ({"hidden_size": "72"}, "hidden_size is '72'"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"hidden_size": 72.0}, "hidden_size is 72.0"),
        ({"hidden_size": 10**30}, "hidden_size is 1000"),
        ({"hidden_size": 73}, "multiples of 9 heads"),
        ({"num_hidden_layers": 10**6}, "whole numbers from 1 to 4096"),
        ({"num_key_value_heads": 2}, "divisors of 9 attention heads"),
        ({"num_key_value_heads": 18}, "divisors of 9 attention heads"),
        ({"head_dim": 7}, "head_dim is 7, allowed: even"),
        ({"head_dim": 0}, "head_dim is 0"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', allowed: silu"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0, allowed: finite numbers above 0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes', allowed: true or false"),
        ({"max_position_embeddings": None}, "max_position_embeddings is missing"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"rope_theta": -1}, "rope_theta is -1"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2}}, "'dynamic', allowed: "),
        ({"rope_scaling": {"rope_type": "lama3"}}, "rope_type is 'lama3', allowed: llama3"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling: factor is missing"),
        ({"rope_scaling": [1]}, "rope_scaling is \\[1\\], allowed: an object"),
        ({"rope_scaling": LLAMA3 | {"type": "llama3", "low_freq_factor": 4}}, "above low_freq"),
        ({"rope_parameters": {"full_attention": {}}}, "full_attention"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2, "beta_fast": 32}}, "beta_fast"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        (
            {"rope_parameters": {"rope_theta": 5e5}, "rope_scaling": {"type": "linear"}},
            "null beside rope_parameters",
        ),
    ],
)
def test_refuses_what_is_wrong_or_not_supported(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        describe(CONFIG | fields)


def test_mistral_without_an_active_window() -> None:
    mistral = CONFIG | {"architectures": ["MistralForCausalLM"], "max_position_embeddings": 8192}
    assert describe(mistral | {"sliding_window": None}).family == "llama"
    assert describe(mistral | {"sliding_window": 8192}).max_context == 8192
    for active in (mistral | {"sliding_window": 4096}, mistral):
        with pytest.raises(ModelError, match="sliding_window is 4096"):
            describe(active)


def test_names_are_templates_by_layer() -> None:
    spec = describe(CONFIG | {"attention_bias": True})
    names = tensor_names(spec, "safetensors")
    assert names.layer(1).query == "model.layers.1.self_attn.q_proj.weight"
    assert names.layer(1).output_bias == "model.layers.1.self_attn.o_proj.bias"
    assert names.layer(1).gate_bias is None
    assert not names.permuted_heads and names.head == "lm_head.weight"
    names = tensor_names(spec, "gguf")
    assert names.layer(0).key_bias == "blk.0.attn_k.bias"
    assert names.permuted_heads and names.head == "output.weight"


def test_a_tied_model_has_one_table() -> None:
    spec = describe(CONFIG | {"tie_word_embeddings": True})
    for kind in ("safetensors", "gguf"):
        names = tensor_names(spec, kind)  # type: ignore[arg-type]
        assert names.head == names.embedding
        shapes = tensor_shapes(spec, kind)  # type: ignore[arg-type]
        assert [shape for shape in shapes.values() if 515 in shape] == [(515, 72)]
    assert "lm_head.weight" in tensor_names(spec, "safetensors").ignored


def test_unknown_family_is_named() -> None:
    import msgspec

    spec = msgspec.structs.replace(describe(CONFIG), family="lama")
    with pytest.raises(ModelError, match="'lama' is not supported; nearest: llama"):
        tensor_names(spec, "gguf")
