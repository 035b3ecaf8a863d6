"""What `plan_memory` says a rank will hold, against what torch allocates on it.

Every allocation of this process goes through torch's CPU allocator, also those inside operators
and of weights that were laid out anew; the profiler records them all. The torch backend is
measured, because compiled kernels keep what they pack in memory of their own. Memory of the checkpoint's
mapped file is not counted: it is the page cache's.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import pytest
import torch
from torch import Tensor
from torch.autograd import (
    ProfilerActivity,
    ProfilerConfig,
    ProfilerState,
    _disable_profiler,
    _enable_profiler,
    _prepare_profiler,
)

from phalanx.controller.cluster.placement import MemoryPlan, plan_memory
from phalanx.controller.model import ServedModel, resolve_model
from phalanx.kernels.cpu.backend import CpuBackend
from phalanx.protos.sampling import SamplingParams
from phalanx.protos.specs import WorkerSpec
from phalanx.protos.steps import NO_STATE, NewSequence, Row, StateUse, StepPlan
from phalanx.workers.engine import Engine

BLOCK_SIZE = 16


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class AloneOf:
    """A rank of a group of `size` whose peers always say what it says; the sizes are the real."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    def all_reduce(self, tensor: Tensor) -> Tensor:
        return tensor.clone()

    def all_gather(self, tensor: Tensor) -> Tensor:
        return torch.stack([tensor] * self.size)


class Allocations:
    """Bytes that this thread allocates from here on: the highest sum, and what is left."""

    peak = left = 0

    def __enter__(self) -> Self:
        gc.collect()
        what = {ProfilerActivity.CPU}
        config = ProfilerConfig(
            ProfilerState.KINETO,
            False,
            True,  # memory
            False,
            False,
            False,
            torch._C._profiler._ExperimentalConfig(),
        )
        _prepare_profiler(config, what)
        _enable_profiler(config, what)
        return self

    def __exit__(self, *error: object) -> None:
        gc.collect()
        events = [event for event in _disable_profiler().events() if event.name() == "[memory]"]
        for event in sorted(events, key=lambda event: event.start_ns()):
            self.left += event.nbytes()
            self.peak = max(self.peak, self.left)


def busiest(index: int) -> SamplingParams:
    """Greedy, plain and filtered rows, with penalties and log-probabilities: all copies at once."""
    if index == 0:
        return SamplingParams(temperature=0.0, frequency_penalty=0.5, logprobs=20)
    if index == 1:
        return SamplingParams(temperature=10.0, top_p=0.99, seed=index, logprobs=20)
    return SamplingParams(seed=index, frequency_penalty=0.5, logprobs=20)


def filtered(index: int) -> SamplingParams:
    """Flat distributions, of which top-p keeps most of the vocabulary."""
    return SamplingParams(
        temperature=10.0, top_p=0.99, min_p=0.0, seed=index, repetition_penalty=1.1, logprobs=0
    )


def scored(index: int) -> SamplingParams:
    """Logits of every prompt position."""
    return SamplingParams(temperature=0.0, prompt_logprobs=20)


def largest_steps(spec: WorkerSpec) -> Iterator[StepPlan]:
    """One long prompt; then as many sequences as may run, in each way of sampling."""
    tokens, most = spec.max_tokens_per_step, spec.max_running
    each = [tokens // most + (index < tokens % most) for index in range(most)]
    first = 0
    works = [(scored, [tokens]), (busiest, each), (filtered, each)]
    for step, (params, lengths) in enumerate(works):
        new, rows, used = [], [], 0
        for index, length in enumerate(lengths):
            blocks = -(-length // BLOCK_SIZE)
            ids = [(7 * place + 31 * index) % spec.model.vocab_size for place in range(length)]
            new.append(NewSequence(first + index, ids, length, 0, params(index)))
            states = StateUse(NO_STATE, index) if spec.model.state else None
            rows.append(Row(first + index, length, list(range(used, used + blocks)), states))
            used += blocks
        forget = list(range(first)) if step else []
        yield StepPlan(0, step, forget, new, [], rows)
        first += len(lengths)


def check(model: ServedModel, dtype: Any, tp_size: int, rank: int, **sizes: int) -> None:
    """Load and run one rank beside its plan."""
    plan: MemoryPlan = plan_memory(
        model.spec,
        dtype=dtype,
        kv_dtype=dtype,
        tp_size=tp_size,
        block_size=BLOCK_SIZE,
        memory_per_rank=None,
        max_tokens_per_step=sizes["max_tokens_per_step"],
        max_running=sizes["max_running"],
        kv_tokens=sizes["kv_tokens"],
    )
    spec = WorkerSpec(
        checkpoint=model.checkpoint,
        model=model.spec,
        dtype=dtype,
        tp_size=tp_size,
        cache=plan.cache,
        max_tokens_per_step=sizes["max_tokens_per_step"],
        max_running=sizes["max_running"],
        eos_token_ids=model.eos_token_ids,
        device="cpu",
    )
    memory = plan.ranks[rank]
    with Allocations() as loading:
        engine = Engine(spec, AloneOf(rank, tp_size), CpuBackend())
        report = engine.load()
    assert (report.weight_bytes, report.kv_bytes) == (memory.weights, memory.kv)
    assert report.state_bytes == memory.states
    held = memory.weights + memory.kv + memory.rope_table + memory.states
    # the pool is mapped memory, which the profiler does not see
    left = loading.left + report.kv_bytes
    assert left == pytest.approx(held, rel=0.01), "a copy of some weight stays alive"
    peak = 0
    for step in largest_steps(spec):
        with Allocations() as working:
            engine.step(step)
        peak = max(peak, working.peak)
        assert working.left < 0.002 * memory.total
    assert left + peak == pytest.approx(memory.total, rel=0.05), (
        f"activations {peak}, planned {memory.activations}"
    )
    if dtype == "int8":
        return  # a layer is float32 while it is rounded, and these models have two
    # while weights are laid out anew, those of one stage exist twice, never all
    assert loading.peak + report.kv_bytes <= max(memory.total, held + 0.25 * memory.weights)


@pytest.mark.parametrize(("tp_size", "rank"), [(1, 0), (2, 1), (3, 0)])
def test_smollm2(smollm2_gguf: Path, tp_size: int, rank: int) -> None:
    """More sequences than the rows of logits that exist at a time."""
    check(
        resolve_model("smollm2"),
        "bfloat16",
        tp_size,
        rank,
        max_tokens_per_step=256,
        max_running=72,
        kv_tokens=4096,
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize(("tp_size", "rank"), [(1, 0), (2, 0), (3, 1)])
def test_small_untied_llama(
    tiny_llama: Callable[..., Path], dtype: str, tp_size: int, rank: int
) -> None:
    """Head and embedding are two tables here; layers, not logits, take the more.

    Every rank's widths are multiples of 64: oneDNN pads the rows of a packed weight up to that.
    """
    folder = tiny_llama(
        hidden_size=384,
        num_attention_heads=12,
        num_key_value_heads=6,
        head_dim=32,
        intermediate_size=1536,
        vocab_size=1152,
    )
    check(
        resolve_model(str(folder)),
        dtype,
        tp_size,
        rank,
        max_tokens_per_step=256,
        max_running=4,
        kv_tokens=1024,
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("tp_size", "rank"), [(1, 0), (2, 1), (3, 0)])
def test_latent_attention(
    tiny_llama: Callable[..., Path],
    random_model: Callable[..., Any],
    dtype: str,
    tp_size: int,
    rank: int,
) -> None:
    """Every width is a multiple of 64 on every rank, as above."""
    made = random_model(
        "DeepseekV3Config",
        hidden_size=384,
        num_attention_heads=12,
        num_key_value_heads=12,
        q_lora_rank=192,
        kv_lora_rank=128,
        qk_nope_head_dim=32,
        qk_rope_head_dim=32,
        v_head_dim=64,
        intermediate_size=768,
        vocab_size=1152,
        num_hidden_layers=3,
        first_k_dense_replace=3,
        max_position_embeddings=512,
    )
    served = replace(resolve_model(str(tiny_llama())), checkpoint=str(made.folder), spec=made.spec)
    check(served, dtype, tp_size, rank, max_tokens_per_step=256, max_running=4, kv_tokens=1024)


@pytest.mark.parametrize(
    ("kind", "dtype", "tp_size", "rank"),
    [
        ("MambaConfig", "float32", 1, 0),
        ("MambaConfig", "bfloat16", 2, 1),
        ("MambaConfig", "float32", 3, 0),
        ("Mamba2Config", "bfloat16", 1, 0),
        ("Mamba2Config", "float32", 2, 1),
        ("Mamba2Config", "float32", 3, 0),
    ],
)
def test_state_spaces(
    tiny_llama: Callable[..., Path],
    random_model: Callable[..., Any],
    kind: str,
    dtype: str,
    tp_size: int,
    rank: int,
) -> None:
    """Every width that bfloat16 is packed in is a multiple of 64."""
    heads = {"num_heads": 64, "head_dim": 12, "n_groups": 2} if kind == "Mamba2Config" else {}
    made = random_model(
        kind,
        hidden_size=384,
        state_size=64 if heads else 16,
        vocab_size=1152,
        num_hidden_layers=4,
        time_step_rank=32,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        **heads,
    )
    served = replace(resolve_model(str(tiny_llama())), checkpoint=str(made.folder), spec=made.spec)
    check(served, dtype, tp_size, rank, max_tokens_per_step=256, max_running=2, kv_tokens=1024)
