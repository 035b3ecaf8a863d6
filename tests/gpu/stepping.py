"""Engines of drawn models, and a small step loop that queues a step before it reads the last."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from phalanx.kernels.interface import CapturableBackend, KernelBackend
from phalanx.protos.sampling import SamplingParams
from phalanx.protos.specs import CacheSpec, DecoderSpec, WorkerSpec, activation_dtype
from phalanx.protos.steps import NewSequence, Row, StepPlan, StepResult
from phalanx.workers.engine import Engine
from phalanx.workers.graphs.device import CallAgain, CudaGraphs, Recorder
from phalanx.workers.loading.weights import CheckpointWeights, DrawnCheckpoint, Weights
from phalanx.workers.models.registry import describe
from phalanx.workers.parallel import SingleRank, TensorParallel
from phalanx.workers.pending import PendingStep

BLOCK_SIZE, NEW_TOKENS, PROMPTS = 16, 24, 6
DEMO: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}
SMALL: dict[str, Any] = DEMO | {
    "hidden_size": 144,
    "intermediate_size": 300,
    "num_hidden_layers": 3,
    "vocab_size": 1500,
}
"""To try the parts out on a CPU."""
LLAMA_8B: dict[str, Any] = DEMO | {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "drawn": {"temperature": 1.0},
    "filtered": {"temperature": 0.9, "top_p": 0.8, "top_k": 50},
    "penalised": {"temperature": 0.8, "repetition_penalty": 1.2, "frequency_penalty": 0.5},
}


class Rendezvous(NamedTuple):
    """What `form_group` asks for."""

    host: str
    port: int
    collectives: str
    threads: int
    timeout_s: float


@dataclass
class Sequence:
    """One sequence to be computed, and what came of it."""

    prompt: list[int]
    params: SamplingParams
    tokens: list[int] = field(default_factory=list)
    tops: list[Any] = field(default_factory=list)
    prompt_logprobs: list[Any] = field(default_factory=list)


def ways(device: str) -> list[str]:
    """How two ranks on one device may add up."""
    return ["gloo", "symmetric"] if device == "cuda" else ["gloo"]


def demo(device: str) -> dict[str, Any]:
    """The model that is compared: SmolLM2-135M's shape."""
    return DEMO if device == "cuda" else SMALL


def wanted(kind: str, logprobs: int | None = None) -> list[Sequence]:
    """Prompts of several lengths, the same ones each time."""
    draw = torch.Generator().manual_seed(5)
    rule = KINDS.get(kind, {"temperature": 0.0, "prompt_logprobs": 0})
    made = []
    for index in range(PROMPTS):
        prompt = torch.randint(3, 1400, (9 + 13 * index,), generator=draw).tolist()
        made.append(Sequence(prompt, SamplingParams(seed=index, logprobs=logprobs, **rule)))
    return made


def make_spec(
    config: dict[str, Any],
    dtype: Any,
    device: Any,
    *,
    tp_size: int = 1,
    kv_dtype: Any = None,
    **sizes: Any,
) -> WorkerSpec:
    """kv_dtype: that of activations, by default. sizes: num_blocks, max_tokens_per_step,
    max_running."""
    model: DecoderSpec = describe(config)
    blocks = sizes.pop("num_blocks", 128)
    return WorkerSpec(
        checkpoint="",
        model=model,
        dtype=dtype,
        tp_size=tp_size,
        cache=CacheSpec(
            block_size=BLOCK_SIZE, num_blocks=blocks, dtype=kv_dtype or activation_dtype(dtype)
        ),
        eos_token_ids=(),
        device=device,
        **({"max_tokens_per_step": 48, "max_running": 8} | sizes),
    )


def make_engine(
    spec: WorkerSpec,
    backend: KernelBackend,
    group: TensorParallel | None = None,
    weights: Weights | None = None,
) -> Engine:
    """A loaded engine; steps are recorded where the group and the backend allow it."""
    recorder: Recorder | None = None
    group = group or SingleRank()
    if isinstance(backend, CapturableBackend):
        if spec.device == "cpu":
            recorder = CallAgain()
        elif getattr(group, "capturable", True):
            recorder = CudaGraphs(torch.device(spec.device))
    weights = weights or CheckpointWeights(DrawnCheckpoint(spec.model))
    engine = Engine(spec, group, backend, recorder=recorder, weights=weights)
    engine.load()
    return engine


def generate(
    engine: Engine, sequences: list[Sequence], new_tokens: int = NEW_TOKENS
) -> list[Sequence]:
    """Fill in the sequences: prompts together in chunks, then `new_tokens` tokens of each."""
    blocks = -(-(max(len(each.prompt) for each in sequences) + new_tokens) // BLOCK_SIZE)
    used = {
        index: list(range(index * blocks, (index + 1) * blocks)) for index in range(len(sequences))
    }
    first = engine._next_step * 1000
    new = [
        NewSequence(first + index, each.prompt, len(each.prompt), 0, each.params)
        for index, each in enumerate(sequences)
    ]
    left = [len(each.prompt) for each in sequences]
    planned = [0] * len(sequences)
    pending: deque[PendingStep] = deque()
    while any(count < new_tokens for count in planned):
        rows, budget = [], 48
        for index in range(len(sequences)):
            count = min(left[index] or 1, budget)
            if planned[index] == new_tokens or not count:
                continue
            budget -= count
            left[index] = max(left[index] - count, 0)
            planned[index] += not left[index]
            rows.append(Row(first + index, count, used.pop(index, [])))
        named = {row.seq for row in rows}
        here = [each for each in new if each.seq in named]
        new = [each for each in new if each.seq not in named]
        pending.append(engine.launch(StepPlan(0, engine._next_step, [], here, [], rows)))
        if len(pending) > 1:
            _take(pending.popleft().result(), sequences, first)
    _take(pending.popleft().result(), sequences, first)
    ended = [first + index for index in range(len(sequences))]
    engine.step(StepPlan(0, engine._next_step, ended, [], [], []))
    return sequences


def _take(result: StepResult, sequences: list[Sequence], first: int) -> None:
    if result.failures:
        raise RuntimeError(f"sequences failed: {result.failures}")
    for token in result.sampled:
        sequences[token.seq - first].tokens.append(token.token_id)
        sequences[token.seq - first].tops.append(token.top or None)
    for scores in result.prompt_logprobs:
        sequences[scores.seq - first].prompt_logprobs += scores.tokens
