"""When a rank says that it is ready."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from phalanx.controller.model import resolve_model
from phalanx.kernels.reference import ReferenceBackend
from phalanx.protos.specs import CacheSpec, WorkerSpec
from phalanx.workers.engine import Engine
from phalanx.workers.parallel import SingleRank
from phalanx.workers.pipeline import ThreadStage
from phalanx.workers.sampling import grammars


def test_the_tokenizer_has_been_read_where_tokens_are_sampled(
    tiny_llama: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading it lets no other thread run, so that a rank at work would fall silent."""
    let, read = threading.Event(), list[str]()

    class Slow:
        def __init__(self, tokenizer: str, *rest: Any) -> None:
            assert let.wait(60)
            read.append(tokenizer)

    monkeypatch.setattr(grammars, "GrammarCompiler", Slow)
    model = resolve_model(str(tiny_llama()))
    spec = WorkerSpec(
        checkpoint=model.checkpoint,
        model=model.spec,
        dtype="float32",
        tp_size=1,
        pp_size=2,
        cache=CacheSpec(block_size=4, num_blocks=8, dtype="float32"),
        max_tokens_per_step=64,
        max_running=8,
        eos_token_ids=(),
        device="cpu",
        tokenizer="of this model",
    )
    first, last = (
        Engine(spec, SingleRank(), ReferenceBackend(), pipeline=stage)
        for stage in ThreadStage.pipeline(2)
    )
    first.load()
    assert not read
    ready = threading.Thread(target=last.load)
    ready.start()
    ready.join(0.3)
    assert ready.is_alive()
    let.set()
    ready.join(60)
    assert read == ["of this model"]
