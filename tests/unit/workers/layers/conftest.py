"""Layers on rank threads, filled from whole weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch import Tensor

from phalanx.protos.errors import GroupLost
from phalanx.workers.loading.pieces import Piece
from phalanx.workers.parallel import SingleRank, TensorParallel, ThreadRank


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def on_ranks() -> Callable[[int, Callable[[TensorParallel], Any]], list[Any]]:
    """`on_ranks(size, work)`: the results of `work(group)` on a thread for each rank."""

    def run(size: int, work: Callable[[TensorParallel], Any]) -> list[Any]:
        if size == 1:
            return [work(SingleRank())]
        ranks = ThreadRank.group(size, timedelta(seconds=20))

        def one(rank: ThreadRank) -> Any:
            try:
                return work(rank)
            except BaseException:
                rank._board.barrier.abort()  # else the others wait, once for every example
                raise

        with ThreadPoolExecutor(size) as pool:
            jobs = [pool.submit(one, rank) for rank in ranks]
            errors = [error for job in jobs if (error := job.exception()) is not None]
        if errors:
            raise next((error for error in errors if not isinstance(error, GroupLost)), errors[0])
        return [job.result() for job in jobs]

    return run


@pytest.fixture(scope="session")
def fill() -> Callable[[Sequence[Piece], Mapping[str, Tensor]], None]:
    """Fill pieces with their rectangles of whole tensors, given by checkpoint name."""

    def from_whole(pieces: Sequence[Piece], weights: Mapping[str, Tensor]) -> None:
        for piece in pieces:
            part = weights[piece.source]
            if piece.rows is not None:
                part = part[piece.rows.start : piece.rows.stop]
            if piece.columns is not None:
                part = part[:, piece.columns.start : piece.columns.stop]
            assert part.shape == piece.target.shape
            piece.target.copy_(part)

    return from_whole
