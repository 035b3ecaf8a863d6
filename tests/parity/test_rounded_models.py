"""Models in few bits, weights and KV cache, against the same models in float32."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from phalanx.controller.model import resolve_model

TEXT = """The harbour was built in the seventeenth century, when the town lived from herring and salt.
Today most of its income comes from visitors, who arrive by train in the summer and leave when the
first storms of October close the ferry line. The old warehouses along the quay have become
restaurants, a small museum and, since last year, a school for carpenters who repair wooden boats.
Water boils at a lower temperature in the mountains, because the pressure of the air is lower
there. Cooks who move from the coast to the Alps learn this on the first day: potatoes take longer,
and an egg that is boiled for four minutes is still liquid inside. A sealed pot solves the problem,
since it keeps the steam in and raises the pressure again."""
TOKENS = [(7 * i * i + 3 * i + 5) % 131 for i in range(64)]
Logprobs = Callable[..., tuple[list[float], list[int]]]
FAMILIES: dict[str, dict[str, Any]] = {
    "LlamaConfig": {
        "hidden_size": 96,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 18,
        "intermediate_size": 150,
    },
    "GPT2Config": {"n_embd": 90, "n_head": 6, "n_layer": 2, "n_positions": 128},
    "MixtralConfig": {
        "hidden_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "num_local_experts": 4,
    },
    "DeepseekV3Config": {
        "hidden_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "q_lora_rank": 48,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "intermediate_size": 128,
        "first_k_dense_replace": 2,
    },
}


@pytest.fixture(scope="session")
def logprobs(scored: Callable[..., Any]) -> Logprobs:
    """Of each token after the first, its log-probability, and the token that was likeliest there:
    `logprobs(checkpoint, spec, tp, tokens, dtype, kv_dtype, kernels)`."""

    def run(
        *what: Any, dtype: str, kv_dtype: str, kernels: str | None = None
    ) -> tuple[list[float], list[int]]:
        parts = scored(*what, dtype, kernels, kv_dtype)
        found = [token.logprob for part in parts for token in part.tokens]
        return found, [top[0].token_id for part in parts for top in part.top]

    return run


def agreement(first: list[int], second: list[int]) -> float:
    return sum(a == b for a, b in zip(first, second, strict=True)) / len(first)


SMOLLM2 = {
    ("bfloat16", "int8"): (1.01, 0.95),
    ("bfloat16", "fp8"): (1.02, 0.9),
    ("int8", "bfloat16"): (1.08, 0.82),
    ("fp8", "bfloat16"): (1.08, 0.82),
    ("int4", "bfloat16"): (1.6, 0.5),
}
"""By (weights, cache): the most that perplexity grows, the fewest likeliest tokens that agree."""


def test_smollm2_keeps_its_perplexity(smollm2_gguf: Path, logprobs: Logprobs) -> None:
    model = resolve_model("smollm2")
    tokens = model.tokenizer.encode(TEXT).ids
    assert len(tokens) > 150
    found = {
        pair: logprobs(model.checkpoint, model.spec, 1, tokens, dtype=pair[0], kv_dtype=pair[1])
        for pair in (("bfloat16", "bfloat16"), ("int8", "bfloat16"), ("bfloat16", "int8"))
    } | {
        pair: logprobs(
            model.checkpoint, model.spec, 2, tokens, dtype=pair[0], kv_dtype=pair[1],
            kernels="reference",
        )
        for pair in (("fp8", "bfloat16"), ("bfloat16", "fp8"), ("int4", "bfloat16"))
    }  # fmt: skip
    exact, exact_best = found.pop(("bfloat16", "bfloat16"))
    for pair, (values, best) in found.items():
        ratio = math.exp((sum(exact) - sum(values)) / len(values))
        most, least = SMOLLM2[pair]
        print(pair, ratio, agreement(best, exact_best))
        assert ratio < most, pair
        assert agreement(best, exact_best) > least, pair
        assert values != exact  # it was rounded


KERNELS = {"int8": ("cpu-native", "cpu-torch", "reference")}
LIMITS = {"int8": (0.35, 0.6), "fp8": (0.5, 0.5), "int4": (0.9, 0.2)}
"""Of the error, in deviations of the log-probabilities; of the likeliest tokens that agree."""


@pytest.mark.parametrize(("dtype", "tp"), [("int8", 1), ("int8", 2), ("fp8", 3), ("int4", 3)])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_of_layer_on_every_backend(
    family: str,
    dtype: str,
    tp: int,
    random_model: Callable[..., Any],
    logprobs: Logprobs,
    one_thread: None,
) -> None:
    """Weights are random here, and rounding disturbs them more than it does a trained model."""
    common = {} if family == "GPT2Config" else {"num_hidden_layers": 2}
    made = random_model(family, vocab_size=131, **common, **FAMILIES[family])
    rows = made.logprobs(TOKENS)[:-1]
    exact = rows.gather(1, torch.tensor(TOKENS[1:])[:, None])[:, 0]
    most, least = LIMITS[dtype]
    for kernels in KERNELS.get(dtype, ("reference",)):
        run = partial(
            logprobs, made.folder, made.spec, tp, TOKENS, dtype=dtype, kernels=kernels,
            kv_dtype="fp8" if dtype == "fp8" else "int8",
        )  # fmt: skip
        values, best = run()
        error = (torch.tensor(values, dtype=torch.float64) - exact).square().mean().sqrt()
        agreed = agreement(best, rows.argmax(-1).tolist())
        assert 1e-4 < float(error) < most * float(exact.std())
        assert agreed > least
        assert run() == (values, best)
