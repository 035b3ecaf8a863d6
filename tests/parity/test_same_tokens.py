"""A request's tokens do not depend on its batch mates, on chunks or on the number of ranks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from phalanx.controller.model import resolve_model
from phalanx.kernels.select import select_backend
from phalanx.protos.sampling import SamplingParams
from phalanx.protos.specs import CacheSpec, WorkerSpec
from phalanx.protos.steps import NewSequence, Row, StepPlan
from phalanx.workers.engine import Engine
from phalanx.workers.parallel import SingleRank, ThreadRank

BLOCK_SIZE = 4
NEW_TOKENS = 16


class Wanted(NamedTuple):
    """One sequence to generate."""

    prompt: list[int]
    params: SamplingParams
    sample_index: int = 0


def mixed_requests() -> list[Wanted]:
    """32 requests; every kind of filter, penalty and bias, alone and together."""
    kinds: list[dict[str, Any]] = [
        {},
        {"temperature": 0.0},
        {"temperature": 0.7, "top_k": 1},
        {"temperature": 1.3, "top_k": 40},
        {"top_p": 0.8},
        {"temperature": 3.0, "top_p": 0.97},
        {"min_p": 0.05},
        {"top_k": 30, "top_p": 0.9, "min_p": 0.02},
        {"repetition_penalty": 1.3},
        {"presence_penalty": 1.5, "frequency_penalty": 0.7},
        {"frequency_penalty": -0.5, "top_p": 0.9},
        {"logit_bias": {7: 6.0, 300: 6.0, 511: -100.0}},
        {"temperature": 0.0, "logit_bias": {9: 3.0}, "repetition_penalty": 1.2},
        {"no_repeat_ngram_size": 2, "bad_words_ids": ((5,), (17, 300)), "top_k": 20},
        {"min_tokens": 12, "stop_token_ids": (3, 4, 5), "logprobs": 3},
        {"temperature": 2.0, "top_k": 100, "logprobs": 0, "presence_penalty": 0.5},
    ]
    requests = []
    for index, kind in enumerate(kinds + kinds[3:11]):
        prompt = [(37 * index + 11 * place) % 500 for place in range(1 + index % 9)]
        params = SamplingParams(**({"seed": 1000 + index} | kind))
        requests.append(Wanted(prompt, params))
    several = SamplingParams(seed=5, temperature=1.1, top_p=0.95, n=8)
    return requests + [Wanted([5, 17, 300], several, index) for index in range(8)]


class Group:
    """Ranks of one model on threads, driven plan by plan."""

    def __init__(self, name: str, tp_size: int) -> None:
        model = resolve_model(name)
        spec = WorkerSpec(
            checkpoint=model.checkpoint,
            model=model.spec,
            dtype="float32",
            tp_size=tp_size,
            cache=CacheSpec(block_size=BLOCK_SIZE, num_blocks=300, dtype="float32"),
            max_tokens_per_step=256,
            max_running=32,
            eos_token_ids=model.eos_token_ids,
            device="cpu",
        )
        ranks: Sequence[Any] = [SingleRank()] if tp_size == 1 else ThreadRank.group(tp_size)
        self._engines = [Engine(spec, rank, select_backend("cpu")[0]) for rank in ranks]
        for engine in self._engines:
            engine.load()
        self._step = self._next = 0
        self._old: list[int] = []

    def _execute(self, plan: StepPlan) -> Any:
        results: list[Any] = [None] * len(self._engines)

        def run(rank: int) -> None:
            results[rank] = self._engines[rank].step(plan)

        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(results))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(result.sampled == results[0].sampled for result in results)
        assert not results[0].failures
        return results[0]

    def generate(self, requests: Sequence[Wanted], chunk: int = 256) -> list[list[int]]:
        """Tokens of each, all in one batch, prompts computed `chunk` tokens a step."""
        first, used = self._next, 0
        new, blocks, left = [], [], []
        for offset, (prompt, params, sample_index) in enumerate(requests):
            new.append(NewSequence(first + offset, prompt, len(prompt), 0, params, sample_index))
            count = -(-(len(prompt) + NEW_TOKENS) // BLOCK_SIZE)
            blocks.append(list(range(used, used + count)))
            used += count
            left.append(len(prompt))
        outputs: list[list[int]] = [[] for _ in requests]
        while any(len(output) < NEW_TOKENS for output in outputs):
            rows = []
            for offset in range(len(requests)):
                if len(outputs[offset]) == NEW_TOKENS:
                    continue
                count = min(left[offset], chunk) or 1
                left[offset] = max(left[offset] - count, 0)
                rows.append(Row(first + offset, count, blocks[offset]))
                blocks[offset] = []
            result = self._execute(StepPlan(0, self._step, self._old, new, [], rows))
            self._step, self._old, new = self._step + 1, [], []
            for token in result.sampled:
                outputs[token.seq - first].append(token.token_id)
        self._next += len(requests)
        self._old = list(range(first, self._next))
        return outputs


@pytest.mark.parametrize("name", ["tiny", pytest.param("smollm2", marks=pytest.mark.slow)])
def test_alone_in_a_batch_and_at_every_tp_size(
    name: str, tiny_llama: Callable[..., Path], request: pytest.FixtureRequest
) -> None:
    if name == "tiny":
        name = str(tiny_llama())
    else:
        request.getfixturevalue("smollm2_gguf")
    requests = mixed_requests()
    assert len(requests) == 32
    one = Group(name, 1)
    together = one.generate(requests)
    assert [one.generate([wanted])[0] for wanted in requests] == together
    assert one.generate(requests[::-1], chunk=2)[::-1] == together
    for tp_size in (2, 3):
        group = Group(name, tp_size)
        assert group.generate(requests, chunk=3) == together
        assert group.generate(requests[5:6] + requests[-1:]) == [together[5], together[-1]]
    samples = together[-8:]
    assert len({tuple(sample) for sample in samples}) == 8, "samples of one request must differ"
    assert len({tuple(output) for output in together}) > 28


def test_another_seed_gives_other_tokens(tiny_llama: Callable[..., Path]) -> None:
    group = Group(str(tiny_llama()), 1)
    outputs = group.generate([Wanted([5, 17], SamplingParams(seed=seed)) for seed in range(32)])
    assert len({tuple(output) for output in outputs}) == 32
