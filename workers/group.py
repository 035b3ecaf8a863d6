"""Forming a group: rendezvous, collectives, threads; then the engine on top."""

from __future__ import annotations

import socket
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Store, TCPStore

from phalanx.kernels.fused import FusingBackend
from phalanx.kernels.select import select_backend
from phalanx.protos.specs import DTYPE_BYTES, WorkerSpec

from .engine import Engine
from .parallel import SingleRank, TensorParallel
from .sampling.exchange import PIECE
from .shared_memory import SharedMemoryRank


class Rendezvous(Protocol):
    """What `actor.Rendezvous` carries, without importing Ray."""

    @property
    def host(self) -> str:
        """Address of rank 0's store."""

    @property
    def port(self) -> int:
        """Port of rank 0's store."""

    @property
    def tp_size(self) -> int:
        """Ranks of the group."""

    @property
    def collectives(self) -> str:
        """shm, gloo or nccl."""

    @property
    def threads(self) -> int:
        """CPU threads of each rank."""

    @property
    def timeout_s(self) -> float:
        """Patience with a silent peer, seconds."""


class DistributedRank:
    """`TensorParallel` over torch.distributed: NCCL on GPUs, gloo on CPUs."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._rank, self._size = group.rank(), group.size()

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
        dist.all_gather(list(stacked.unbind(0)), tensor.contiguous(), group=self._group)
        return stacked


def form_group(
    spec: WorkerSpec, rank: int, rendezvous: Rendezvous, listener: socket.socket | None
) -> TensorParallel:
    """Meet the other ranks. Rank 0 serves the store on `listener`, a socket bound by us,
    because the store would otherwise listen on every interface."""
    size = rendezvous.tp_size
    if size == 1:
        return SingleRank()
    timeout = timedelta(seconds=rendezvous.timeout_s)
    store = TCPStore(
        rendezvous.host,
        rendezvous.port,
        size,
        is_master=rank == 0,
        timeout=timeout,
        master_listen_fd=None if listener is None else listener.detach(),
    )
    if rendezvous.collectives == "shm":
        return _shared_memory(spec, rank, size, store, timeout)
    dist.init_process_group(
        rendezvous.collectives, store=store, rank=rank, world_size=size, timeout=timeout
    )
    if dist.group.WORLD is None:
        raise RuntimeError("torch.distributed formed no group")
    group = DistributedRank(dist.group.WORLD)
    group.all_reduce(torch.zeros(1, device=spec.device))  # connections are made here, not later
    return group


def _shared_memory(
    spec: WorkerSpec, rank: int, size: int, store: Store, timeout: timedelta
) -> SharedMemoryRank:
    width = spec.model.hidden_size * DTYPE_BYTES[spec.dtype]
    slot = max(spec.max_tokens_per_step * width, PIECE * 8)

    def exchange(value: bytes) -> bytes:
        if rank == 0:
            store.set("segment", value.decode())
        return bytes(store.get("segment"))

    def barrier() -> None:
        if store.add("opened", 1) == size:
            store.set("all-open", "1")
        store.wait(["all-open"])  # no longer than the store's timeout

    return SharedMemoryRank.join(rank, size, slot, exchange, barrier, timeout)


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
    group = form_group(spec, rank, rendezvous, listener)
    return Engine(spec, group, backend, reason.removeprefix("kernels: "))
