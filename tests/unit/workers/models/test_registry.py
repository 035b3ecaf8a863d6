"""Configs become specs, and what is not supported is refused by name."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

from phalanx.protos.errors import ModelError
from phalanx.protos.specs import RopeSpec
from phalanx.workers.models.registry import FAMILIES, describe, tensor_names, tensor_shapes

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
YARN = {"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 256}
LONG = {"type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1, 2, 4, 8]}
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


ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 3.0},
    "dynamic": {"factor": 3.0},
    "llama3": LLAMA3,
    "yarn": {"factor": 8.0, "original_max_position_embeddings": 256},
    "yarn-magnitudes": {
        "factor": 8.0,
        "original_max_position_embeddings": 256,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "mscale": 0.8,
        "mscale_all_dim": 1.2,
    },
    "yarn-plain": {
        "factor": 4.0,
        "original_max_position_embeddings": 512,
        "truncate": False,
        "attention_factor": 0.7,
    },
    "longrope": {
        "short_factor": [1 + index / 40 for index in range(32)],
        "long_factor": [1 + index for index in range(32)],
        "original_max_position_embeddings": 512,
    },
}


@pytest.mark.parametrize("length", [100, 2048, 3 * 2048])
@pytest.mark.parametrize("name", ROPES)
def test_rope_agrees_with_transformers(name: str, length: int) -> None:
    """Frequencies and magnitudes computed from the spec equal those that transformers computes."""
    torch = pytest.importorskip("torch")
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    from phalanx.workers.layers.rope import RotaryTable, inverse_frequencies

    rope = {"rope_type": name.partition("-")[0], "rope_theta": 5e5, **ROPES[name]}
    config = LlamaConfig(**(CONFIG | {"head_dim": 64, "rope_parameters": rope}))
    spec = describe(config.to_dict() | {"architectures": ["LlamaForCausalLM"]})
    assert spec.rope is not None
    theirs = LlamaRotaryEmbedding(config)
    cos, sin = theirs(torch.zeros(1), torch.arange(length)[None])
    frequencies = inverse_frequencies(spec.rope, length)
    torch.testing.assert_close(frequencies, theirs.inv_freq)
    table = RotaryTable(spec.rope, length, torch.float32, torch.device("cpu"))
    for ours, expected in zip(table.at(torch.arange(length)), (cos, sin), strict=True):
        torch.testing.assert_close(ours, expected[0, :, :32], rtol=0, atol=2e-4)


def test_dynamic_scaling_reaches_as_far_as_its_factor() -> None:
    spec = describe(CONFIG | {"rope_scaling": {"type": "dynamic", "factor": 2.5}})
    assert (spec.max_context, spec.longest_context) == (2048, 5120)
    linear = describe(CONFIG | {"rope_scaling": {"type": "linear", "factor": 2.5}})
    assert linear.longest_context == linear.max_context == 2048


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
        ({"hidden_act": "gelu_ned"}, "hidden_act is 'gelu_ned', allowed: gelu_new"),
        ({"hidden_act": "xielu"}, "hidden_act is 'xielu', allowed: "),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0, allowed: finite numbers above 0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes', allowed: true or false"),
        ({"max_position_embeddings": None}, "max_position_embeddings is missing"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"rope_theta": -1}, "rope_theta is -1"),
        ({"rope_scaling": {"type": "dynamic"}}, "rope_scaling: factor is missing"),
        ({"rope_scaling": {"type": "mrope", "factor": 2}}, "'mrope', allowed: "),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2}, "head_dim": 2},
            "type is 'dynamic', allowed: other rules",
        ),
        ({"rope_scaling": YARN | {"beta_fast": 0.5}}, "above beta_slow"),
        ({"rope_scaling": YARN | {"low_freq_factor": 2}}, "only attention_factor, beta_fast"),
        ({"rope_scaling": LONG | {"long_factor": [1.0]}}, "a list of 4 finite numbers above 0"),
        ({"rope_scaling": LONG | {"short_factor": [0.0] * 4}}, "a list of 4 finite numbers"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder is True, allowed: False"),
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


def test_mistral_windows() -> None:
    mistral = CONFIG | {"architectures": ["MistralForCausalLM"], "max_position_embeddings": 8192}
    assert describe(mistral | {"sliding_window": None}).windows == ()
    assert describe(mistral | {"sliding_window": 512}).windows == (512, 512)
    assert describe(mistral).windows == (4096, 4096)  # the default of transformers
    with pytest.raises(ModelError, match="sliding_window is 0"):
        describe(mistral | {"sliding_window": 0})


def family(architecture: str, **fields: Any) -> dict[str, Any]:
    return CONFIG | {"architectures": [architecture]} | fields


GPT2 = {"n_embd": 72, "n_head": 9, "n_layer": 2, "n_positions": 64}
LATENT = {
    "num_key_value_heads": 9,
    "q_lora_rank": 13,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 6,
    "v_head_dim": 9,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 33,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 1.5,
}
MPT = {"d_model": 72, "n_heads": 9, "n_layers": 2, "max_seq_len": 64}


CHATGLM = {
    "num_layers": 2,
    "padded_vocab_size": 515,
    "hidden_size": 72,
    "ffn_hidden_size": 101,
    "kv_channels": 8,
    "num_attention_heads": 9,
    "multi_query_attention": True,
    "multi_query_group_num": 3,
    "seq_length": 64,
    "add_qkv_bias": True,
    "architectures": ["ChatGLMModel"],
}


def chatglm(**fields: Any) -> dict[str, Any]:
    return CHATGLM | fields


def test_chatglm_takes_the_base_from_the_ratio_where_it_is_one() -> None:
    later = describe(chatglm(rope_ratio=50, classifier_dropout=None))
    assert later.rope == RopeSpec(theta=5e5, rotary_dim=4)
    assert describe(chatglm()).rope == RopeSpec(theta=1e4, rotary_dim=4)
    assert describe(chatglm(add_bias_linear=True, add_qkv_bias=False)).attention_bias


def deepseek(version: int, **fields: Any) -> dict[str, Any]:
    return family(f"DeepseekV{version}ForCausalLM", **LATENT | fields)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (family("Qwen4ForCausalLM"), "allowed: Qwen[23]ForCausalLM, "),
        (family("GemmaForCausalLM", hidden_act="mish"), "hidden_act is 'mish'"),
        (family("Gemma3ForCausalLM", layer_types=["full_attention"], sliding_window=4), "2 times"),
        (family("Gemma3ForCausalLM", attn_logit_softcapping=50.0), "attn_logit_softcapping is 50"),
        (family("Gemma2ForCausalLM", use_bidirectional_attention=True), "is True, allowed: False"),
        (family("Phi3ForCausalLM", partial_rotary_factor=0.4), "partial_rotary_factor is 0.4"),
        (family("Phi3ForCausalLM", rope_scaling={"type": "llama"}), "type is 'llama'"),
        (family("GPT2LMHeadModel", **GPT2 | {"n_head": 7}), "n_embd is 72"),
        (family("GPT2LMHeadModel", **GPT2, scale_attn_by_inverse_layer_idx=True), "inverse_layer"),
        (family("GPT2LMHeadModel", **GPT2, activation_function="tanh"), "activation_function is"),
        (family("OPTForCausalLM", do_layer_norm_before=False), "do_layer_norm_before is False"),
        (family("OPTForCausalLM", word_embed_proj_dim=12), "word_embed_proj_dim is 12"),
        (family("FalconForCausalLM", new_decoder_architecture=True, parallel_attn=False), "true"),
        (family("BloomForCausalLM", apply_residual_connection_post_layernorm=True), "post_layern"),
        (family("MptForCausalLM", **MPT, attn_config={"alibi": False}), "alibi is False"),
        (
            family("MptForCausalLM", **MPT, attn_config={"qk_ln": True}),
            "attn_config: qk_ln is True",
        ),
        (family("MptForCausalLM", **MPT, no_bias=False), "no_bias is False"),
        (family("MptForCausalLM", **MPT, expansion_ratio=2), "expansion_ratio is 2"),
        (family("Starcoder2ForCausalLM", norm_type="rms_norm"), "norm_type is 'rms_norm'"),
        (family("PhiForCausalLM", tie_word_embeddings=True), "false with a bias on the head"),
        (family("GPTJForCausalLM", rotary_dim=7), "rotary_dim is 7"),
        (family("Cohere2ForCausalLM", sliding_window=None), "sliding_window is missing"),
        (family("SmolLM3ForCausalLM", no_rope_layers=[1, 2]), "2 times 0 or 1"),
        (family("GPTNeoForCausalLM", attention_types=[[["global"], 1]]), "for 2 layers"),
        (family("MixtralForCausalLM", num_experts_per_tok=9), "whole numbers from 1 to 8"),
        (family("Qwen3MoeForCausalLM", num_experts=4, num_experts_per_tok=2), "moe_intermediate"),
        (chatglm(position_encoding_2d=True), "position_encoding_2d is True, allowed: False"),
        (chatglm(rope_ratio=16), "rope_ratio is 16.0, allowed: 1 for ChatGLM2"),
        (chatglm(multi_query_attention=None), "multi_query_attention is missing, allowed: true"),
        (chatglm(quantization_bit=4), "quantization_bit is 4, allowed: 0"),
        (chatglm(rmsnorm=False), "rmsnorm is False"),
        (chatglm(original_rope=False), "original_rope is False"),
        (chatglm(multi_query_group_num=2), "multi_query_group_num is 2, allowed: divisors of 9"),
        (chatglm(kv_channels=None, ffn_hidden_size=None), "intermediate_size is missing"),
        (deepseek(2, norm_topk_prob=True), "norm_topk_prob is True, allowed: False"),
        (deepseek(2, topk_method="noaux_tc"), "topk_method is 'noaux_tc'"),
        (deepseek(2, scoring_func="sigmoid"), "scoring_func is 'sigmoid', allowed: 'softmax'"),
        (deepseek(3, topk_method="greedy"), "topk_method is 'greedy', allowed: 'noaux_tc'"),
        (deepseek(3, attention_bias=True), "attention_bias is True, allowed: False"),
        (deepseek(3, rope_interleave=False), "rope_interleave is False, allowed: True"),
        (deepseek(3, num_key_value_heads=3), "num_key_value_heads is 3, allowed: 9"),
        (deepseek(3, v_head_dim=15), "v_head_dim is 15, allowed: at most 14"),
        (deepseek(3, qk_rope_head_dim=5), "qk_rope_head_dim is 5, allowed: even"),
        (deepseek(3, n_group=8), "n_group is 8, allowed: divisors of 8 experts"),
        (deepseek(3, topk_group=5), "topk_group is 5"),
        (deepseek(3, num_experts_per_tok=5), "num_experts_per_tok is 5.* from 1 to 4"),
        (deepseek(3, moe_layer_freq=2), "moe_layer_freq is 2"),
        (deepseek(3, quantization_config={"quant_method": "fp8"}), "quantization_config is"),
    ],
)
def test_families_refuse_what_they_would_run_wrongly(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        describe(config)


def test_windows_alternate_as_the_config_says() -> None:
    gemma = family("Gemma2ForCausalLM", sliding_window=8, num_hidden_layers=3)
    assert describe(gemma).windows == (8, 0, 8)
    listed = ["full_attention", "full_attention", "sliding_attention"]
    assert describe(gemma | {"layer_types": listed}).windows == (0, 0, 8)
    qwen = family("Qwen2ForCausalLM", sliding_window=8, max_window_layers=1)
    assert describe(qwen).windows == ()
    assert describe(qwen | {"use_sliding_window": True}).windows == (0, 8)


def test_gemma3_reads_the_older_fields_of_its_rotations() -> None:
    released = family(
        "Gemma3ForCausalLM",
        sliding_window=512,
        sliding_window_pattern=6,
        num_hidden_layers=12,
        head_dim=8,
        rope_theta=1_000_000,
        rope_local_base_freq=10_000,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
    )
    spec = describe(released)
    assert spec.rope == RopeSpec(theta=1e6, rotary_dim=8, scaling="linear", factor=8.0)
    assert spec.local_rope == RopeSpec(theta=10000.0, rotary_dim=8)
    assert [index for index, window in enumerate(spec.windows) if not window] == [5, 11]
    assert spec.rope_of(5) is spec.rope and spec.rope_of(4) is spec.local_rope


def test_names_without_the_prefix_of_the_whole_model() -> None:
    spec = describe(family("GPT2LMHeadModel", **GPT2))
    bare = ["wte.weight", "h.0.attn.c_attn.weight", "h.0.attn.bias"]
    names = tensor_names(spec, "safetensors", bare)
    assert names.embedding == "wte.weight" and names.positions == "wpe.weight"
    assert names.layer(1).query == "h.1.attn.c_attn.weight"
    assert "h.0.attn.bias".startswith(names.ignored)
    assert tensor_shapes(spec, "safetensors", bare)["h.1.attn.c_attn.weight"] == (72, 216)
    assert tensor_names(spec, "safetensors").embedding == "transformer.wte.weight"


def test_kinds_of_checkpoint_that_a_family_has_no_names_for() -> None:
    spec = describe(family("BloomForCausalLM"))
    with pytest.raises(ModelError, match="family bloom: gguf checkpoints are not supported"):
        tensor_names(spec, "gguf")


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_a_module(name: str) -> None:
    module = importlib.import_module(f"phalanx.workers.models.{FAMILIES[name].module}")
    assert callable(module.describe) and callable(module.names)
    assert FAMILIES[name].architectures and FAMILIES[name].kinds


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
