"""What a checkpoint says of its model, in the words of Hugging Face's config.json."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from phalanx.protos.errors import ModelError

from .gguf import GgufFile
from .slices import Array

GGUF_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
}
_FULL_EVERY = {"gemma2": 2, "gemma3": 6}  # so many layers, one sees everything
_LARGEST = {"gemma2": 46, "gemma3": 62}  # layers of the 27B, which scales its scores otherwise
_CAPS = {"gemma2": (50.0, 30.0), "gemma3": (0.0, 0.0)}  # of scores, of logits
_SIZES = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "context_length": "max_position_embeddings",
}
# The one set of numbers that Llama 3.1 to 3.3 were released with, beside the factor.
_LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@dataclass(frozen=True)
class ModelDescription:
    """`config` in Hugging Face's terms; `file` is the base name of what it was read from."""

    file: str
    config: Mapping[str, object]


def describe_gguf(file: GgufFile) -> ModelDescription:
    """Metadata and tensor table of a GGUF file as a Hugging Face config."""
    fields = _Fields(file)
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ModelError(f"{file.file}: lacks a two-dimensional tensor 'token_embd.weight'")
    vocab = fields.integer("vocab_size", embedding.shape[0])
    if vocab != embedding.shape[0]:
        raise ModelError(
            f"{file.file}: {fields.prefix}.vocab_size is {vocab}, the embedding has "
            f"{embedding.shape[0]} rows"
        )
    config: dict[str, object] = {name: fields.integer(key) for key, name in _SIZES.items()}
    heads = fields.integer("attention.head_count")
    head_dim = fields.integer(
        "attention.key_length", fields.integer("embedding_length") // max(heads, 1)
    )
    for key in ("attention.value_length", "rope.dimension_count"):
        if fields.integer(key, head_dim) != head_dim:
            raise ModelError(
                f"{file.file}: {fields.prefix}.{key} is {fields.integer(key)}, supported is "
                f"only the head size, {head_dim}"
            )
    if fields.integer("expert_count", 0):
        raise ModelError(f"{file.file}: mixtures of experts are not supported")
    theta = fields.number("rope.freq_base", 10000.0)
    config |= {
        "architectures": [GGUF_ARCHITECTURES[fields.prefix]],
        "num_key_value_heads": fields.integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rms_norm_eps": fields.number("attention.layer_norm_rms_epsilon"),
        "vocab_size": vocab,
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "attention_output_bias": "blk.0.attn_output.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
        "rope_parameters": {"rope_theta": theta, **_scaling(file, fields, theta, head_dim)},
    }
    if fields.prefix.startswith("gemma"):
        config |= {"hidden_act": None, "hidden_activation": "gelu_pytorch_tanh"}
    if fields.prefix in _FULL_EVERY:
        config |= _sliding_gemma(fields, config, head_dim)
    return ModelDescription(file.file, config)


def _sliding_gemma(fields: _Fields, config: dict[str, object], head_dim: int) -> dict[str, object]:
    """What llama.cpp knows of Gemma 2 and 3 without being told by the file."""
    name = fields.prefix
    largest = config["num_hidden_layers"] == _LARGEST[name]
    scalar = fields.integer("embedding_length") // fields.integer("attention.head_count")
    scores, logits = _CAPS[name]
    ropes: object = config["rope_parameters"]
    if name == "gemma3":
        local = fields.number("rope.freq_base_swa", 10000.0)
        ropes = {
            "full_attention": ropes,
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        }
    period = fields.integer("attention.sliding_window_pattern", _FULL_EVERY[name])
    return {
        "sliding_window": fields.integer("attention.sliding_window"),
        "sliding_window_pattern": period,
        "query_pre_attn_scalar": scalar if largest else head_dim,
        "attn_logit_softcapping": fields.number("attn_logit_softcapping", scores) or None,
        "final_logit_softcapping": fields.number("final_logit_softcapping", logits) or None,
        "rope_parameters": ropes,
    }


class _Fields:
    """Typed access to the keys of the file's architecture."""

    def __init__(self, file: GgufFile) -> None:
        self._file = file
        name = file.metadata.get("general.architecture")
        if not isinstance(name, str) or name not in GGUF_ARCHITECTURES:
            near = difflib.get_close_matches(str(name), GGUF_ARCHITECTURES, 3, 0.0)
            raise ModelError(
                f"{file.file}: general.architecture is {name!r:.80}, nearest supported: "
                f"{', '.join(near)}"
            )
        self.prefix = name

    def _get(self, key: str) -> object:
        return self._file.metadata.get(f"{self.prefix}.{key}")

    def integer(self, key: str, default: int | None = None) -> int:
        value = self._get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise self._wrong(key, value, "a whole number")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number; float32 values in their shortest decimal form (1e-05)."""
        value = self._get(key)
        if value is None and default is not None:
            return default
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not math.isfinite(value)
        ):
            raise self._wrong(key, value, "a finite number")
        with np.errstate(over="ignore"):
            short = float(str(np.float32(value)))
        return short if math.isfinite(short) else float(value)

    def text(self, key: str) -> str | None:
        value = self._get(key)
        if value is not None and not isinstance(value, str):
            raise self._wrong(key, value, "a text")
        return value

    def _wrong(self, key: str, value: object, needed: str) -> ModelError:
        shown = "missing" if value is None else f"{value!r:.80}"
        return ModelError(f"{self._file.file}: {self.prefix}.{key} is {shown}, needed is {needed}")


def _scaling(file: GgufFile, fields: _Fields, theta: float, head_dim: int) -> dict[str, object]:
    """The rope rule: named in the metadata, or given as a tensor of frequency factors."""
    factor = fields.number("rope.scaling.factor", fields.number("rope.scale_linear", 1.0))
    rule = fields.text("rope.scaling.type") or ("none" if factor == 1.0 else "linear")
    if "rope_freqs.weight" not in file.tensors:
        if rule == "none":
            return {"rope_type": "default"}
        if rule == "yarn":
            original = fields.integer("rope.scaling.original_context_length")
            return {
                "rope_type": rule,
                "factor": factor,
                "original_max_position_embeddings": original,
            }
        return {"rope_type": rule, "factor": factor}
    factors = file.read("rope_freqs.weight")
    if rule != "none" or factors.shape != (head_dim // 2,) or factors.dtype != np.float32:
        raise ModelError(
            f"{file.file}: tensor 'rope_freqs.weight' of shape {factors.shape} with rope scaling "
            f"{rule!r} is not supported; needed are {head_dim // 2} F32 factors and no scaling"
        )
    return _llama3(file.file, factors, theta, head_dim)


def _llama3(file: str, factors: Array, theta: float, head_dim: int) -> dict[str, object]:
    factor = float(factors.max())
    if not math.isfinite(factor) or factor < 1:
        raise ModelError(f"{file}: tensor 'rope_freqs.weight' is not a llama3 scaling")
    turns = 8192 * theta ** (-np.arange(0, head_dim, 2) / head_dim) / (2 * math.pi)
    smooth = np.clip((turns - 1.0) / (4.0 - 1.0), 0.0, 1.0)
    if not np.allclose(factors, 1 / ((1 - smooth) / factor + smooth), rtol=1e-3):
        raise ModelError(
            f"{file}: tensor 'rope_freqs.weight' is not the llama3 scaling of factor {factor:g} "
            "over 8192 positions, the only one supported"
        )
    return {"rope_type": "llama3", "factor": factor, **_LLAMA3}
