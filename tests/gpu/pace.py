"""How long steps of Llama-3.1-8B's shape take, beside the least that the device needs for them."""

from __future__ import annotations

import argparse
import time
from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from stepping import (  # type: ignore[import-not-found]
    BLOCK_SIZE,
    LLAMA_8B,
    demo,
    make_engine,
    make_spec,
)

from phalanx.kernels.bench.cases import SHAPES, cases
from phalanx.kernels.bench.measure import (
    Ceilings,
    GraphTimer,
    HostTimer,
    Timer,
    measure,
    measure_ceilings,
)
from phalanx.kernels.select import select_backend
from phalanx.protos.sampling import SamplingParams
from phalanx.protos.shards import kv_bytes_per_token, weight_bytes, weight_parameters
from phalanx.protos.specs import DecoderSpec, DType
from phalanx.protos.steps import NewSequence, Row, StepPlan
from phalanx.workers.engine import Engine
from phalanx.workers.loading.weights import RandomWeights

CONTEXT, PROMPT = 1024, 2048
WARM_UP, STEPS = 8, 48
GOALS = {1: 75.0, 8: 75.0, 64: 70.0, 256: 65.0}
"""Per cent of the floor, by batch."""
FP8_GOAL, PREFILL_GOAL, ATTENTION_GOAL = 65.0, 60.0, 80.0


class Floor:
    """The least seconds of a step: its bytes over the bandwidth, or its operations over the rate."""

    def __init__(
        self, model: DecoderSpec, ceilings: Ceilings, variant: Variant | None = None
    ) -> None:
        """variant: how weights and cache are held; in bfloat16, by default."""
        variant = variant or PLAIN
        self._model, self._ceilings = model, ceilings
        self._head = model.vocab_size * model.hidden_size
        tables = 1 if model.tie_embeddings else 2
        self._layers = weight_parameters(model, 1, 0) - tables * self._head
        # of the embedding, a step reads a few rows
        self._moved = weight_bytes(model, 1, 0, variant.dtype) - 2 * (tables - 1) * self._head
        self._token = kv_bytes_per_token(model, 1, 0, variant.kv_dtype)

    def decode(self, batch: int, context: int) -> float:
        """A step of `batch` sequences that each attend to `context` tokens."""
        flops = 2 * batch * (self._layers + self._head) + self._attention(batch * context)
        return self._ceilings.floor(int(self._moved + batch * context * self._token), flops)

    def prefill(self, tokens: int) -> float:
        """One prompt, of which the last token's logits are wanted."""
        flops = 2 * tokens * self._layers + 2 * self._head
        flops += self._attention(tokens * (tokens + 1) // 2)
        return self._ceilings.floor(int(self._moved + 2 * tokens * self._token), flops)

    def _attention(self, pairs: int) -> int:
        model = self._model
        return 4 * pairs * model.num_heads * model.head_dim * model.num_layers


class Variant(NamedTuple):
    """What differs from a model in bfloat16."""

    name: str = ""
    dtype: DType = "bfloat16"
    kv_dtype: DType = "bfloat16"
    kernels: str | None = None
    """A backend, by name."""
    batch: int = 1
    goal: float | None = None
    """Per cent of its own floor."""


PLAIN = Variant()
VARIANTS = (
    Variant(", fp8", "fp8", goal=FP8_GOAL),
    Variant(", int4", "int4"),
    Variant(", fp8, cache fp8", "fp8", "fp8", batch=64),
    Variant(", programmatic", kernels="gpu-programmatic"),
    Variant(", fp8, programmatic", "fp8", kernels="gpu-programmatic"),
)
"""Programmatic launches have no goal: they are worth it where they are faster than without."""


def speed(words: argparse.Namespace) -> dict[str, Any]:
    """Whole steps, as the host sees them; then attention alone."""
    device, large = torch.device(words.device), words.device == "cuda"
    timer = GraphTimer(device) if large else HostTimer()
    ceilings = measure_ceilings(device, torch.bfloat16, timer)
    config = LLAMA_8B | {"num_hidden_layers": words.layers} if large else demo(words.device)
    rows: list[dict[str, Any]] = []
    model, seconds = _decoding(words, config, words.batches, PLAIN)
    floor = Floor(model, ceilings)
    for batch, took in seconds.items():
        rows.append(_row(f"decode, batch {batch}", took, floor.decode(batch, CONTEXT), batch))
        rows[-1]["goal %"] = GOALS.get(batch) if large else None
    took = _prefill(words, config)
    rows.append(_row(f"prefill of {PROMPT}", took, floor.prefill(PROMPT), PROMPT))
    rows[-1]["goal %"] = PREFILL_GOAL if large else None
    for variant in VARIANTS:
        if variant.kernels is not None and not large:
            continue
        batch = variant.batch
        _, seconds = _decoding(words, config, [batch], variant)
        least = Floor(model, ceilings, variant).decode(batch, CONTEXT)
        rows.append(_row(f"decode, batch {batch}{variant.name}", seconds[batch], least, batch))
        rows[-1]["goal %"] = variant.goal if large else None
    rows += _attention(words, device, timer, ceilings)
    for row in rows:
        row["reached"] = row["goal %"] is None or row["share %"] >= row["goal %"]
    well = all(row["reached"] for row in rows)
    return {"ok": well, "rows": rows, "ceilings": ceilings._asdict(), "layers": words.layers}


def _attention(
    words: argparse.Namespace, device: torch.device, timer: Timer, ceilings: Ceilings
) -> Iterator[dict[str, Any]]:
    """Single queries, as a share of what the device copies."""
    backend, _ = select_backend(words.device, words.kernels)
    large = words.device == "cuda"
    shape = SHAPES["llama-3.1-8b" if large else "smollm2-135m"]
    for case in cases(shape, backend, tokens=16, context=4096 if large else 64):
        if case.kernel == "attention decode":
            done = measure(case, backend, device, torch.bfloat16, timer, ceilings)
            row = _row(f"attention, {case.size}", done.seconds, done.bytes / ceilings.copy, 1)
            # small ones take no longer than their launch
            row["goal %"] = ATTENTION_GOAL if large and done.bytes >= 256e6 else None
            yield row


def _row(what: str, seconds: float, floor: float, tokens: int) -> dict[str, Any]:
    return {
        "what": what,
        "ms": seconds * 1e3,
        "floor ms": floor * 1e3,
        "share %": 100 * floor / seconds,
        "tokens/s": tokens / seconds,
        "goal %": None,
    }


def _engine(
    words: argparse.Namespace, config: dict[str, Any], variant: Variant, **sizes: Any
) -> Engine:
    kernels = variant.kernels or words.kernels
    if words.device == "cpu" and variant is not PLAIN:
        kernels = "reference"  # CPUs have none of their own
    backend, _ = select_backend(words.device, kernels)
    spec = make_spec(config, variant.dtype, words.device, kv_dtype=variant.kv_dtype, **sizes)
    engine: Engine = make_engine(spec, backend, weights=RandomWeights())
    for layer in engine._cache.layers:  # no keys and values of zero: they cost less energy
        for pool in layer[:2]:
            pool.copy_(torch.randn(pool.shape, device=pool.device, dtype=torch.bfloat16))
    return engine


def _decoding(
    words: argparse.Namespace, config: dict[str, Any], batches: list[int], variant: Variant
) -> tuple[DecoderSpec, dict[int, float]]:
    """Seconds of a step, by batch; each step is queued before the last one's tokens are read."""
    most = max(batches)
    blocks = -(-(CONTEXT + WARM_UP + STEPS) // BLOCK_SIZE)
    engine = _engine(words, config, variant, num_blocks=most * blocks, max_running=most)
    took = {}
    for batch in batches:
        first = engine._next_step * 1000
        prompt = [7] * CONTEXT
        params = SamplingParams(temperature=0.0)
        new = [
            NewSequence(first + row, prompt, CONTEXT, CONTEXT - 1, params) for row in range(batch)
        ]
        tables = [list(range(row * blocks, (row + 1) * blocks)) for row in range(batch)]
        rows = [Row(first + row, 1, table) for row, table in enumerate(tables)]
        engine.step(StepPlan(0, engine._next_step, [], new, [], rows))
        rows = [Row(first + row, 1, []) for row in range(batch)]
        _steps(engine, rows, WARM_UP)
        started = time.perf_counter()
        _steps(engine, rows, STEPS)
        took[batch] = (time.perf_counter() - started) / STEPS
        ended = [row.seq for row in rows]
        engine.step(StepPlan(0, engine._next_step, ended, [], [], []))
    return engine._spec.model, took


def _steps(engine: Engine, rows: list[Row], count: int) -> None:
    pending: deque[Any] = deque()
    for _ in range(count):
        pending.append(engine.launch(StepPlan(0, engine._next_step, [], [], [], rows)))
        if len(pending) > 1:
            pending.popleft().result()
    pending.popleft().result()


def _prefill(words: argparse.Namespace, config: dict[str, Any]) -> float:
    """Seconds of the fastest of some prompts."""
    blocks = PROMPT // BLOCK_SIZE + 1
    engine = _engine(
        words, config, PLAIN, num_blocks=blocks, max_running=1, max_tokens_per_step=PROMPT
    )
    took = []
    for seq in range(6):
        prompt = torch.randint(1, config["vocab_size"], (PROMPT,)).tolist()
        new = NewSequence(seq, prompt, PROMPT, 0, SamplingParams(temperature=0.0))
        row = Row(seq, PROMPT, list(range(blocks)))
        started = time.perf_counter()
        engine.step(StepPlan(0, engine._next_step, [seq - 1] if seq else [], [new], [], [row]))
        took.append(time.perf_counter() - started)
    return min(took)
