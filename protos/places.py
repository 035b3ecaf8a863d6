"""What the controller and a rank that is its child process say before they are connected.

One line of JSON each way, over the child's stdin and stdout; after that they speak `wire`'s frames.
"""

from __future__ import annotations

import msgspec


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """What a rank finds where it runs; its first words."""

    cpu_count: int
    memory_available: int
    """Bytes."""
    fast_bfloat16: bool
    """Whether the processor multiplies bfloat16 natively."""
    shared_memory: bool
    """Whether ranks here may exchange tensors through shared memory."""
    processor: str
    port: int
    """Of the store that this rank would serve the group from."""
    address: str = "127.0.0.1"


class Invitation(msgspec.Struct, frozen=True, kw_only=True):
    """Where the step loop listens, and how the ranks of the group find each other."""

    rank: int
    epoch: int
    secret: bytes
    step_loop: tuple[str, int]
    host: str
    port: int
    """Of rank 0's store."""
    collectives: str
    """"shm" or "gloo"."""
    threads: int
    timeout_s: float
    exchange_host: str | None = None
    """Where the rank hands out KV blocks to other replicas' ranks; None: it does not."""
