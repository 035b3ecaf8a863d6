"""Query and key rows of a GGUF file come out as the checkpoint that it was made from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from phalanx.workers.checkpoint.source import open_checkpoint
from phalanx.workers.models.layout import unpermute_heads
from phalanx.workers.models.registry import describe, tensor_names

UNEVEN = {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 288, "head_dim": 16}


def test_neighbours_become_halves() -> None:
    rows = np.arange(12)  # two heads of six
    expected = [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]
    assert unpermute_heads(rows, 6).tolist() == expected
    matrix = rows[:, None] * np.ones(3, int)
    assert unpermute_heads(matrix, 6)[:, 2].tolist() == expected
    with pytest.raises(ValueError, match="not whole heads"):
        unpermute_heads(rows, 8)


def test_any_run_of_heads_may_be_taken_alone() -> None:
    matrix = np.random.default_rng(0).standard_normal((5 * 8, 3))
    whole = unpermute_heads(matrix, 8)
    np.testing.assert_array_equal(unpermute_heads(matrix[16:32], 8), whole[16:32])


@pytest.mark.parametrize("quantization", ["F32", "Q8_0", "Q4_1"])
def test_agrees_with_transformers_on_the_same_file(
    tiny_gguf: Callable[..., Path], quantization: str
) -> None:
    pytest.importorskip("accelerate", reason="transformers reads GGUF files with accelerate only")
    from transformers import AutoModelForCausalLM, GgufConfig

    path = tiny_gguf(quantization=quantization, **UNEVEN)
    model = AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype="float32",
    )
    expected = {name: value.numpy() for name, value in model.state_dict().items()}
    checkpoint = open_checkpoint(path)
    spec = describe(checkpoint.description.config)
    theirs, ours = tensor_names(spec, "safetensors"), tensor_names(spec, "gguf")
    for index in range(spec.num_layers):
        for role in ("query", "key", "value", "output", "gate", "up", "down", "input_norm"):
            found = checkpoint.read(getattr(ours.layer(index), role)).array
            if role in ("query", "key"):
                found = unpermute_heads(found, spec.head_dim)
            np.testing.assert_array_equal(found, expected[getattr(theirs.layer(index), role)])
    np.testing.assert_array_equal(checkpoint.read(ours.head).array, expected[theirs.head])


def test_restores_the_checkpoint_it_was_made_from(
    tiny_llama: Callable[..., Path], tiny_gguf: Callable[..., Path]
) -> None:
    overrides = {**UNEVEN, "attention_bias": True}
    source, packed = (
        open_checkpoint(tiny_llama(**overrides)),
        open_checkpoint(tiny_gguf(**overrides)),
    )
    spec = describe(packed.description.config)
    theirs, ours = tensor_names(spec, "safetensors").layer(1), tensor_names(spec, "gguf").layer(1)
    for role in ("query", "key", "query_bias", "key_bias"):
        found = unpermute_heads(packed.read(getattr(ours, role)).array, spec.head_dim)
        np.testing.assert_array_equal(found, source.read(getattr(theirs, role)).array)


@pytest.mark.slow
def test_agrees_with_transformers_on_smollm2(smollm2_gguf: Path) -> None:
    pytest.importorskip("accelerate", reason="transformers reads GGUF files with accelerate only")
    from transformers import AutoModelForCausalLM, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        smollm2_gguf.parent,
        gguf_file=smollm2_gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype="float32",
    )
    checkpoint = open_checkpoint(smollm2_gguf)
    for layer in (0, 17, 29):
        for role in ("q", "k"):
            packed = checkpoint.read(f"blk.{layer}.attn_{role}.weight").array
            weight = model.get_submodule(f"model.layers.{layer}.self_attn.{role}_proj").weight
            found = unpermute_heads(packed, 64)
            np.testing.assert_array_equal(found, weight.detach().numpy())
