"""What a gpt-oss config means, and what of it is refused."""

from __future__ import annotations

from typing import Any

import pytest

from phalanx.protos.errors import ModelError
from phalanx.protos.shards import weight_bytes, weight_parameters
from phalanx.workers.models.registry import describe, tensor_shapes

YARN = {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 64}
CONFIG: dict[str, Any] = {
    "architectures": ["GptOssForCausalLM"],
    "hidden_size": 72,
    "intermediate_size": 33,
    "num_hidden_layers": 3,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 10,
    "vocab_size": 515,
    "max_position_embeddings": 2048,
    "num_local_experts": 8,
    "sliding_window": 16,
    "rope_scaling": YARN,
}


def test_what_the_config_leaves_out() -> None:
    spec = describe(CONFIG)
    assert spec.attention_sinks and spec.attention_bias and spec.output_bias
    assert spec.windows == (16, 0, 16)
    assert spec.rope is not None and spec.rope.theta == 150000.0
    assert spec.experts is not None
    assert (spec.experts.per_token, spec.experts.limit, spec.experts.biased) == (4, 7.0, True)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"quantization_config": {"quant_method": "mxfp4"}}, "quant_method is 'mxfp4', allowed"),
        ({"swiglu_alpha": 1.5}, "swiglu_alpha is 1.5, allowed: 1.702"),
        ({"swiglu_limit": 0}, "swiglu_limit is 0, allowed: finite numbers above 0"),
        ({"num_experts_per_tok": 9}, "whole numbers from 1 to 8"),
        ({"rope_scaling": None}, "rope_scaling is missing"),
        ({"layer_types": ["sliding_attention"]}, "3 times sliding_attention"),
    ],
)
def test_what_would_be_run_wrongly_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        describe(CONFIG | fields)


def test_all_experts_of_a_layer_are_in_one_tensor_and_counted() -> None:
    spec = describe(CONFIG)
    shapes = tensor_shapes(spec, "safetensors")
    experts = "model.layers.1.mlp.experts."
    assert shapes[experts + "gate_up_proj"] == (8, 72, 66)
    assert shapes[experts + "gate_up_proj_bias"] == (8, 66)
    assert shapes[experts + "down_proj"] == (8, 33, 72)
    assert shapes[experts + "down_proj_bias"] == (8, 72)
    assert shapes["model.layers.1.self_attn.sinks"] == (9,)
    total = 0
    for shape in shapes.values():
        size = 1
        for length in shape:
            size *= length
        total += size
    assert weight_parameters(spec, 1, 0) == total
    # sinks are float32 in any model
    assert weight_bytes(spec, 1, 0, "bfloat16") == 2 * total + 2 * 3 * 9
