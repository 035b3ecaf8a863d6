"""The Ray-facing shell of a rank. Ray starts and watches it; step data takes our own socket.

torch is imported only inside methods, so that the controller may name this class without it.
"""

from __future__ import annotations

import logging
import os
import platform
import socket
import threading

import msgspec
import ray

from phalanx.protos.specs import WorkerSpec
from phalanx.protos.wire import Hello

from .machine import (
    cpu_count,
    fast_bfloat16,
    interface_of,
    memory_available,
    read_ahead,
    shared_memory_works,
)

LINGER_S = 10.0


class NodeFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What a rank finds where Ray has put it."""

    node: str
    address: str
    cpu_count: int
    memory_available: int
    """Bytes of device memory (GPU) or host memory (CPU) that are free now."""
    device: str
    fast_bfloat16: bool
    """Whether the device multiplies bfloat16 natively."""
    shared_memory: bool
    """Whether ranks here may exchange tensors through shared memory."""
    place: str = ""
    """Ray's name of the node."""


class Rendezvous(msgspec.Struct, frozen=True, kw_only=True):
    """How the ranks of a group find each other."""

    host: str
    port: int
    collectives: str
    """"shm", "gloo" or "nccl"."""
    threads: int
    """CPU threads of each rank."""
    timeout_s: float
    exchange_host: str | None = None
    """Where this rank hands out KV blocks to other replicas' ranks; None: it does not."""


class RankActor:
    """One rank. Its methods are called in this order: facts, [warm, facts], [open_store], run or measure."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._listener: socket.socket | None = None

    def facts(self) -> NodeFacts:
        """Look around. Cheap: decides dtype and cache size before anything is loaded."""
        if os.environ.get("CUDA_VISIBLE_DEVICES") and ray.get_gpu_ids():
            import torch

            free, _ = torch.cuda.mem_get_info()
            device, memory = torch.cuda.get_device_name(), free
            fast = torch.cuda.get_device_capability() >= (8, 0)
        else:
            device, memory = platform.processor() or platform.machine(), memory_available()
            fast = fast_bfloat16()
        return NodeFacts(
            node=socket.gethostname(),
            address=ray.util.get_node_ip_address(),
            cpu_count=cpu_count(),
            memory_available=memory,
            device=device,
            fast_bfloat16=fast,
            shared_memory=shared_memory_works(),
            place=ray.get_runtime_context().get_node_id(),
        )

    def warm(self, checkpoint: str) -> None:
        """Do what can be done before there is a group: import torch and the kernels, and read the
        checkpoint, so that the system holds it. It stands by then."""
        from phalanx.kernels.select import select_backend
        from phalanx.workers import group, serve

        select_backend("cuda" if ray.get_gpu_ids() else "cpu")
        logging.getLogger(__name__).debug("%s and %s are there", group.__name__, serve.__name__)
        read_ahead(checkpoint)

    def open_store(self, host: str) -> int:
        """Rank 0 binds the group's rendezvous itself, on `host` alone; returns the port."""
        self._listener = socket.create_server((host, 0))
        return int(self._listener.getsockname()[1])

    def run(self, address: tuple[str, int], hello: Hello, rendezvous: Rendezvous) -> None:
        """Serve the step loop at `address` until it says stop."""
        _choose_interface(rendezvous.host)
        from phalanx.workers.group import build_engine
        from phalanx.workers.serve import serve_rank

        def build(spec: WorkerSpec) -> object:
            return build_engine(spec, self._rank, rendezvous, self._listener)

        try:
            serve_rank(
                address,
                hello,
                build,  # type: ignore[arg-type]
                _end,
                rendezvous.exchange_host,
                own_process=True,
            )
        finally:
            # nothing more will be asked of this process; usually Ray has ended it by then
            timer = threading.Timer(LINGER_S, _end)
            timer.daemon = True
            timer.start()

    def measure(
        self, host: str, port: int, collectives: str, sizes: list[int], timeout_s: float
    ) -> list[float]:
        """Median seconds of an all-reduce between both ends, by its size in bytes."""
        _choose_interface(host)
        from phalanx.workers.links import time_all_reduces

        where = (host, port, collectives)
        return time_all_reduces(self._rank, *where, sizes, self._listener, timeout_s)


def _choose_interface(host: str) -> None:
    """Collectives would guess an interface, and may guess one that peers do not reach."""
    local = host.startswith("127.")
    interface = interface_of(host if local else ray.util.get_node_ip_address())
    os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = interface


def _end() -> None:
    """End this process whatever its other threads wait for."""
    os._exit(1)
