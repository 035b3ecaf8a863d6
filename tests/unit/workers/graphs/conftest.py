"""Engines of the smallest model, with and without recorded steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from phalanx.controller.model import resolve_model
from phalanx.kernels.interface import KernelBackend
from phalanx.kernels.select import select_backend
from phalanx.protos.specs import CacheSpec, WorkerSpec
from phalanx.workers.engine import Engine
from phalanx.workers.graphs.device import Recorder
from phalanx.workers.parallel import SingleRank

MakeEngine = Callable[..., Engine]


@pytest.fixture
def make_engine(tiny_llama: Callable[..., Path]) -> MakeEngine:
    """Factory: `make_engine(recorder=None, backend=None)`, loaded; 64 blocks of 4, 6 may run."""

    def make(recorder: Recorder | None = None, backend: KernelBackend | None = None) -> Engine:
        model = resolve_model(str(tiny_llama()))
        spec = WorkerSpec(
            checkpoint=model.checkpoint,
            model=model.spec,
            dtype="float32",
            tp_size=1,
            cache=CacheSpec(block_size=4, num_blocks=64, dtype="float32"),
            max_tokens_per_step=64,
            max_running=6,
            eos_token_ids=model.eos_token_ids,
            device="cpu",
        )
        backend = backend or select_backend("cpu")[0]
        engine = Engine(spec, SingleRank(), backend, recorder=recorder)
        engine.load()
        return engine

    return make
