"""SmolLM2 in bfloat16 against `transformers` in float32, position by position."""

from __future__ import annotations

import heapq
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from phalanx.controller.model import ServedModel, resolve_model
from phalanx.kernels.cpu.native_backend import NativeBackend
from phalanx.kernels.interface import KernelBackend
from phalanx.protos.sampling import SamplingParams
from phalanx.protos.specs import CacheSpec, WorkerSpec
from phalanx.protos.steps import NewSequence, Row, StepPlan
from phalanx.workers.engine import Engine
from phalanx.workers.parallel import SingleRank

BLOCK_SIZE = 16
TEXTS = [
    (
        "The old bridge had been closed for years, but on market days the farmers still led their "
        "animals across it, because the new road was longer and the ferry cost more than the milk "
        "would bring. Nobody had fallen so far, and the council preferred not to ask."
    ),
    (
        "Photosynthesis turns light, water and carbon dioxide into sugar and oxygen. In plants it "
        "takes place in the chloroplasts, where chlorophyll absorbs mostly red and blue light and "
        "reflects the green that we see."
    ),
    (
        "def merge(left, right):\n    result = []\n    i = j = 0\n    while i < len(left) and j < "
        "len(right):\n        if left[i] <= right[j]:\n            result.append(left[i])\n"
        "            i += 1\n        else:\n            result.append(right[j])\n            j += 1\n"
        "    return result + left[i:] + right[j:]\n"
    ),
    (
        "SELECT customers.name, SUM(orders.total) AS spent FROM orders JOIN customers ON "
        "customers.id = orders.customer_id WHERE orders.placed >= '2021-01-01' GROUP BY "
        "customers.name HAVING SUM(orders.total) > 100 ORDER BY spent DESC LIMIT 10;"
    ),
    "1, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233, 377, 610, 987",
    (
        "Ingredients: 250 g of flour, two eggs, half a litre of milk, a pinch of salt. Beat the eggs, "
        "add the milk and then the flour, let it rest for twenty minutes, and fry thin pancakes in "
        "butter over a medium heat."
    ),
    (
        "Der Zug nach München hat heute etwa zwanzig Minuten Verspätung. Wir bitten um Ihr "
        "Verständnis. Le train pour Paris est annoncé à l'heure, voie trois."
    ),
    (
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
        "The capital of France is Paris.<|im_end|>\n"
    ),
    (
        "# Release notes\n\n## 2.1\n\n- Faster start\n- The option `--port` takes a name as well\n"
        "- Fixed: a crash when the file is empty\n\n## 2.0\n\n- New configuration format\n"
    ),
    (
        "In 1969 two astronauts walked on the Moon while a third stayed in orbit. They left a mirror "
        "that is still used today to measure the distance from the Earth, about 384,000 kilometres."
    ),
    (
        '{"name": "sensor-7", "unit": "celsius", "values": [20.5, 20.7, 21.0, 20.9], "active": true, '
        '"location": {"floor": 2, "room": "laboratory"}}'
    ),
    (
        "To whom it may concern,\n\nI am writing to complain about the washing machine that I bought "
        "from you last month. It leaks, it is loud, and nobody answers the telephone.\n"
    ),
    *textwrap.wrap(str(heapq.__about__), 900)[:3],
]


class Predicted(NamedTuple):
    """Of every position: the best next token, and the log-probability of the true one."""

    best: Tensor
    logprobs: Tensor


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    tokenizer = resolve_model("smollm2").tokenizer
    return [tokenizer.encode(text).ids for text in TEXTS]


@pytest.fixture(scope="module")
def reference(smollm2_gguf: Path, prompts: list[list[int]]) -> Predicted:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        smollm2_gguf.parent, gguf_file=smollm2_gguf.name, dtype=torch.float32
    )
    best, logprobs = [], []
    torch.set_num_threads(1)
    with torch.inference_mode():
        for prompt in prompts:
            logits = model(torch.tensor([prompt])).logits[0, :-1]
            best.append(logits.argmax(-1))
            targets = torch.tensor(prompt[1:])[:, None]
            logprobs.append(logits.log_softmax(-1).gather(1, targets)[:, 0])
    return Predicted(torch.cat(best), torch.cat(logprobs))


def predict(model: ServedModel, prompts: list[list[int]], backend: KernelBackend) -> Predicted:
    """The same from an engine, by way of prompt log-probabilities."""
    spec = WorkerSpec(
        checkpoint=model.checkpoint,
        model=model.spec,
        dtype="bfloat16",
        tp_size=1,
        cache=CacheSpec(block_size=BLOCK_SIZE, num_blocks=64, dtype="bfloat16"),
        max_tokens_per_step=1024,
        max_running=1,
        eos_token_ids=model.eos_token_ids,
        device="cpu",
    )
    engine = Engine(spec, SingleRank(), backend)
    engine.load()
    params = SamplingParams(temperature=0.0, prompt_logprobs=1)
    best, logprobs = [], []
    for seq, prompt in enumerate(prompts):
        new = NewSequence(seq, prompt, len(prompt), 0, params)
        row = Row(seq, len(prompt), list(range(-(-len(prompt) // BLOCK_SIZE))))
        plan = StepPlan(0, seq, [seq - 1] if seq else [], [new], [], [row])
        scores = engine.step(plan).prompt_logprobs[0]
        best += [top[0].token_id for top in scores.top]
        logprobs += [token.logprob for token in scores.tokens]
    return Predicted(torch.tensor(best), torch.tensor(logprobs))


def test_best_tokens_and_logprobs_of_all_positions(
    prompts: list[list[int]], reference: Predicted
) -> None:
    """Every position counts, near ties as well, and weights rounded to bfloat16 are no excuse.

    The reference computes in float32 with the weights as the checkpoint gives them. transformers
    in bfloat16 would be no reference: it picks another token than its own float32 at 3% of the
    positions, most of all because it rounds the logits to 8 bits, where the best two often tie.
    """
    try:
        backend = NativeBackend()
    except OSError as error:
        pytest.skip(f"no compiled kernels: {error}")
    found = predict(resolve_model("smollm2"), prompts, backend)
    assert len(found.best) == len(reference.best) > 1000
    agreement = float((found.best == reference.best).float().mean())
    assert agreement >= 0.99, f"{agreement:.4f} of {len(found.best)} positions"
    error = (found.logprobs - reference.logprobs).abs()
    assert float(error.mean()) < 0.02 and float(error.max()) < 0.3
