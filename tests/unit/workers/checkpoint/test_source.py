"""Opening a checkpoint of either kind, and refusing everything else by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from phalanx.protos.errors import ModelError
from phalanx.workers.checkpoint.description import describe_gguf
from phalanx.workers.checkpoint.gguf import GgufFile
from phalanx.workers.checkpoint.source import open_checkpoint
from phalanx.workers.models.registry import describe, tensor_shapes


@pytest.mark.parametrize("name", ["gone", "gone.gguf", "weights.bin", "weights.pt", "weights.pth"])
def test_refuses_by_name_and_says_what_is_allowed(tmp_path: Path, name: str) -> None:
    if name.startswith("weights"):
        (tmp_path / name).write_bytes(b"\x80\x02")
    with pytest.raises(ModelError) as caught:
        open_checkpoint(tmp_path / name)
    text = str(caught.value)
    assert name in text and ".gguf file" in text and "smollm2" in text and "config.json" in text
    assert str(tmp_path) not in text


def test_refuses_folders_without_safetensors(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="holds no checkpoint"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02")
    with pytest.raises(ModelError, match="only pickled weights, which are refused"):
        open_checkpoint(tmp_path)


def test_unknown_tensors_are_named(tiny_gguf: Callable[..., Path]) -> None:
    with pytest.raises(ModelError, match="lacks tensor 'nope'"):
        open_checkpoint(tiny_gguf()).read("nope")


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
        {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 72},
        {"hidden_size": 96, "head_dim": 16, "rope_parameters": {"rope_theta": 5e5}},
    ],
)
def test_both_kinds_describe_the_same_model(
    tiny_llama: Callable[..., Path], tiny_gguf: Callable[..., Path], overrides: dict[str, object]
) -> None:
    folder, file = open_checkpoint(tiny_llama(**overrides)), open_checkpoint(tiny_gguf(**overrides))
    spec = describe(folder.description.config)
    assert describe(file.description.config) == spec
    for checkpoint in (folder, file):
        wanted = tensor_shapes(spec, checkpoint.kind)
        assert {name: checkpoint.shape(name) for name in checkpoint.names()} == wanted
        assert {checkpoint.dtype(name) for name in wanted} == {"float32"}


def test_llama3_scaling_is_read_from_the_frequency_factors(
    tmp_path: Path, tiny_gguf: Callable[..., Path]
) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = LlamaConfig(head_dim=64, rope_parameters=rope, max_position_embeddings=131072)
    scaled = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")[0].numpy()
    plain = 500000.0 ** (-np.arange(0, 64, 2) / 64)
    file = GgufFile(tiny_gguf(head_dim=64, rope_parameters={"rope_theta": 500000.0}))
    file.read = lambda name: (plain / scaled).astype(np.float32)  # type: ignore[method-assign]
    file.tensors["rope_freqs.weight"] = file.tensors["output_norm.weight"]
    spec = describe(describe_gguf(file).config)
    assert (spec.rope.scaling, spec.rope.original_max_position) == ("llama3", 8192)
    assert spec.rope.factor == pytest.approx(32.0)
    file.read = lambda name: np.linspace(1, 9, 32, dtype=np.float32)  # type: ignore[method-assign]
    with pytest.raises(ModelError, match="rope_freqs.weight"):
        describe_gguf(file)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("general.architecture", "lama", "'lama', nearest supported: llama"),
        ("general.architecture", None, "general.architecture is None"),
        ("llama.block_count", None, "llama.block_count is missing"),
        ("llama.block_count", "2", "a whole number"),
        ("llama.embedding_length", True, "a whole number"),
        ("llama.attention.head_count_kv", np.array([1, 2]), "a whole number"),
        ("llama.attention.layer_norm_rms_epsilon", float("nan"), "a finite number"),
        ("llama.rope.dimension_count", 4, "supported is only the head size, 8"),
        ("llama.attention.value_length", 4, "supported is only the head size, 8"),
        ("llama.expert_count", 8, "mixtures of experts"),
        ("llama.vocab_size", 7, "the embedding has 515 rows"),
    ],
)
def test_refuses_wrong_gguf_metadata(
    tiny_gguf: Callable[..., Path], key: str, value: object, message: str
) -> None:
    file = GgufFile(tiny_gguf())
    file.metadata[key] = value
    with pytest.raises(ModelError, match=message):
        describe_gguf(file)


YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        ({"rope.scaling.factor": 4.0}, "linear"),
        (YARN | {"rope.scaling.original_context_length": 64}, "yarn"),
    ],
)
def test_rope_scaling_of_gguf(
    tiny_gguf: Callable[..., Path], scaling: dict[str, object], expected: str
) -> None:
    file = GgufFile(tiny_gguf())
    file.metadata |= {f"llama.{key}": value for key, value in scaling.items()}
    rope = describe(describe_gguf(file).config).rope
    assert rope is not None and (rope.scaling, rope.factor) == (expected, 4.0)


@pytest.mark.parametrize(
    ("scaling", "message"),
    [(YARN, "original_context_length is missing"), ({"rope.scaling.type": "su"}, "'su', allowed")],
)
def test_refuses_rope_scaling_of_gguf(
    tiny_gguf: Callable[..., Path], scaling: dict[str, object], message: str
) -> None:
    file = GgufFile(tiny_gguf())
    file.metadata |= {f"llama.{key}": value for key, value in scaling.items()}
    with pytest.raises(ModelError, match=message):
        describe(describe_gguf(file).config)
