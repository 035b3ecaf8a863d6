"""A rectangle of a checkpoint tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class TensorSlice:
    """`array` holds the values; with dtype "bfloat16" it holds their bits as uint16.

    Other dtypes are "float32" and "float16". The array may be read-only memory of the file.
    """

    array: Array
    dtype: str


def bounds(part: slice | None, size: int) -> tuple[int, int]:
    """(start, stop) of a slice without step inside [0, size]; None is the whole dimension."""
    if part is None:
        return 0, size
    start = 0 if part.start is None else part.start
    stop = size if part.stop is None else part.stop
    if part.step not in (None, 1) or not 0 <= start <= stop <= size:
        raise ValueError(f"{part} is not a run inside [0, {size}]")
    return start, stop


def rectangle(array: Array, rows: slice | None, columns: slice | None) -> Array:
    """The part of a one- or two-dimensional array, as a view."""
    start, stop = bounds(rows, array.shape[0])
    if array.ndim == 1:
        if columns is not None:
            raise ValueError("a one-dimensional tensor has no columns")
        return array[start:stop]
    left, right = bounds(columns, array.shape[1])
    return np.asarray(array[start:stop, left:right])
