"""Every family of models, at several tensor-parallel sizes, against `transformers`.

Each model is small and of odd shapes: heads, columns and vocabulary do not divide evenly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from phalanx.kernels.cpu.library import library_path
from phalanx.protos.specs import DecoderSpec
from phalanx.workers.checkpoint.source import open_checkpoint
from phalanx.workers.fused import is_plain
from phalanx.workers.models.families import ARCHITECTURES
from phalanx.workers.models.registry import tensor_names, tensor_shapes
from phalanx.workers.models.verified import (
    CHUNKS,
    EVERYWHERE,
    GGUF,
    HITS,
    LENGTHS,
    ONE_CALL,
    WINDOW,
    records,
)

VOCAB, CONTEXT, NEW_TOKENS = 131, 96, 32
TP_SIZES = (1, 2, 3, 4)
TOLERANCE = 1e-4
WIDE = {"mamba", "mamba-biased"}
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
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 6.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 6.0,
    "original_max_position_embeddings": 16,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1e6, "factor": 4.0}
LOCAL = {"rope_type": "default", "rope_theta": 100.0}
GEMMA3_ROPES = {"full_attention": LINEAR, "sliding_attention": LOCAL}
SLIDING, FULL = "sliding_attention", "full_attention"
OLMO3_ROPES = GEMMA3_ROPES | {"full_attention": YARN}
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
STATES = SIZES | {"hidden_size": 45, "num_hidden_layers": 2, "state_size": 7, "conv_kernel": 3}
LATENT_YARN = YARN | {"mscale": 0.7, "mscale_all_dim": 1.3}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", LLAMA | {"attention_bias": True, "mlp_bias": True}),
    "llama-3": ("LlamaConfig", LLAMA | {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama-linear": ("LlamaConfig", LLAMA | {"rope_parameters": LINEAR}),
    "llama-dynamic": (
        "LlamaConfig",
        LLAMA | {"max_position_embeddings": 16,
                 "rope_parameters": {"rope_type": "dynamic", "factor": 6.0}},
    ),
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
    "chatglm": ("ChatGLMConfig", LLAMA | {"head_dim": 12, "attention_bias": True}),
    "chatglm-long": (
        "ChatGLMConfig",
        LLAMA | {"head_dim": 12, "num_attention_heads": 5, "num_key_value_heads": 1,
                 "attention_bias": True, "rope_parameters": {"rope_theta": 5e5}},
    ),
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
    "cohere2": ("Cohere2Config", LLAMA | {"num_hidden_layers": 3, "sliding_window": 9, "logit_scale": 0.5,
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
    "gpt_oss": ("GptOssConfig", LLAMA | EXPERTS | {
        "num_hidden_layers": 3, "head_dim": 10, "sliding_window": 9, "swiglu_limit": 0.7,
        "rope_parameters": YARN | {"truncate": False}}),
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
    "mamba": ("MambaConfig", STATES | {"time_step_rank": 5}),
    "mamba-biased": ("MambaConfig", STATES | {"use_bias": True, "use_conv_bias": False}),
    "falcon_mamba": ("FalconMambaConfig", STATES | {"mixer_rms_eps": 1e-2}),
    "mamba2": ("Mamba2Config", STATES | {"num_heads": 9, "head_dim": 10, "n_groups": 3}),
    "mamba2-biased": (
        "Mamba2Config",
        STATES | {"num_heads": 15, "head_dim": 6, "n_groups": 1, "use_bias": True,
                  "chunk_size": 8},
    ),
    "deepseek-v3-dense": ("DeepseekV3Config", LATENT | {"first_k_dense_replace": 3}),
}  # fmt: skip


Difference = Callable[..., float]
Make = Callable[..., Any]


@pytest.fixture(scope="session")
def build(random_model: Make) -> Make:
    """`build(name, seed=0)`: the model of that name in `MODELS`."""
    return lambda name, seed=0: random_model(MODELS[name][0], seed=seed, **MODELS[name][1])


def prompts() -> list[list[int]]:
    """Eight of mixed lengths; the fifth and the seventh begin as the first does."""
    longest = [(7 * place * place + 3 * place + 5) % VOCAB for place in range(CONTEXT - NEW_TOKENS)]
    others = [[(11 * place + 3 * size) % VOCAB for place in range(size)] for size in (5, 18, 1)]
    others += [longest[:37], [(5 * place + 2) % VOCAB for place in range(26)]]
    return [longest, *others, longest[:30] + others[0] * 4, others[1][::-1][:11]]


def clear(build: Make, name: str) -> Any:
    """The first draw of weights by which `transformers` itself says varied and certain things."""
    for seed in range(20):
        model = build(name, seed)
        greedy = model.greedy(prompts(), NEW_TOKENS, CONTEXT)
        said = [tuple(tokens) for tokens in greedy.tokens]
        varied = len({*said}) == len(said) and sum(len({*t}) for t in said) >= 4 * len(said)
        if varied and greedy.margin > 4 * TOLERANCE:
            return model
    raise AssertionError(f"no draw of {name} has clear margins")


@pytest.mark.parametrize("tp", TP_SIZES)
@pytest.mark.parametrize("name", MODELS)
def test_every_token_is_that_of_transformers(
    build: Make, served: Make, verify: Make, name: str, tp: int
) -> None:
    """Through the scheduler: chunks, prefix hits and a batch of mixed lengths, in float32."""
    model = clear(build, name)
    expected = model.greedy(prompts(), NEW_TOKENS, CONTEXT)
    found = served(model, prompts(), NEW_TOKENS, tp)
    assert found.tokens == expected.tokens
    for rows, tops in zip(expected.logprobs, found.tops, strict=True):
        for row, top in zip(rows, tops, strict=True):
            assert len(top) == 3
            for item in top:
                assert abs(float(row[item.token_id]) - item.logprob) < TOLERANCE
    once = {ONE_CALL} if library_path() is not None and is_plain(model.spec) else set()
    assert found.features == {CHUNKS, LENGTHS, HITS} | once
    verify(name, model.spec.family, tp, features(model.spec))


def features(spec: DecoderSpec) -> set[str]:
    """What the comparison covers for this model. Contexts cross every length that matters."""
    found = set(EVERYWHERE) | ({ONE_CALL} if is_plain(spec) else set())
    if any(spec.windows):
        assert max(spec.windows) < CONTEXT // 4
        found.add(WINDOW)
    for rope in (spec.rope, spec.local_rope):
        if rope is not None and rope.scaling != "default":
            assert rope.original_max_position < CONTEXT // 4 or rope.scaling == "linear"
            found.add(rope.scaling)
    return found


def test_the_record_is_of_these_models(build: Make) -> None:
    """Else run `make families`."""
    expected = {}
    for name in MODELS:
        spec = build(name).spec
        found = {feature: list(TP_SIZES) for feature in sorted(features(spec))}
        expected[name] = {"family": spec.family, "features": found}
    recorded = {
        name: record for name, record in records().items() if GGUF not in record["features"]
    }
    assert recorded == expected


@pytest.mark.parametrize("name", MODELS)
def test_with_torch_operators_alone(build: Make, difference: Difference, name: str) -> None:
    """Where no kernels can be compiled."""
    assert difference(build(name), 2, kernels="cpu-torch") < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("tp", [5, 6, 7, 8])
@pytest.mark.parametrize("name", MODELS)
def test_at_further_sizes(build: Make, difference: Difference, name: str, tp: int) -> None:
    assert difference(build(name), tp) < TOLERANCE


# transformers rounds Falcon's ALiBi to bfloat16, which shows beyond 256 tokens
LONG_CONTEXTS = {"llama-dynamic": 96, "falcon-rw": 256}
LONGER = ("max_position_embeddings", "n_positions", "max_seq_len")


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_in_long_contexts(random_model: Make, scored: Make, name: str) -> None:
    """Hundreds of tokens, many blocks: the log-probabilities of the likeliest after each."""
    kind, fields = MODELS[name]
    length = LONG_CONTEXTS.get(name, 700)
    longer = {field: length for field in LONGER if fields.get(field) == CONTEXT}
    model = random_model(kind, **fields | longer)
    tokens = [(7 * place * place + 3 * place + 5) % VOCAB for place in range(length)]
    expected = model.logprobs(tokens)[:-1]
    tops = [top for part in scored(model.folder, model.spec, 3, tokens) for top in part.top]
    for row, top in zip(expected, tops, strict=True):
        for item in top:
            assert abs(float(row[item.token_id]) - item.logprob) < 2 * TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", MODELS)
def test_in_half_precision(build: Make, scored: Make, name: str, dtype: str) -> None:
    """Every operation takes the narrow dtypes; the probabilities are those of float32, roughly."""
    if dtype == "float16" and name in WIDE:
        pytest.skip("with random weights, what it multiplies leaves the range of float16")
    model = build(name)
    tokens = [(11 * index * index + index) % VOCAB for index in range(40)]
    tops = [top for part in scored(model.folder, model.spec, 2, tokens, dtype) for top in part.top]
    expected = model.logprobs(tokens)[:-1]
    both = zip(expected, tops, strict=True)
    off = [abs(float(row[item.token_id]) - item.logprob) for row, top in both for item in top]
    assert sum(off) / len(off) < (0.15 if name in WIDE else 0.1)


@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_is_expected_with_its_shape(build: Make, name: str) -> None:
    model = build(name)
    checkpoint = open_checkpoint(model.folder)
    stored = checkpoint.names()
    ignored = tensor_names(model.spec, "safetensors", stored).ignored
    found = {key: checkpoint.shape(key) for key in stored if not key.startswith(ignored)}
    assert tensor_shapes(model.spec, "safetensors", stored) == found


def test_every_architecture_is_compared() -> None:
    import transformers

    # an older name, and what transformers has no class for
    compared = {"MPTForCausalLM", "ChatGLMModel", "ChatGLMForConditionalGeneration"}
    for kind, fields in MODELS.values():
        if kind == "ChatGLMConfig":
            continue
        config = getattr(transformers, kind)(**fields)
        compared.add(transformers.AutoModelForCausalLM._model_mapping[type(config)].__name__)
    assert compared == set(ARCHITECTURES)
