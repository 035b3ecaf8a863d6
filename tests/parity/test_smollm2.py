"""The demo model through scheduler, step loop and ranks, against `transformers`, in float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from phalanx.protos.sampling import SamplingParams

NEW_TOKENS = 64
SHARED = "You are a careful assistant. Answer in short, plain sentences and give reasons.\n\n"
TOPICS = [
    "Why is the sky blue?",
    "def fibonacci(n):",
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "1, 1, 2, 3, 5, 8,",
    "Translate to German: The house is old.",
    "A list of the planets, from the Sun:",
    "SELECT name FROM users WHERE",
    "The recipe needs two eggs,",
    "Water boils at",
    "In 1969, the first people",
    "import numpy as np\n",
    "Dear Sir or Madam,",
    "The opposite of hot is",
    "Photosynthesis is the process by which",
    "Roses are red,",
    "To be, or not to be,",
    "The three laws of motion say",
    "Ça va? Très bien,",
    "東京は",
]


def prompts() -> list[str]:
    """40 texts: half alone, half behind a long shared beginning; two of them long."""
    texts = TOPICS + [SHARED + topic for topic in TOPICS]
    texts[5] = "The river ran past the mill and on to the town. " * 30 + texts[5]
    texts[25] = SHARED * 12 + texts[5]
    return texts


class Judge:
    """What `transformers` would have generated greedily, found with one pass per answer.

    If every token of an answer is the argmax after the tokens before it, then greedy generation
    gives this answer: by induction over its tokens.
    """

    def __init__(self, gguf: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self._model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32
        )
        self._known: dict[tuple[int, ...], list[int]] = {}

    def greedy(self, prompt: list[int], answer: list[int]) -> list[int]:
        """The greedy tokens after `prompt`, as far as they agree with `answer`, and one more."""
        import torch

        key = tuple(prompt)
        if key not in self._known:
            with torch.no_grad():
                logits = self._model(torch.tensor([prompt + answer])).logits[0]
            best = logits[len(prompt) - 1 : -1].argmax(-1).tolist()
            wrong = [i for i, pair in enumerate(zip(best, answer, strict=True)) if len({*pair}) > 1]
            self._known[key] = best[: wrong[0] + 1] if wrong else best
        return self._known[key]


@pytest.fixture(scope="module")
def judge(smollm2_gguf: Path) -> Judge:
    """The model in `transformers`, with the same weights."""
    return Judge(smollm2_gguf)


def tokenised() -> list[list[int]]:
    """The prompts as tokens."""
    from phalanx.controller.model import resolve_model

    tokenizer = resolve_model("smollm2").tokenizer
    return [tokenizer.encode(text).ids for text in prompts()]


GREEDY = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True)


@pytest.mark.parametrize("tp", [1, 2, 3])
def test_a_full_batch_under_pressure_gives_the_tokens_of_transformers(
    local_replica: Callable[..., Any], judge: Judge, tp: int
) -> None:
    """32 run at a time, prompts come in chunks, prefixes are shared, and blocks run out."""
    run = local_replica(
        "smollm2",
        tp=tp,
        num_blocks=140,
        max_tokens_per_step=96,
        max_running=32,
        reserve_tokens=0,  # nothing is kept back for running ones: they must take from each other
    )
    asked = tokenised()
    for prompt, output in zip(asked, run.tokens([(p, GREEDY) for p in asked]), strict=True):
        assert len(output) == NEW_TOKENS
        assert output == judge.greedy(prompt, output)
    stats = run.scheduler.stats()
    assert stats.preemptions > 0
    assert stats.prefix_hit > 0
    assert stats.blocks_free == stats.blocks_total
    run.scheduler.check_integrity()


@pytest.mark.parametrize("tp", [1, 2, 3])
def test_requests_alone_give_the_tokens_of_transformers(
    local_replica: Callable[..., Any], judge: Judge, tp: int
) -> None:
    run = local_replica("smollm2", tp=tp)
    for prompt in tokenised()[1:26:8]:
        [output] = run.tokens([(prompt, GREEDY)])
        assert len(output) == NEW_TOKENS
        assert output == judge.greedy(prompt, output)


@pytest.mark.slow
@pytest.mark.parametrize("tp", [1, 2, 3])
def test_each_of_40_requests_alone(
    local_replica: Callable[..., Any], judge: Judge, tp: int
) -> None:
    run = local_replica("smollm2", tp=tp)
    for prompt in tokenised():
        [output] = run.tokens([(prompt, GREEDY)])
        assert output == judge.greedy(prompt, output)
