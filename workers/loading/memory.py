"""Memory that is filled once and soon, so that the system had better give it in large pages."""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor

LEAST_BYTES = 4 << 20
"""Below, few of the pages could be large."""


def room(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor without values. On CPUs, touching it first takes the system a quarter of the time
    that pages of 4 KB would."""
    tensor = torch.empty(shape, dtype=dtype, device=device)
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if device.type == "cpu" and advice is not None and tensor.nbytes >= LEAST_BYTES:
        start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        size = tensor.data_ptr() + tensor.nbytes - start
        advise = ctypes.CDLL(None).madvise
        advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        advise(start, size, advice)  # where it is refused, pages are small
    return tensor
