"""Ranks driven by plans, against `transformers` on the same weights."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from phalanx.controller.model import resolve_model
from phalanx.kernels.select import select_backend
from phalanx.protos.sampling import SamplingParams
from phalanx.protos.specs import CacheSpec, WorkerSpec
from phalanx.protos.steps import NewSequence, Row, StepPlan
from phalanx.workers.engine import Engine
from phalanx.workers.parallel import SingleRank, TensorParallel, ThreadRank


def on_all_ranks(engines: list[Engine], work: Callable[[Engine], Any]) -> list[Any]:
    results: list[Any] = [None] * len(engines)

    def run(rank: int) -> None:
        results[rank] = work(engines[rank])

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(engines))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def start(folder: Path, tp: int) -> list[Engine]:
    model = resolve_model(str(folder))
    spec = WorkerSpec(
        checkpoint=model.checkpoint,
        model=model.spec,
        dtype="float32",
        tp_size=tp,
        cache=CacheSpec(block_size=4, num_blocks=64, dtype="float32"),
        max_tokens_per_step=64,
        max_running=8,
        eos_token_ids=model.eos_token_ids,
        device="cpu",
    )
    groups: list[TensorParallel] = [SingleRank()] if tp == 1 else list(ThreadRank.group(tp))
    engines = [Engine(spec, group, select_backend("cpu")[0]) for group in groups]
    assert all(on_all_ranks(engines, lambda engine: engine.load()))
    return engines


@pytest.mark.parametrize("tp", [1, 2, 3, 4, 5, 7])
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {
            "hidden_size": 72,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "tie_word_embeddings": True,
        },
        {"attention_bias": True, "mlp_bias": True, "vocab_size": 509},
    ],
    ids=["gqa", "tied-9-3", "biased"],
)
def test_greedy_tokens_equal_transformers_at_every_tp_size(
    tiny_llama: Callable[..., Path], shape: dict[str, Any], tp: int
) -> None:
    """Two prompts in one batch, chunked oddly, with scattered blocks."""
    from transformers import AutoModelForCausalLM

    folder = tiny_llama(**shape)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompts = [[5, 17, 300, 44, 9, 9, 81], [400, 3, 77]]
    new_tokens = 12
    engines = start(folder, tp)
    params = SamplingParams(temperature=0.0, max_tokens=new_tokens)
    blocks = {0: [9, 3, 30, 1, 62, 7], 1: [40, 2, 5, 11, 12]}
    chunks = {0: [3, 4], 1: [1, 1, 1]}
    outputs: dict[int, list[int]] = {0: [], 1: []}
    for step in range(new_tokens + 3):
        new = [NewSequence(seq, prompts[seq], len(prompts[seq]), 0, params) for seq in (0, 1)]
        rows = []
        for seq in (0, 1):
            count = chunks[seq].pop(0) if chunks[seq] else 1
            rows.append(Row(seq, count, blocks[seq] if step == 0 else []))
        plan = StepPlan(0, step, [], new if step == 0 else [], [], rows)
        results = on_all_ranks(engines, lambda engine, plan=plan: engine.step(plan))
        assert all(result.sampled == results[0].sampled for result in results)
        for token in results[0].sampled:
            outputs[token.seq].append(token.token_id)
    for seq, prompt in enumerate(prompts):
        expected = reference.generate(
            torch.tensor([prompt]),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=None,
        )[0, len(prompt) :]
        assert outputs[seq][:new_tokens] == expected.tolist()
