"""Where a backend sums over the ranks while it norms, blocks leave their sums to the next norm."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from phalanx.controller.model import resolve_model
from phalanx.kernels.fused import PeerBuffers
from phalanx.kernels.reference import ReferenceBackend
from phalanx.protos.sampling import SamplingParams
from phalanx.protos.specs import CacheSpec, WorkerSpec
from phalanx.protos.steps import NewSequence, Row, StepPlan
from phalanx.workers.engine import Engine
from phalanx.workers.parallel import SingleRank, ThreadRank

MOST_ROWS, LAYERS = 6, 2


class Seeing(ThreadRank):
    """A thread that sees the others' parts; counts the sums that do not go that way."""

    sums = 0

    def all_reduce(self, tensor: Tensor) -> Tensor:
        self.sums += 1
        return super().all_reduce(tensor)

    def filled(self, partial: Tensor) -> PeerBuffers | None:
        if len(partial) > MOST_ROWS:
            return None
        nothing = torch.empty(0)
        return PeerBuffers(self.rank, self.all_gather(partial), nothing, None)


class Summing(ReferenceBackend):
    """Finds all parts in the buffer."""

    calls = 0

    def all_reduce_add_rms_norm(
        self, peers: PeerBuffers, residual: Tensor, weight: Tensor, eps: float, offset: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        self.calls += 1
        total = sum(peers.local.unbind(0))
        return self.add_rms_norm(total, residual, weight, eps, offset)  # type: ignore[arg-type]


@pytest.fixture
def start(tiny_llama: Callable[..., Path]) -> Callable[..., list[Engine]]:
    def make(groups: list[Any], backends: list[ReferenceBackend], **shape: Any) -> list[Engine]:
        model = resolve_model(str(tiny_llama(**shape)))
        spec = WorkerSpec(
            checkpoint=model.checkpoint,
            model=model.spec,
            dtype="float32",
            tp_size=len(groups),
            cache=CacheSpec(block_size=4, num_blocks=32, dtype="float32"),
            max_tokens_per_step=32,
            max_running=4,
            eos_token_ids=(),
            device="cpu",
        )
        pairs = zip(groups, backends, strict=True)
        engines = [Engine(spec, group, backend) for group, backend in pairs]
        for engine in engines:
            engine.load()
        return engines

    return make


def plans() -> list[StepPlan]:
    """Prompts of 5 and 9 tokens, one after the other, then both together."""
    greedy = SamplingParams(temperature=0.0)
    prompts = [[7, 300, 12, 45, 9], [400, 2, 31, 8, 77, 6, 5, 44, 90]]
    new = [NewSequence(seq, prompt, len(prompt), 0, greedy) for seq, prompt in enumerate(prompts)]
    tables = [[0, 3, 1, 9, 4], [2, 7, 5, 6, 8]]
    firsts = [
        StepPlan(0, seq, [], [new[seq]], [], [Row(seq, len(prompts[seq]), tables[seq])])
        for seq in (0, 1)
    ]
    both = [Row(0, 1, []), Row(1, 1, [])]
    return [*firsts, *(StepPlan(0, step, [], [], [], both) for step in range(2, 9))]


def run(engines: list[Engine]) -> list[list[int]]:
    """Tokens of each step; all ranks agree."""
    from concurrent.futures import ThreadPoolExecutor

    def work(engine: Engine) -> list[list[int]]:
        return [[token.token_id for token in engine.step(plan).sampled] for plan in plans()]

    with ThreadPoolExecutor(len(engines)) as pool:
        results = list(pool.map(work, engines))
    assert all(result == results[0] for result in results)
    return results[0]


@pytest.mark.parametrize("size", [2, 3])
def test_the_same_tokens(start: Callable[..., list[Engine]], size: int) -> None:
    """The prompt of 9 does not fit into the buffers, but for its last row at the final norm."""
    expected = run(start([SingleRank()], [ReferenceBackend()]))
    groups, backends = Seeing.group(size), [Summing() for _ in range(size)]
    assert run(start(groups, backends)) == expected
    steps, long = len(plans()), 1
    fused = 2 * LAYERS * (steps - long) + long
    assert [backend.calls for backend in backends] == [fused] * size
    # the embedding's, and what did not fit
    unfused = steps + (2 * LAYERS - 1) * long
    assert [group.sums for group in groups] == [unfused] * size  # type: ignore[attr-defined]
