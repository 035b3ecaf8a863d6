"""How long steps of Llama-3.1-8B's shape take, beside the least that the device needs for them."""

from __future__ import annotations

import argparse
import time
from collections import deque
from typing import Any

import torch
from stepping import BLOCK_SIZE, LLAMA_8B, make_engine, make_spec  # type: ignore[import-not-found]

from phalanx.kernels.bench.cases import SHAPES, cases
from phalanx.kernels.bench.measure import Ceilings, GraphTimer, HostTimer, measure, measure_ceilings
from phalanx.kernels.select import select_backend
from phalanx.protos.sampling import SamplingParams
from phalanx.protos.shards import kv_bytes_per_token, weight_parameters
from phalanx.protos.specs import DecoderSpec
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
        self, model: DecoderSpec, ceilings: Ceilings, *, weight_bytes: float = 2.0
    ) -> None:
        """weight_bytes: of an element of the layers; the head has 2."""
        self._model, self._ceilings = model, ceilings
        self._head = model.vocab_size * model.hidden_size
        self._layers = weight_parameters(model, 1, 0) - 2 * self._head
        self._moved = self._layers * weight_bytes + self._head * 2.0
        self._token = kv_bytes_per_token(model, 1, 0, "bfloat16")

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


def speed(words: argparse.Namespace) -> dict[str, Any]:
    """Whole steps, as the host sees them; then attention alone."""
    device = torch.device(words.device)
    timer = GraphTimer(device) if words.device == "cuda" else HostTimer()
    ceilings = measure_ceilings(device, torch.bfloat16, timer)
    config = LLAMA_8B | {"num_hidden_layers": words.layers}
    rows: list[dict[str, Any]] = []
    model, seconds = _decoding(words, config, words.batches, "")
    floor = Floor(model, ceilings)
    for batch, took in seconds.items():
        rows.append(_row(f"decode, batch {batch}", took, floor.decode(batch, CONTEXT), batch))
        rows[-1]["goal %"] = GOALS.get(batch)
    took = _prefill(words, config)
    rows.append(_row(f"prefill of {PROMPT}", took, floor.prefill(PROMPT), PROMPT))
    rows[-1]["goal %"] = PREFILL_GOAL
    backend, _ = select_backend(words.device, words.kernels)
    if hasattr(backend, "pack_linear_fp8"):
        _, seconds = _decoding(words, config, [1], "fp8")
        narrow = Floor(model, ceilings, weight_bytes=1.0)
        rows.append(_row("decode, batch 1, fp8", seconds[1], narrow.decode(1, CONTEXT), 1))
        rows[-1]["goal %"] = FP8_GOAL
    if hasattr(backend, "_programmatic"):
        _, seconds = _decoding(words, config, [1], "programmatic")
        rows.append(_row("decode, batch 1, programmatic", seconds[1], floor.decode(1, CONTEXT), 1))
    for case in cases(SHAPES["llama-3.1-8b"], backend, tokens=PROMPT, context=4096):
        if case.kernel == "attention decode":
            done = measure(case, backend, device, torch.bfloat16, timer, ceilings)
            rows.append(_row(f"attention, {case.size}", done.seconds, done.share * done.seconds, 1))
            # small ones take no longer than their launch
            rows[-1]["goal %"] = ATTENTION_GOAL if done.bytes >= 256e6 else None
    for row in rows:
        row["reached"] = row["goal %"] is None or row["share %"] >= row["goal %"]
    return {"ok": True, "rows": rows, "ceilings": ceilings._asdict(), "layers": words.layers}


def _row(what: str, seconds: float, floor: float, tokens: int) -> dict[str, Any]:
    return {
        "what": what,
        "ms": seconds * 1e3,
        "floor ms": floor * 1e3,
        "share %": 100 * floor / seconds,
        "tokens/s": tokens / seconds,
        "goal %": None,
    }


def _engine(words: argparse.Namespace, config: dict[str, Any], kind: str, **sizes: Any) -> Engine:
    backend, _ = select_backend(words.device, words.kernels)
    if kind == "programmatic":
        backend._programmatic = True  # type: ignore[attr-defined]
    elif kind:
        narrow, plain = getattr(backend, f"pack_linear_{kind}"), backend.pack_linear
        head = config["vocab_size"]
        backend.pack_linear = (  # type: ignore[method-assign]
            lambda weight, bias: (plain if len(weight) == head else narrow)(weight, bias)
        )
    spec = make_spec(config, "bfloat16", words.device, **sizes)
    engine: Engine = make_engine(spec, backend, weights=RandomWeights())
    engine._cache._pool.normal_()
    return engine


def _decoding(
    words: argparse.Namespace, config: dict[str, Any], batches: list[int], kind: str
) -> tuple[DecoderSpec, dict[int, float]]:
    """Seconds of a step, by batch; each step is queued before the last one's tokens are read."""
    most = max(batches)
    blocks = -(-(CONTEXT + WARM_UP + STEPS) // BLOCK_SIZE)
    engine = _engine(words, config, kind, num_blocks=most * blocks, max_running=most)
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
        words, config, "", num_blocks=blocks, max_running=1, max_tokens_per_step=PROMPT
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
