"""Forming a group: rendezvous, collectives, threads; then the engine on top."""

from __future__ import annotations

import logging
import socket
from datetime import timedelta
from typing import TYPE_CHECKING, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from phalanx.kernels.fused import FusingBackend, PeerBuffers
from phalanx.kernels.select import select_backend
from phalanx.protos.failpoints import failpoints
from phalanx.protos.recording import MAX_RECORDED_ROWS
from phalanx.protos.specs import DTYPE_BYTES, WorkerSpec, activation_dtype

from .engine import Engine
from .graphs.device import CudaGraphs
from .loading.kept import kept_weights
from .parallel import SingleRank, TensorParallel
from .pipeline import DistributedStage, Pipeline, SingleStage
from .sampling.exchange import PIECE
from .shared_memory import SharedMemoryRank

if TYPE_CHECKING:
    from .symmetric import SharedSums

_log = logging.getLogger(__name__)


class Rendezvous(Protocol):
    """What `actor.Rendezvous` carries, without importing Ray."""

    @property
    def host(self) -> str:
        """Address of rank 0's store."""

    @property
    def port(self) -> int:
        """Port of rank 0's store."""

    @property
    def collectives(self) -> str:
        """shm, gloo or nccl, for the ranks of a stage."""

    @property
    def threads(self) -> int:
        """CPU threads of each rank."""

    @property
    def timeout_s(self) -> float:
        """Patience with a silent peer, seconds."""


class DistributedRank:
    """`TensorParallel` over torch.distributed: NCCL on GPUs, gloo on CPUs."""

    def __init__(self, group: dist.ProcessGroup, *, queued: bool = False) -> None:
        """queued: collectives are the device's work, as NCCL's, and not the host's."""
        self._group, self._queued = group, queued
        self._rank, self._size = group.rank(), group.size()

    @property
    def capturable(self) -> bool:
        """Whether collectives of any size can be recorded."""
        return self._queued

    @property
    def rank(self) -> int:
        """This rank."""
        return self._rank

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self._size

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum in place."""
        dist.all_reduce(tensor, group=self._group)
        return tensor

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Stack the tensors of all ranks."""
        stacked = tensor.new_empty((self._size, *tensor.shape))
        if self._queued:
            dist.all_gather_into_tensor(stacked, tensor.contiguous(), group=self._group)
            return stacked
        dist.all_gather(list(stacked.unbind(0)), tensor.contiguous(), group=self._group)
        return stacked


class SymmetricRank(DistributedRank):
    """A GPU of one node: what fits goes through symmetric memory, the rest through the group."""

    def __init__(self, group: dist.ProcessGroup, sums: SharedSums, *, queued: bool) -> None:
        """sums: with room for every sum of a recorded step."""
        super().__init__(group, queued=queued)
        self._sums = sums

    @property
    def capturable(self) -> bool:
        """Whatever is recorded fits."""
        return True

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum in place."""
        return tensor if self._sums.all_reduce(tensor) else super().all_reduce(tensor)

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Stack the tensors of all ranks."""
        stacked = self._sums.all_gather(tensor)
        return super().all_gather(tensor) if stacked is None else stacked

    def filled(self, partial: Tensor) -> PeerBuffers | None:
        """See `PeerMemory`."""
        return self._sums.filled(partial)


def form_group(
    spec: WorkerSpec, rank: int, rendezvous: Rendezvous, listener: socket.socket | None
) -> tuple[TensorParallel, Pipeline]:
    """Meet the other ranks: those of the own stage, and those of equal place in other stages.

    Rank 0 serves the store on `listener`, a socket bound by us, because the store would otherwise
    listen on every interface.
    """
    if spec.num_ranks == 1:
        return SingleRank(), SingleStage()
    timeout = timedelta(seconds=rendezvous.timeout_s)
    store = TCPStore(
        rendezvous.host,
        rendezvous.port,
        spec.num_ranks,
        is_master=rank == 0,
        timeout=timeout,
        master_listen_fd=None if listener is None else listener.detach(),
    )
    stage, place = divmod(rank, spec.tp_size)
    shared = rendezvous.collectives == "shm" or spec.tp_size == 1
    # two ranks on one GPU, which NCCL refuses, meet by gloo: for tests
    kind = "gloo" if rendezvous.collectives == "symmetric" else rendezvous.collectives
    pipeline: Pipeline = SingleStage()
    if spec.pp_size > 1 or not shared:
        # tokens and addresses go by gloo, on GPUs too: between stages NCCL's order of sends and
        # receives could not be kept in both directions
        backend = kind if spec.pp_size == 1 else "gloo"
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=spec.num_ranks, timeout=timeout
        )
    if spec.pp_size > 1:
        direct = None
        if rendezvous.collectives == "nccl":
            direct = dist.new_group(range(spec.num_ranks), timeout, "nccl")
        lane = list(range(place, spec.num_ranks, spec.tp_size))
        pipeline = DistributedStage(stage, lane, direct)
    if spec.tp_size == 1:
        return SingleRank(), pipeline
    own = PrefixStore(f"stage-{stage}", store)
    if shared:
        return _shared_memory(spec, place, own, timeout), pipeline
    world = _stage_group(spec, stage, kind, timeout)
    dist.all_reduce(torch.zeros(1, device=spec.device), group=world)  # it connects here, not later
    if rendezvous.collectives in ("nccl", "symmetric"):
        return _of_gpus(spec, world, own, queued=kind == "nccl"), pipeline
    return DistributedRank(world), pipeline


def _stage_group(
    spec: WorkerSpec, stage: int, collectives: str, timeout: timedelta
) -> dist.ProcessGroup:
    """The ranks of one stage; everybody takes part in the making of all."""
    if dist.group.WORLD is None:
        raise RuntimeError("torch.distributed formed no group")
    if spec.pp_size == 1:
        return dist.group.WORLD
    starts = range(0, spec.num_ranks, spec.tp_size)
    groups: list[dist.ProcessGroup] = [
        dist.new_group(range(start, start + spec.tp_size), timeout, collectives) for start in starts
    ]
    return groups[stage]


def _of_gpus(
    spec: WorkerSpec, world: dist.ProcessGroup, store: Store, *, queued: bool
) -> DistributedRank:
    """With symmetric memory above the group, where all its GPUs are of one node."""
    rank, size = world.rank(), world.size()
    if not _all_say(store, rank, size, "host", socket.gethostname()):
        return DistributedRank(world, queued=queued)
    from .symmetric import SharedSums  # not for CPUs

    rows = min(spec.max_running, MAX_RECORDED_ROWS)
    dtype = getattr(torch, activation_dtype(spec.dtype))
    shape, sums, error = (rows, spec.model.hidden_size), None, ""
    try:
        sums = SharedSums(world, torch.device(spec.device), shape, dtype)
    except RuntimeError as refused:
        error = f"rank {rank}: {refused}"
    if _all_say(store, rank, size, "symmetric", error or "yes") and sums is not None:
        return SymmetricRank(world, sums, queued=queued)
    _log.warning("no symmetric memory among the GPUs of this node: %s", error or "see peers")
    return DistributedRank(world, queued=queued)


def _all_say(store: Store, rank: int, size: int, subject: str, word: str) -> bool:
    """Whether every rank says the same."""
    store.set(f"{subject}/{rank}", word)
    return all(bytes(store.get(f"{subject}/{peer}")).decode() == word for peer in range(size))


def _shared_memory(
    spec: WorkerSpec, rank: int, store: Store, timeout: timedelta
) -> SharedMemoryRank:
    size = spec.tp_size
    width = spec.model.hidden_size * DTYPE_BYTES[activation_dtype(spec.dtype)]
    slot = max(spec.max_tokens_per_step * width, PIECE * 8)

    def exchange(value: bytes) -> bytes:
        if rank == 0:
            store.set("segment", value.decode())
        return bytes(store.get("segment"))

    def barrier() -> None:
        if store.add("opened", 1) == size:
            store.set("all-open", "1")
        store.wait(["all-open"])  # no longer than the store's timeout

    joined = SharedMemoryRank.join(rank, size, slot, exchange, barrier, timeout)
    joined.rendezvous = store  # a peer may still be waiting for its server's last answer
    return joined


def build_engine(
    spec: WorkerSpec, rank: int, rendezvous: Rendezvous, listener: socket.socket | None
) -> Engine:
    """The engine of one rank of a group."""
    if spec.device == "cpu":
        torch.set_num_threads(max(rendezvous.threads, 1))
    backend, reason = select_backend(spec.device)
    if isinstance(backend, FusingBackend):
        # it brings its own threads; torch's, which spin while they wait, would fight with them
        torch.set_num_threads(1)
    group, pipeline = form_group(spec, rank, rendezvous, listener)
    recorder = None
    wanted = spec.device == "cuda" and spec.record_steps
    if wanted and getattr(group, "capturable", group.size == 1):
        recorder = CudaGraphs(torch.device(spec.device))
    kernels = reason.removeprefix("kernels: ")
    parts = (spec, group, backend, kernels, pipeline, recorder, kept_weights(spec, rank, backend))
    if (points := failpoints(rank)) is not None:
        from .failing import FailingEngine

        failing = FailingEngine(*parts)
        failing.points, failing.name = points, f"{spec.epoch}-{rank}"
        return failing
    return Engine(*parts)
