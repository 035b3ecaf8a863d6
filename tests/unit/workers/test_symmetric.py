"""Which way a message is summed among the GPUs of a node."""

from __future__ import annotations

import pytest

from phalanx.workers.symmetric import MIB, way


@pytest.mark.parametrize(
    ("size", "message", "expected"),
    [
        (2, 8192, "one-shot"),
        (2, 2 * MIB, "one-shot"),
        (2, 3 * MIB, "two-shot"),
        (3, 8192, "one-shot"),
        (4, MIB, "two-shot"),
        (8, MIB // 4, "one-shot"),
        (8, MIB // 2, "two-shot"),
        (16, 8192, "two-shot"),
        (2, 4 * MIB + 1, "group"),
        (16, 64 * MIB, "group"),
    ],
)
def test_small_ones_at_once_large_ones_in_parts(size: int, message: int, expected: str) -> None:
    assert way(size, message, 4 * MIB) == expected
