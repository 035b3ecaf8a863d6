from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from phalanx.controller.model import resolve_model
from phalanx.kernels.cpu.native_backend import NativeBackend
from phalanx.protos.sampling import SamplingParams
from phalanx.protos.specs import CacheSpec, WeightCacheSpec, WorkerSpec, activation_dtype
from phalanx.protos.steps import NewSequence, Row, StepPlan
from phalanx.workers.engine import Engine
from phalanx.workers.loading.kept import KeptWeights, kept_weights
from phalanx.workers.loading.weights import Weights
from phalanx.workers.parallel import SingleRank, TensorParallel, ThreadRank

PROMPT = [5, 17, 300, 44, 9, 9, 81, 400, 3, 77, 211, 30]


@pytest.fixture(scope="session")
def worker_spec() -> Callable[..., WorkerSpec]:
    """Factory: `worker_spec(checkpoint, folder, **fields)`; a folder of None keeps nothing."""

    def make(checkpoint: Path, folder: Path | str | None = None, **fields: Any) -> WorkerSpec:
        model = resolve_model(str(checkpoint))
        dtype = fields.pop("dtype", "bfloat16")
        most = fields.pop("most_bytes", 2**30)
        cache = None
        if folder is not None:
            cache = WeightCacheSpec(folder=str(folder), most_bytes=most)
        common: dict[str, Any] = {
            "tp_size": 1,
            "max_tokens_per_step": 64,
            "max_running": 4,
            "eos_token_ids": (),
            "device": "cpu",
        }
        return WorkerSpec(
            checkpoint=model.checkpoint,
            model=model.spec,
            dtype=dtype,
            cache=CacheSpec(block_size=4, num_blocks=16, dtype=activation_dtype(dtype)),
            weight_cache=cache,
            **(common | fields),
        )

    return make


class Started:
    """What a group of ranks answered, and where their weights came from."""

    def __init__(self, spec: WorkerSpec) -> None:
        groups: list[TensorParallel] = [SingleRank()]
        if spec.tp_size > 1:
            groups = list(ThreadRank.group(spec.tp_size))
        self.kept: list[Weights | None] = []
        self.engines = []
        for rank, group in enumerate(groups):
            backend = NativeBackend(threads=1)
            self.kept.append(kept_weights(spec, rank, backend))
            self.engines.append(Engine(spec, group, backend, weights=self.kept[-1]))
        self.progress: list[tuple[int, int]] = []
        self._each(lambda engine: engine.load(lambda *state: self.progress.append(state)))
        for kept in self.kept:
            assert not isinstance(kept, KeptWeights) or kept.keeper.wait(60)

    def _each(self, work: Callable[[Engine], Any]) -> list[Any]:
        with ThreadPoolExecutor(len(self.engines)) as pool:
            return list(pool.map(work, self.engines))

    def answers(self) -> list[Any]:
        """Tokens and log-probabilities of a prompt and of what follows it, to the last bit."""
        params = SamplingParams(temperature=0.0, max_tokens=8, logprobs=5, prompt_logprobs=5)
        answers = []
        for step in range(6):
            new = [] if step else [NewSequence(0, PROMPT, len(PROMPT), 0, params)]
            row = Row(0, 1, []) if step else Row(0, len(PROMPT), [9, 3, 14, 1, 7])
            plan = StepPlan(0, step, [], new, [], [row])
            result = self._each(lambda engine, plan=plan: engine.step(plan))[0]
            answers.append((result.sampled, result.prompt_logprobs, result.failures))
        return answers


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[WorkerSpec], Started]]:
    """Factory: `started(spec)`, once what it keeps is written. Checkpoints of tests are new."""
    monkeypatch.setattr("phalanx.workers.loading.fingerprint.SETTLED_NS", 0)
    yield Started


@pytest.fixture
def read_tensors(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the tensors that are read from checkpoints, as they are."""
    from phalanx.workers.loading import assign

    names: list[str] = []
    read = assign._read

    def noted(piece: Any, *arguments: Any) -> Any:
        names.append(piece.source)
        return read(piece, *arguments)

    monkeypatch.setattr(assign, "_read", noted)
    return names
