"""Optional capabilities of a backend: a step of heads, or a whole stack of plain layers, in one call.

A decoder step of a small model is hundreds of operations of some microseconds each, and calling
them one by one costs more than they do. A backend that can runs them by itself, sums over the
ranks of the node included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from .float8 import Float8Rows
from .interface import AttentionPlan, AttentionSpec, KernelBackend, PackedLinear


class HeadNorms(NamedTuple):
    """RMS norms of query and key heads before they are rotated."""

    query: Tensor  # [D] or [H, D]
    key: Tensor  # [D] or [K, D]
    eps: float
    offset: float = 0.0


@runtime_checkable
class PoolArranger(Protocol):
    """A backend that lays out KV pools in a way of its own."""

    def arrange_pools(
        self, keys: Tensor, values: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """The memory of a layer's plain pools [K, blocks, block_size, D] as this backend's
        `store_kv` and `paged_attention` want it, for queries of `dtype`. A head's block stays one
        contiguous run."""


@runtime_checkable
class HeadFusingBackend(KernelBackend, Protocol):
    """A backend that takes heads from the projection to the pools in one go."""

    def rope_store_kv(
        self,
        qkv: Tensor,
        cos: Tensor,
        sin: Tensor,
        key_pool: Tensor,
        value_pool: Tensor,
        slots: Tensor,
        norms: HeadNorms | None = None,
    ) -> Tensor:
        """Norm, rotate and store: qkv [T, (H + 2 K) * D] -> queries [T, H, D].

        qkv is [query | key | value] heads; cos, sin [T, rotary / 2]; slots int64 [T]. The pools
        are written.
        """


@runtime_checkable
class RowLookup(PackedLinear, Protocol):
    """A packed weight whose rows can still be read: an output head that is also the embedding."""

    def rows(self, ids: Tensor) -> Tensor:
        """Rows `ids` (int64 [n]) as they were packed, [n, in]."""


@runtime_checkable
class BestOutput(PackedLinear, Protocol):
    """A packed weight that finds the largest output without writing all of them down."""

    def best(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [T, in] -> the output (int64 [T]) that is largest, the first of several, and its value
        (float32 [T]) before it is rounded: NaN where some output is not finite."""


class NormWeights(NamedTuple):
    """A norm of hidden states; without a weight it only norms."""

    weight: Tensor | None  # [hidden]
    bias: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class PlainLayer:
    """Attention a and feed-forward block m around the residual h; norms that are None are left out:

        h += attention_norm(a(input_norm(h)));  h += mlp_norm(m(post_norm(h)))

    in a parallel stack h += a(input_norm(h)) + m(post_norm(h)), m's norm being a's where it has none.

    `qkv` gives [query | key | value] heads, `up` what is activated, [gate | up] in a gated block; the
    rows of `output` and `down` are sums over the ranks. `rotation` says by which of a step's angles
    heads are turned, if they are; before that, with query and key norms, they are normed.
    """

    input_norm: NormWeights | None
    qkv: PackedLinear
    attention: AttentionSpec
    output: PackedLinear
    attention_norm: NormWeights | None = None
    post_norm: NormWeights | None
    up: PackedLinear
    down: PackedLinear
    mlp_norm: NormWeights | None = None
    key_pool: Tensor
    value_pool: Tensor
    query_norm: Tensor | None = None  # [D], or [H, D]
    key_norm: Tensor | None = None  # [D], or [K, D]
    rotation: int | None = 0


class HeadWidth(NamedTuple):
    """Of a norm over all heads of all ranks together."""

    query: int  # elements
    key: int
    counts_keys: bool  # of the ranks that share a key/value head, one counts it


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class PlainStack:
    """Layers and the norm behind them, None where further layers follow elsewhere.

    Sizes are those of this rank.
    """

    layers: Sequence[PlainLayer]
    final_norm: NormWeights | None
    norm_eps: float
    norm_offset: float
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    norm: str = "rms"  # or "layer"
    parallel: bool = False
    gated: bool = True
    activation: str = "silu"
    residual_scale: float = 1.0
    """Of all that is added to h."""
    clip: float = 0.0
    """Queries, keys and values are clamped to it; 0 = not."""
    head_width: HeadWidth | None = None
    """Query and key norms are one over all heads, not one for each."""


@dataclass(frozen=True, slots=True)
class SharedSegment:
    """Shared memory of the ranks of one node.

    `size` counters of 8 bytes, one every 64 bytes, then slots [2, size, slot_bytes]. At call n a
    rank writes its slot n % 2, sets its counter to n, waits until all counters are n and adds
    the slots in rank order.
    """

    address: int
    rank: int
    size: int
    slot_bytes: int
    timeout_s: float


@dataclass(frozen=True, slots=True)
class Reduction:
    """How a rank's parts become sums: alone, through a segment, or by a function."""

    segment: SharedSegment | None = None
    function: Callable[[Tensor], Tensor] | None = None


class PeerLost(Exception):
    """A rank did not come to a sum in time; holds its number."""

    def __init__(self, rank: int) -> None:
        super().__init__(f"rank {rank} did not come to a sum")
        self.rank = rank


class StackProgram(Protocol):
    """A stack that is ready to run."""

    def __call__(
        self,
        x: Tensor,
        angles: Sequence[tuple[Tensor, Tensor]],
        slots: Tensor,
        plan: AttentionPlan,
        rows: Tensor,
    ) -> Tensor:
        """x [T, hidden] -> normed hidden states of `rows` (int64, each once), [rows, hidden].

        x: embeddings, or what the stack before has answered. Without a final norm the answer is
        not normed and float32, so that stacks that follow one another compute what one would.
        angles: pairs of cos, sin [T, rotary / 2], which layers choose from; slots int64 [T]. Raises
        `PeerLost`.
        """


@runtime_checkable
class FusingBackend(KernelBackend, Protocol):
    """A backend with this capability."""

    def fuse(self, stack: PlainStack, reduction: Reduction) -> StackProgram | None:
        """The stack as a program; None where this backend cannot run it whole."""


class PeerBuffers(NamedTuple):
    """A buffer of the same shape on every rank of a node, as symmetric memory gives it.

    `addresses` and `signals` are int64 [size] on the device: where each rank's buffer and its
    signal pad (uint32, zeros at rest) stand in this process. None of `signals` = no barrier:
    somebody else sees to it that the buffers are complete.
    """

    rank: int
    local: Tensor  # [rows, n], this rank's own
    addresses: Tensor
    signals: Tensor | None


@runtime_checkable
class PeerSummingBackend(KernelBackend, Protocol):
    """A backend that sums over the ranks of a node by reading their memory."""

    def all_reduce_add_rms_norm(
        self,
        peers: PeerBuffers,
        residual: Tensor,
        weight: Tensor,
        eps: float,
        offset: float = 0.0,
    ) -> tuple[Tensor, Tensor]:
        """`add_rms_norm` of the sum of all ranks' first len(residual) rows, in rank order.

        The sum is written into residual. A buffer may be written again once a later call on
        another buffer has begun: two in turn are enough.
        """


@runtime_checkable
class PeerRoundingBackend(PeerSummingBackend, Protocol):
    """A `PeerSummingBackend` that can round what it normed in the same call."""

    def all_reduce_add_rms_norm_quantize(
        self,
        peers: PeerBuffers,
        residual: Tensor,
        weight: Tensor,
        eps: float,
        offset: float = 0.0,
    ) -> tuple[Float8Rows, Tensor]:
        """As `all_reduce_add_rms_norm`, its first result rounded to float8."""
