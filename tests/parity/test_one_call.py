"""Layers operation by operation, by the compiled kernels too, where they would run in one call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from phalanx.kernels.cpu.library import library_path

if library_path() is None:
    pytest.skip("the package was installed without a compiler", allow_module_level=True)

SIZES = {"vocab_size": 131, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LLAMA = SIZES | {"hidden_size": 48, "intermediate_size": 77, "num_hidden_layers": 2}
LLAMA |= {"num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 96}
MODELS: dict[str, dict[str, Any]] = {
    "GPT2Config": SIZES | {"n_embd": 55, "n_layer": 2, "n_head": 5, "n_positions": 96},
    "Olmo2Config": LLAMA,
    "Gemma3TextConfig": LLAMA | {"head_dim": 10, "sliding_window": 7, "sliding_window_pattern": 2},
    "StableLmConfig": LLAMA | {"use_parallel_residual": True},
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("together", [True, False])
def test_both_ways_say_what_transformers_says(
    random_model: Callable[..., Any],
    difference: Callable[..., float],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    together: bool,
) -> None:
    if not together:
        monkeypatch.setattr("phalanx.workers.fused.is_plain", lambda model: False)
    assert difference(random_model(name, **MODELS[name]), 3) < 1e-4
