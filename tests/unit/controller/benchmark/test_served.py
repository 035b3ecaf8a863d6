"""A cluster of its own for a benchmark: what happens when it cannot start."""

from __future__ import annotations

import pytest

from phalanx.controller.benchmark.served import served
from phalanx.protos.errors import PhalanxError


def test_a_cluster_that_cannot_start_is_an_error_and_says_why(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with (
        pytest.raises(PhalanxError, match="ended with code 2 before it was ready"),
        served("no-such-model"),
    ):
        pytest.fail("there is nothing to use")
    assert "no-such-model" in capfd.readouterr().err
