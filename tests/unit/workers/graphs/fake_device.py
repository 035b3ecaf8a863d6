"""Run as a program: records steps on a device that is no CPU and holds no values.

    python fake_device.py CHECKPOINT

Prints, as JSON, what each case ended with: sizes, or the name of an error. It is a process of its
own because torch is told of the device for good.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from phalanx.controller.model import resolve_model
from phalanx.kernels.reference import ReferenceBackend
from phalanx.protos.shards import cut_model
from phalanx.protos.specs import CacheSpec, WorkerSpec
from phalanx.workers.batch import Batch, BatchBuilder
from phalanx.workers.cache import PagedCache
from phalanx.workers.checkpoint.source import open_checkpoint
from phalanx.workers.decoder import Decoder
from phalanx.workers.graphs.device import CallAgain
from phalanx.workers.graphs.steps import Model, StepGraphs
from phalanx.workers.layers.rope import RotaryTable
from phalanx.workers.models.registry import tensor_names
from phalanx.workers.parallel import SingleRank, TensorParallel
from phalanx.workers.sampling.plain import PlainChoice

DEVICE = "privateuseone"
Spoil = Callable[[torch.Tensor], object]


class TwoRanks:
    """Rank 1 of two, whose peer is itself."""

    rank, size = 1, 2

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor + tensor

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.stack([tensor, tensor])


def record(
    name: Path,
    group: TensorParallel,
    spoil: Spoil = lambda hidden: None,
) -> StepGraphs:
    """Every step of a model of the family, over tensors that only know their shapes and that
    they are not on the CPU. spoil: called with the hidden states in the middle of a step."""
    served = resolve_model(str(name))
    spec = WorkerSpec(
        checkpoint=served.checkpoint,
        model=served.spec,
        dtype="bfloat16",
        tp_size=group.size,
        cache=CacheSpec(block_size=16, num_blocks=8, dtype="bfloat16"),
        max_tokens_per_step=64,
        max_running=9,
        eos_token_ids=(),
        device=DEVICE,  # type: ignore[arg-type]
    )
    model, device, backend = spec.model, torch.device(DEVICE), ReferenceBackend()
    checkpoint = open_checkpoint(spec.checkpoint)
    names = tensor_names(model, checkpoint.kind, checkpoint.names())
    part = cut_model(model, group.size, group.rank)
    decoder = Decoder(model, names, group, backend, torch.bfloat16, device)
    for stage in range(model.num_layers + 1):
        decoder.pack(stage)
    cache = PagedCache(
        spec.cache, model.num_layers, part.heads.kv.size, model.head_dim, device, spare_blocks=1
    )
    rotary = None
    if model.rope:
        rotary = RotaryTable(model.rope, 64, torch.bfloat16, device)
    builder = BatchBuilder(rotary, backend, spec.cache.block_size, device)

    def layers(batch: Batch) -> torch.Tensor:
        hidden = decoder(batch, cache.layers)
        spoil(hidden)
        return hidden

    choice = PlainChoice(group, part.vocab, backend)
    graphs = StepGraphs.of(spec, Model(builder, layers, decoder.logits, choice), backend)
    assert graphs is not None
    graphs.record(CallAgain())
    return graphs


CASES: dict[str, tuple[TensorParallel, Spoil]] = {
    "one rank": (SingleRank(), lambda hidden: None),
    "two ranks": (TwoRanks(), lambda hidden: None),
    "a value is read": (SingleRank(), lambda hidden: hidden.sum().item()),
    "a shape is read": (SingleRank(), lambda hidden: hidden.nonzero()),
    "a CPU's tensor": (SingleRank(), lambda hidden: hidden + torch.ones(1, hidden.shape[1])),
}


def outcome(name: Path, group: TensorParallel, spoil: Spoil) -> list[int] | str:
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), torch.inference_mode():
            return record(name, group, spoil).sizes
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    _setup_privateuseone_for_python_backend()
    folder = Path(sys.argv[1])
    print(json.dumps({name: outcome(folder, *case) for name, case in CASES.items()}))
