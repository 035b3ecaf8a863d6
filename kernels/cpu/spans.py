"""A step's sequences as the compiled library reads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from phalanx.kernels.interface import SequenceSpan

from .library import Spans


@dataclass(frozen=True, slots=True)
class NativePlan:
    """A step's spans; the arrays keep alive what the table points to."""

    spans: Sequence[SequenceSpan]
    block_size: int
    table: Spans
    arrays: tuple[np.ndarray, np.ndarray] = field(repr=False)

    @classmethod
    def of(cls, spans: Sequence[SequenceSpan], block_size: int) -> NativePlan:
        """The plan of a step."""
        count = len(spans)
        rows: list[int] = []
        blocks: list[int] = []
        for span in spans:
            rows += (span.start, span.num_query, span.length, len(blocks))
            blocks += span.blocks
        columns = np.ascontiguousarray(np.array(rows, dtype=np.int32).reshape(count, 4).T)
        flat = np.array(blocks, dtype=np.int32)
        places = (columns.ctypes.data + row * columns.strides[0] for row in range(4))
        table = Spans(count, *places, flat.ctypes.data)
        return cls(spans, block_size, table, (columns, flat))
