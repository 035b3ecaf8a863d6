"""The backend as a whole: a model's tokens through the engine, and prompts by flash-attn."""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from phalanx.controller.model import resolve_model
from phalanx.kernels.gpu.backend import GpuBackend
from phalanx.kernels.gpu.conversion import INTERPRETED
from phalanx.kernels.gpu.flash import FlashAttention
from phalanx.kernels.interface import AttentionSpec, KernelBackend, SequenceSpan
from phalanx.kernels.reference import ReferenceBackend
from phalanx.kernels.select import select_backend
from phalanx.protos.sampling import SamplingParams
from phalanx.protos.specs import CacheSpec, DType, WorkerSpec
from phalanx.protos.steps import NewSequence, Row, StepPlan
from phalanx.workers.engine import Engine
from phalanx.workers.parallel import SingleRank, TensorParallel

SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
    "initializer_range",
    "tie_word_embeddings",
)

pytestmark = [] if INTERPRETED else pytest.mark.gpu


def _run(
    checkpoint: Path,
    backend: KernelBackend,
    device: Any,
    dtype: DType = "float32",
    kv_dtype: DType = "float32",
    group: TensorParallel | None = None,
) -> tuple[list[int], list[float]]:
    """Greedy tokens of two sequences, prompts in two chunks, then single queries; and the
    log-probabilities of the longer prompt."""
    model, group = resolve_model(str(checkpoint)), group or SingleRank()
    spec = WorkerSpec(
        checkpoint=model.checkpoint,
        model=model.spec,
        dtype=dtype,
        tp_size=group.size,
        cache=CacheSpec(block_size=16, num_blocks=8, dtype=kv_dtype),
        max_tokens_per_step=64,
        max_running=8,
        eos_token_ids=(),
        device=device,
    )
    engine = Engine(spec, group, backend)
    engine.load()
    params = SamplingParams(temperature=0.0, max_tokens=9)
    scored = SamplingParams(temperature=0.0, max_tokens=9, prompt_logprobs=0)
    new = [
        NewSequence(1, list(range(30, 50)), 20, 0, scored),
        NewSequence(2, list(range(7, 12)), 5, 0, params),
    ]
    tokens, logprobs = [], []
    for step, rows in enumerate(
        [
            [Row(1, 13, [5, 2]), Row(2, 5, [7])],
            [Row(1, 7, []), Row(2, 1, [])],
            [Row(1, 1, []), Row(2, 1, [])],
            [Row(1, 1, []), Row(2, 1, [])],
        ]
    ):
        result = engine.step(StepPlan(0, step, [], new if step == 0 else [], [], rows))
        tokens += [token.token_id for token in result.sampled]
        logprobs += [one.logprob for scores in result.prompt_logprobs for one in scores.tokens]
    return tokens, logprobs


def _normed_heads(llama: Path, folder: Path) -> Path:
    """A model whose query and key heads are normed, with the configuration of a Llama."""
    import transformers

    config = transformers.LlamaConfig.from_pretrained(llama).to_dict()
    kept = {key: config[key] for key in SIZES}
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**kept))
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.data.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    for path in llama.glob("tokenizer*"):
        shutil.copy(path, folder)
    return folder


@pytest.mark.parametrize("normed_heads", [False, True])
def test_a_model_gives_the_reference_tokens(
    normed_heads: bool, tiny_llama: Callable[..., Path], tmp_path: Path, device: torch.device
) -> None:
    torch.manual_seed(0)
    checkpoint = tiny_llama()
    if normed_heads:
        checkpoint = _normed_heads(checkpoint, tmp_path)
    expected, _ = _run(checkpoint, ReferenceBackend(), "cpu")
    assert len(expected) == 7 and len(set(expected)) > 3
    assert _run(checkpoint, GpuBackend(device), device.type)[0] == expected


class _Counting(GpuBackend):
    """Counts the kernels that norm or gate and round in one."""

    rounded = 0

    def add_rms_norm_quantize(self, *given: Any) -> Any:
        self.rounded += 1
        return super().add_rms_norm_quantize(*given)

    def gated_quantize(self, *given: Any) -> Any:
        self.rounded += 1
        return super().gated_quantize(*given)


def _apart(one: list[float], other: list[float]) -> float:
    return math.sqrt(sum((a - b) ** 2 for a, b in zip(one, other, strict=True)) / len(one))


@pytest.mark.parametrize(
    ("dtype", "kv_dtype", "most"),
    [("fp8", "fp8", 0.3), ("int4", "bfloat16", 0.7)],
)
def test_a_rounded_model_computes_what_the_reference_does(
    dtype: Any,
    kv_dtype: Any,
    most: float,
    tiny_llama: Callable[..., Path],
    device: torch.device,
    library: None,
) -> None:
    """Widths that are no multiples of 16 or 128, products of many rows and of few."""
    torch.manual_seed(0)
    checkpoint = tiny_llama(intermediate_size=200, num_hidden_layers=1)
    _, exact = _run(checkpoint, ReferenceBackend(), "cpu")
    tokens, expected = _run(checkpoint, ReferenceBackend(), "cpu", dtype, kv_dtype)
    backend = _Counting(device)
    got_tokens, got = _run(checkpoint, backend, device.type, dtype, kv_dtype)
    assert len(got) == len(expected) == 19 and len(got_tokens) == len(tokens)
    # activations are rounded to either side of a step: that is less than what all rounding does
    assert _apart(got, expected) < _apart(expected, exact)
    assert 1e-3 < _apart(got, exact) < most * _apart(exact, [sum(exact) / 19] * 19)
    layers = resolve_model(str(checkpoint)).spec.num_layers
    assert backend.rounded == (4 * 3 * layers if dtype == "fp8" else 0)


class _Called:
    """A flash-attn that is not there: checks what it is documented to check, then computes it."""

    def __init__(self, version: int) -> None:
        self.version, self.lengths = version, list[int]()

    def __call__(self, query: Tensor, keys: Tensor, values: Tensor, **given: Any) -> Tensor:
        starts, causal = given["cu_seqlens_q"], given["causal"]
        if self.version == 3:
            lengths, tables = given["cache_seqlens"], given["page_table"]
            assert given["num_splits"] == 1
        else:
            ends, tables = given["cu_seqlens_k"], given["block_table"]
            assert keys.shape[1] % 256 == 0 and ends.dtype is torch.int32 and ends[0] == 0
            assert max(ends[1:] - ends[:-1]) <= given["max_seqlen_k"]
            lengths = ends[1:] - ends[:-1]
        for tensor in (starts, lengths, tables):
            assert tensor.dtype is torch.int32 and tensor.stride(-1) == 1
        assert keys.stride(-1) == values.stride(-1) == query.stride(-1) == 1 and causal
        assert keys.data_ptr() % 16 == 0 and keys.shape[2] * 2 == query.shape[1]
        assert max(starts[1:] - starts[:-1]) == given["max_seqlen_q"]
        self.lengths = lengths.tolist()
        left, right = given["window_size"]
        spec = AttentionSpec(
            scale=given["softmax_scale"],
            window=left + 1 if right == 0 else 0,
            softcap=given["softcap"],
            alibi_slopes=given.get("alibi_slopes"),
        )
        spans = [
            SequenceSpan(int(start), int(stop - start), int(length), table.tolist())
            for start, stop, length, table in zip(
                starts[:-1], starts[1:], lengths, tables, strict=True
            )
            if length
        ]
        reference = ReferenceBackend()
        pools = [pool.permute(2, 0, 1, 3).contiguous() for pool in (keys, values)]
        out = reference.paged_attention(
            query, *pools, reference.plan_attention(spans, keys.shape[1]), spec
        )
        for row, length in enumerate(lengths):
            if not length:
                out[starts[row] : starts[row + 1]] = torch.nan
        return out


def _step(page: int, device: torch.device) -> tuple[list[SequenceSpan], Tensor, Tensor]:
    """(spans, queries, pools): two prompts with a single query between them."""
    torch.manual_seed(0)
    spans = [
        SequenceSpan(0, 5, 21, [3, 1]),
        SequenceSpan(5, 1, 9, [4]),
        SequenceSpan(6, 2, 2, [0]),
    ]
    query = torch.randn(8, 4, 32, device=device).half()
    return spans, query, torch.randn(2, 2, 5, page, 32, device=device).half()


@pytest.mark.parametrize(("version", "page"), [(3, 16), (2, 256)])
@pytest.mark.parametrize("window", [0, 4])
def test_prompts_go_to_flash_attn_and_single_queries_do_not(
    version: int, page: int, window: int, device: torch.device
) -> None:
    spans, query, pools = _step(page, device)
    spec = AttentionSpec(scale=0.2, window=window, softcap=3.0)
    called = _Called(version)
    results = []
    for flash in (FlashAttention(version, called), None):
        backend = GpuBackend(device, flash=flash)
        plan = backend.plan_attention(spans, page)
        results.append(backend.paged_attention(query, pools[0], pools[1], plan, spec))
    assert called.lengths == [21, 0, 2]
    torch.testing.assert_close(*results, rtol=2e-3, atol=2e-3)
    single = backend.plan_attention([SequenceSpan(0, 1, 9, [4])], page)
    called.lengths = []
    backend = GpuBackend(device, flash=FlashAttention(version, called))
    backend.paged_attention(query[5:6], pools[0], pools[1], single, spec)
    assert called.lengths == []


def test_what_flash_attn_cannot_do_stays_here(device: torch.device) -> None:
    _, query, pools = _step(16, device)
    three, two = (FlashAttention(version, _Called(version)) for version in (3, 2))
    plain, pool = AttentionSpec(scale=1.0), pools[0]
    slopes = AttentionSpec(scale=1.0, alibi_slopes=torch.ones(4))
    assert three.takes(query, pool, plain) and not two.takes(query, pool, plain)
    pages = torch.zeros(2, 1, 512, 32, dtype=torch.float16)
    assert two.takes(query, pages, slopes) and not three.takes(query, pages, slopes)
    sinks = AttentionSpec(scale=1.0, sinks=torch.ones(4))
    assert not three.takes(query, pool, sinks) and not two.takes(query, pages, sinks)
    assert not three.takes(query.float(), pool.float(), plain)
    assert not three.takes(query, pool.to(torch.float8_e4m3fn), plain)
    assert not three.takes(query[..., :12], pool[..., :12], plain)


def test_version_3_is_found_before_version_2(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("flash_attn_interface", "flash_attn"):
        monkeypatch.setitem(sys.modules, module, None)
    assert FlashAttention.find() is None
    assert select_backend("cuda")[1].endswith("own attention)")
    older, newer = ModuleType("flash_attn"), ModuleType("flash_attn_interface")
    monkeypatch.setattr(older, "flash_attn_varlen_func", print, raising=False)
    monkeypatch.setattr(newer, "flash_attn_with_kvcache", print, raising=False)
    for module, version in ((older, 2), (newer, 3)):
        monkeypatch.setitem(sys.modules, module.__name__, module)
        found = FlashAttention.find()
        assert found is not None and found.version == version
        backend, reason = select_backend("cuda")
        assert isinstance(backend, GpuBackend) and f"flash-attn {version}" in reason
        assert reason.startswith("kernels: gpu (Triton ")


def test_a_plan_of_another_backend_is_refused(device: torch.device) -> None:
    spans, query, pools = _step(16, device)
    plan = ReferenceBackend().plan_attention(spans, 16)
    with pytest.raises(TypeError, match="plan of another backend"):
        GpuBackend(device).paged_attention(query, pools[0], pools[1], plan, AttentionSpec(scale=1))
