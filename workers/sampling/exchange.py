"""Several small tensors in one collective."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from phalanx.workers.parallel import TensorParallel

PIECE = 1 << 16  # float64 elements a collective carries at most


def exchange(group: TensorParallel, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gather each of `parts` from all ranks: [...] -> float64 [size, ...] in host memory.

    Names, their order and shapes are equal on all ranks. Token ids and float32 values pass
    through float64 unchanged. One collective, or more beyond `PIECE` elements.
    """
    flat = torch.cat([part.reshape(-1).to(torch.float64) for part in parts.values()])
    if flat.numel() <= PIECE:
        gathered = group.all_gather(flat)
    else:
        gathered = torch.cat([group.all_gather(piece) for piece in torch.split(flat, PIECE)], dim=1)
    pieces = torch.split(gathered.cpu(), [part.numel() for part in parts.values()], dim=1)
    return {
        name: piece.reshape(gathered.shape[0], *part.shape)
        for piece, (name, part) in zip(pieces, parts.items(), strict=True)
    }
