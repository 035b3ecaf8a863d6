"""Small random models of every family, and greedy generation by ranks on threads."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from phalanx.kernels.select import select_backend
from phalanx.protos.sampling import SamplingParams
from phalanx.protos.shards import weight_bytes
from phalanx.protos.specs import CacheSpec, DecoderSpec, DType, WorkerSpec
from phalanx.protos.steps import NewSequence, Row, StepPlan, TokenLogprob
from phalanx.workers.engine import Engine
from phalanx.workers.models.registry import describe
from phalanx.workers.parallel import SingleRank, TensorParallel, ThreadRank

VOCAB, NEW_TOKENS, BLOCK_SIZE, NUM_BLOCKS = 131, 16, 4, 40
PROMPTS = [[(7 * i * i + 3 * i + 5) % VOCAB for i in range(37)], [i * 5 % VOCAB for i in range(21)]]
CHUNKS = [[5, 1, 14, 17], [20, 1]]


@dataclass
class RandomModel:
    """A checkpoint on disk, and the model of `transformers` that it was saved from."""

    folder: Path
    reference: Any
    spec: DecoderSpec

    def logprobs(self, tokens: list[int]) -> Tensor:
        """Log-probabilities of what follows each token, [len(tokens), vocabulary]."""
        with torch.no_grad():
            logits = self.reference(torch.tensor([tokens]), use_cache=False).logits
        return torch.as_tensor(logits[0].double().log_softmax(-1))


@pytest.fixture(scope="session")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., RandomModel]:
    """Factory: `random_model("GPT2Config", n_embd=55, ...)`, a model with that configuration.

    Every parameter is drawn anew, norms and biases too, so that no one or zero hides a mistake.
    Equal calls give the same model, whose folder must not be changed.
    """
    made: dict[str, RandomModel] = {}

    def make(kind: str, **fields: Any) -> RandomModel:
        key = json.dumps([kind, fields], sort_keys=True)
        if key not in made:
            made[key] = _save(tmp_path_factory.mktemp(kind), kind, fields)
        return made[key]

    return make


def _save(folder: Path, kind: str, fields: dict[str, Any]) -> RandomModel:
    import transformers

    config = getattr(transformers, kind)(**json.loads(json.dumps(fields)))
    # eager attention caps scores, the fused kind does not; but eager Falcon adds ALiBi twice
    attention = "sdpa" if kind == "FalconConfig" else "eager"
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation=attention, experts_implementation="eager"
    )
    generator = torch.Generator().manual_seed(sum(map(ord, kind)))
    with torch.no_grad():
        for label, parameter in model.named_parameters():
            if "norm" in label or "ln_" in label:
                parameter.uniform_(0.5, 1.5, generator=generator)
            elif parameter.dim() == 1:
                parameter.normal_(0, 0.2, generator=generator)
            else:
                parameter.normal_(0, 1.2 * parameter.shape[-1] ** -0.5, generator=generator)
        for label, buffer in model.named_buffers():
            if "correction" in label:
                buffer.normal_(0, 0.2, generator=generator)
    model.tie_weights()
    model.save_pretrained(folder)
    spec = describe(json.loads((folder / "config.json").read_text()))
    return RandomModel(folder, model.eval(), spec)


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


def start(
    checkpoint: Path,
    spec: DecoderSpec,
    tp: int,
    num_blocks: int = NUM_BLOCKS,
    dtype: DType = "float32",
    kernels: str | None = None,
) -> list[Engine]:
    worker = WorkerSpec(
        checkpoint=str(checkpoint),
        model=spec,
        dtype=dtype,
        tp_size=tp,
        cache=CacheSpec(block_size=BLOCK_SIZE, num_blocks=num_blocks, dtype=dtype),
        max_tokens_per_step=100,
        max_running=8,
        eos_token_ids=(),
        device="cpu",
    )
    groups: list[TensorParallel] = [SingleRank()] if tp == 1 else list(ThreadRank.group(tp))
    engines = [Engine(worker, group, select_backend("cpu", kernels)[0]) for group in groups]
    for report in on_all_ranks(engines, lambda engine: engine.load()):
        assert report.weight_bytes == weight_bytes(spec, tp, report.rank, dtype)
    return engines


def generate(engines: list[Engine]) -> tuple[list[list[int]], list[list[list[TokenLogprob]]]]:
    """Greedy outputs of `PROMPTS` in one batch, chunked oddly, in scattered blocks.

    With them, for each sequence and position from the second on, the most likely tokens.
    """
    params = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, logprobs=5, prompt_logprobs=5)
    free = [(index * 11 + 3) % NUM_BLOCKS for index in range(NUM_BLOCKS)]
    chunks = [list(sizes) for sizes in CHUNKS]
    outputs: list[list[int]] = [[], []]
    tops: list[list[list[TokenLogprob]]] = [[], []]
    step = 0
    while min(map(len, outputs)) < NEW_TOKENS:
        new = [NewSequence(seq, p, len(p), 0, params) for seq, p in enumerate(PROMPTS)]
        rows = []
        for seq in (0, 1):
            blocks = free[20 * seq : 20 * seq + 16] if step == 0 else []
            rows.append(Row(seq, chunks[seq].pop(0) if chunks[seq] else 1, blocks))
        plan = StepPlan(0, step, [], new if step == 0 else [], [], rows)
        results = on_all_ranks(engines, lambda engine, plan=plan: engine.step(plan))
        assert all(result.sampled == results[0].sampled for result in results)
        for scored in results[0].prompt_logprobs:
            tops[scored.seq] += scored.top
        for token in results[0].sampled:
            outputs[token.seq].append(token.token_id)
            tops[token.seq].append(token.top)
        step += 1
    return outputs, tops


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Products this small are slower when each rank's thread starts threads of its own."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def difference(one_thread: None) -> Callable[..., float]:
    """`difference(model, tp, checkpoint=..., kernels=...)`: the largest of a log-probability.

    Two prompts, longer than any window, are continued greedily by `tp` ranks. Asserts that every
    token is the one that `transformers` finds most likely.
    """

    def compare(
        model: RandomModel, tp: int, checkpoint: Path | None = None, kernels: str | None = None
    ) -> float:
        folder = checkpoint or model.folder
        outputs, tops = generate(start(folder, model.spec, tp, kernels=kernels))
        largest = 0.0
        for prompt, output, top in zip(PROMPTS, outputs, tops, strict=True):
            expected = model.logprobs(prompt + output)[:-1]
            assert output == expected[len(prompt) - 1 :].argmax(-1).tolist()
            assert len(top) == len(expected)
            for row, candidates in zip(expected, top, strict=True):
                assert len(candidates) == 5
                found = (abs(float(row[item.token_id]) - item.logprob) for item in candidates)
                largest = max(largest, *found)
        return largest

    return compare


@pytest.fixture(scope="session")
def score() -> Callable[..., list[list[TokenLogprob]]]:
    """`score(checkpoint, spec, tp, tokens)`: what is most likely after each token of a prompt."""

    def run(
        checkpoint: Path,
        spec: DecoderSpec,
        tp: int,
        tokens: list[int],
        dtype: DType = "float32",
    ) -> list[list[TokenLogprob]]:
        params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=3)
        blocks = list(range(-(-len(tokens) // BLOCK_SIZE)))[::-1]
        engines = start(checkpoint, spec, tp, len(blocks), dtype)
        tops: list[list[TokenLogprob]] = []
        for step, first in enumerate(range(0, len(tokens), 100)):
            new = [NewSequence(0, tokens, len(tokens), 0, params)] if step == 0 else []
            row = Row(0, min(100, len(tokens) - first), blocks if step == 0 else [])
            plan = StepPlan(0, step, [], new, [], [row])
            results = on_all_ranks(engines, lambda engine, plan=plan: engine.step(plan))
            for scored in results[0].prompt_logprobs:
                tops += scored.top
        return tops

    return run
