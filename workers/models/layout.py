"""How a checkpoint stores a projection, as data: fused, interleaved, transposed, permuted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from phalanx.workers.checkpoint.slices import Array


@dataclass(frozen=True, slots=True)
class Layout:
    """Where a projection's rows lie in a tensor that may hold more than them.

    Row r of the projection is row `offset + (r // run) * stride + r % run` of the tensor; a `run`
    of 0 is one run without end. A `transposed` tensor is stored [in, out]. `shift` is added to
    every value. `heads_as_rows`: a row is a head, [heads, head_dim]. With an `entry`, the tensor is
    that one of a stack; the layouts of experts say 0, and each takes its own.
    """

    offset: int = 0
    run: int = 0
    stride: int = 0
    transposed: bool = False
    shift: float = 0.0
    heads_as_rows: bool = False
    entry: int | None = None

    def runs(self, start: int, stop: int) -> list[tuple[int, int]]:
        """The tensor's rows [first, last) that hold rows [start, stop) of the projection."""
        if self.run == 0:
            return [(self.offset + start, self.offset + stop)] if stop > start else []
        found = []
        while start < stop:
            group, inside = divmod(start, self.run)
            size = min(self.run - inside, stop - start)
            first = self.offset + group * self.stride + inside
            found.append((first, first + size))
            start += size
        return found


Layouts = Mapping[str, Layout]
"""By role, a field of `LayerNames`; a bias lies as its weight does."""
PLAIN = Layout()
NO_LAYOUTS: Layouts = MappingProxyType({})


def side_by_side(sizes: Mapping[str, int], *, transposed: bool = False) -> dict[str, Layout]:
    """Projections one after the other in one tensor, `sizes` rows each."""
    layouts, offset = {}, 0
    for role, size in sizes.items():
        layouts[role] = Layout(offset=offset, transposed=transposed)
        offset += size
    return layouts


def grouped_heads(queries: int, head_dim: int) -> dict[str, Layout]:
    """[groups, queries + 2, head_dim]: the query heads of a group, then its key and value head."""
    stride = (queries + 2) * head_dim
    return {
        "query": Layout(run=queries * head_dim, stride=stride),
        "key": Layout(offset=queries * head_dim, run=head_dim, stride=stride),
        "value": Layout(offset=(queries + 1) * head_dim, run=head_dim, stride=stride),
    }


def unpermute_heads(rows: Array, head_dim: int, rotary_dim: int | None = None) -> Array:
    """Query or key rows from interleaved order to halves: [heads * head_dim, ...], same shape.

    Checkpoints that rotate neighbouring elements store row 2i of a head from row i of its first
    half and row 2i + 1 from row i of its second half; with `rotary_dim`, only that many leading
    rows of every head. Any whole number of heads may be given; a bias (one dimension) is treated
    alike.
    """
    if rows.shape[0] % head_dim:
        raise ValueError(f"{rows.shape[0]} rows are not whole heads of {head_dim}")
    rotary_dim = head_dim if rotary_dim is None else rotary_dim
    heads = rows.reshape(-1, head_dim, *rows.shape[1:])
    turned = heads[:, :rotary_dim].reshape(-1, rotary_dim // 2, 2, *rows.shape[1:])
    result = heads.copy()
    result[:, :rotary_dim] = turned.swapaxes(1, 2).reshape(-1, rotary_dim, *rows.shape[1:])
    return result.reshape(rows.shape)
