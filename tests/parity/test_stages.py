"""Stages of layers give the tokens that one rank gives, whatever the scheduler does."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from phalanx.controller.model import resolve_model
from phalanx.kernels.select import select_backend
from phalanx.protos.sampling import SamplingParams
from phalanx.protos.shards import cut_stages, kv_bytes_per_token, weight_bytes
from phalanx.protos.specs import CacheSpec, DecoderSpec, WorkerSpec
from phalanx.protos.steps import NewSequence, Row, StepPlan
from phalanx.workers.checkpoint.source import SafetensorsCheckpoint
from phalanx.workers.engine import Engine
from phalanx.workers.parallel import SingleRank, TensorParallel, ThreadRank
from phalanx.workers.pipeline import ThreadStage

LAYERS = 5
VOCAB, BLOCK_SIZE = 131, 4
SIZES = {
    "vocab_size": VOCAB,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "hidden_size": 48,
    "intermediate_size": 77,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "learned positions, tied": (
        "GPT2Config",
        {"vocab_size": VOCAB, "n_embd": 55, "n_layer": 3, "n_head": 5, "n_positions": 96},
    ),
    "embedding norm, ALiBi": (
        "BloomConfig",
        {"vocab_size": VOCAB, "hidden_size": 55, "n_layer": 3, "n_head": 5},
    ),
    "windows, sandwich, tied": (
        "Gemma2Config",
        SIZES | {"head_dim": 10, "sliding_window": 7, "query_pre_attn_scalar": 14},
    ),
    "post-norm": ("Olmo2Config", SIZES),
    "experts": ("MixtralConfig", SIZES | {"num_local_experts": 5, "num_experts_per_tok": 2}),
}
PROMPTS = [[(7 * i * i + 3 * i + 5) % VOCAB for i in range(23)], [i * 5 % VOCAB for i in range(9)]]
NEW_TOKENS = 6


def requests() -> list[tuple[list[int], SamplingParams]]:
    """Prompts of 1 to 60 tokens; greedy, filtered and penalised, several samples, scored."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0, "logprobs": 3},
        {"temperature": 1.0, "n": 3},
        {"temperature": 1.3, "top_k": 40, "prompt_logprobs": 2},
        {"top_p": 0.8, "repetition_penalty": 1.3, "n": 2},
        {"min_p": 0.05, "logprobs": 1},
    ]
    lengths = [60, 1, 33, 7, 18, 2, 45]
    return [
        (
            [(37 * number + 11 * place) % 500 + 3 for place in range(length)],
            SamplingParams(
                seed=number, max_tokens=12, ignore_eos=True, **kinds[number % len(kinds)]
            ),
        )
        for number, length in enumerate(lengths)
    ]


def outcome(run: Any) -> Any:
    """All that callers see of each sample: its tokens, what was scored of its prompt, its end."""

    def seen(events: list[Any]) -> Any:
        runs = [event.prompt_logprobs for event in events if event.prompt_logprobs]
        scored = [pair for run in runs for pair in zip(run.tokens, run.top, strict=True)]
        tokens = [(each.token_id, each.logprob, each.top) for e in events for each in e.tokens]
        return tokens, scored, events[-1].finish

    return [[seen(events) for events in samples] for samples in run.generate(requests())]


@pytest.mark.parametrize(("pp", "tp"), [(2, 1), (3, 1), (5, 1), (2, 2)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_any_number_of_stages_gives_the_same_tokens(
    tiny_llama: Callable[..., Path],
    local_replica: Callable[..., Any],
    pp: int,
    tp: int,
    dtype: str,
) -> None:
    """In chunks of prompts, in mixed steps, once more from cached prefixes, and with too few blocks,
    so that samples are preempted."""
    folder = tiny_llama(num_hidden_layers=LAYERS, dtype=dtype)
    sizes = {
        "dtype": dtype,
        "max_tokens_per_step": 24,
        "max_running": 8,
        "block_size": 4,
        "reserve_tokens": 1,
    }
    one = local_replica(folder, tp=tp, **sizes)
    expected = outcome(one)
    for num_blocks in (400, 24):
        run = local_replica(folder, tp=tp, pp=pp, num_blocks=num_blocks, **sizes)
        assert outcome(run) == expected
        assert (run.scheduler.stats().preemptions > 0) == (num_blocks == 24)
        if num_blocks == 400:
            assert outcome(run) == expected
            assert run.scheduler.stats().prefix_hit > 0
        run.replica.stop()
        assert run.replica.lost is not None and "was stopped" in str(run.replica.lost)


class Stages:
    """Ranks of all stages on threads, driven plan by plan."""

    def __init__(self, folder: Path, model: DecoderSpec, pp: int, tp: int) -> None:
        spec = WorkerSpec(
            checkpoint=str(folder),
            model=model,
            dtype="float32",
            tp_size=tp,
            pp_size=pp,
            cache=CacheSpec(block_size=BLOCK_SIZE, num_blocks=40, dtype="float32"),
            max_tokens_per_step=64,
            max_running=8,
            eos_token_ids=(),
            device="cpu",
        )
        lanes = [ThreadStage.pipeline(pp) for _ in range(tp)]
        self.engines: list[Engine] = []
        for stage in range(pp):
            groups: list[TensorParallel] = [SingleRank()] if tp == 1 else list(ThreadRank.group(tp))
            for place, group in enumerate(groups):
                backend, _ = select_backend("cpu")
                self.engines.append(Engine(spec, group, backend, pipeline=lanes[place][stage]))
        for rank, report in enumerate(self.each(lambda engine: engine.load())):
            stage, place = divmod(rank, tp)
            part = cut_stages(model, pp)[stage]
            assert report.rank == rank
            assert report.weight_bytes == weight_bytes(model, tp, place, "float32", part)
            per_token = kv_bytes_per_token(model, tp, place, "float32", part)
            assert report.kv_bytes == 40 * BLOCK_SIZE * per_token
            assert not report.tensors_ignored
        self.answers = spec.answering_rank

    def each(self, work: Callable[[Engine], Any]) -> list[Any]:
        results: list[Any] = [None] * len(self.engines)

        def run(rank: int) -> None:
            results[rank] = work(self.engines[rank])

        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(results))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        return results

    def step(self, plan: StepPlan) -> Any:
        return self.each(lambda engine: engine.step(plan))[self.answers]

    def greedy(self) -> tuple[list[list[int]], list[list[list[Any]]]]:
        """Outputs of `PROMPTS`, the longer one in chunks; and what is likely at each position."""
        params = SamplingParams(
            temperature=0.0, max_tokens=NEW_TOKENS, logprobs=4, prompt_logprobs=4
        )
        new = [NewSequence(seq, p, len(p), 0, params) for seq, p in enumerate(PROMPTS)]
        outputs: list[list[int]] = [[], []]
        tops: list[list[list[Any]]] = [[], []]
        chunks, step = [[10, 13], [9]], 0
        while min(map(len, outputs)) < NEW_TOKENS:
            rows = [
                Row(seq, chunks[seq].pop(0) if chunks[seq] else 1, blocks if step == 0 else [])
                for seq, blocks in enumerate((list(range(20)), list(range(39, 19, -1))))
            ]
            result = self.step(StepPlan(0, step, [], new if step == 0 else [], [], rows))
            for run in result.prompt_logprobs:
                tops[run.seq] += run.top
            for token in result.sampled:
                outputs[token.seq].append(token.token_id)
                tops[token.seq].append(token.top)
            step += 1
        return outputs, tops


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("pp", "tp"), [(2, 1), (2, 2), (3, 1)])
@pytest.mark.parametrize("family", FAMILIES)
def test_families_in_stages_equal_transformers(
    random_model: Callable[..., Any], family: str, pp: int, tp: int
) -> None:
    kind, fields = FAMILIES[family]
    model = random_model(kind, **fields)
    outputs, tops = Stages(model.folder, model.spec, pp, tp).greedy()
    for prompt, output, top in zip(PROMPTS, outputs, tops, strict=True):
        expected = model.logprobs(prompt + output)[:-1]
        assert output == expected[len(prompt) - 1 :].argmax(-1).tolist()
        assert len(top) == len(expected)
        for row, likely in zip(expected, top, strict=True):
            assert len(likely) == 4
            assert all(abs(float(row[item.token_id]) - item.logprob) < 1e-4 for item in likely)


def test_a_rank_reads_only_the_tensors_of_its_stage(
    tiny_llama: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: dict[int, set[str]] = {}
    original = SafetensorsCheckpoint.read

    def recorded(self: Any, name: str, *cut: Any) -> Any:
        read.setdefault(id(self), set()).add(name)
        return original(self, name, *cut)

    monkeypatch.setattr(SafetensorsCheckpoint, "read", recorded)
    folder = tiny_llama(num_hidden_layers=3)
    Stages(folder, resolve_model(str(folder)).spec, 3, 1)
    layers = {
        frozenset(name.split(".")[2] for name in names if ".layers." in name): names
        for names in read.values()
    }
    first, middle, last = (layers[frozenset({index})] for index in "012")
    assert "model.embed_tokens.weight" in first - middle - last
    assert {"lm_head.weight", "model.norm.weight"} <= last - middle - first
