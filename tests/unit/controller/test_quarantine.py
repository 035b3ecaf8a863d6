"""Requests that are refused for a while, by what they ask."""

from __future__ import annotations

import pytest

from phalanx.controller.quarantine import Quarantine
from phalanx.protos.errors import SetAside
from phalanx.protos.sampling import SamplingParams

PROMPT = [1, 2, 3]
PARAMS = SamplingParams(max_tokens=5, seed=1)


def test_the_same_is_refused_for_a_while_whatever_its_seed() -> None:
    quarantine = Quarantine(keep_s=10)
    quarantine.check(PROMPT, PARAMS, 0.0)
    quarantine.set_aside(PROMPT, PARAMS, 0.0)
    for seed in (1, 2):
        with pytest.raises(SetAside, match="8 s"):
            quarantine.check(PROMPT, SamplingParams(max_tokens=5, seed=seed), 2.0)
    quarantine.check(PROMPT, PARAMS, 10.0)


def test_others_are_not() -> None:
    quarantine = Quarantine()
    quarantine.set_aside(PROMPT, PARAMS, 0.0)
    quarantine.check([1, 2], PARAMS, 0.0)
    quarantine.check(PROMPT, SamplingParams(max_tokens=6, seed=1), 0.0)


def test_it_has_an_end() -> None:
    """The oldest are let go."""
    quarantine = Quarantine(most=2)
    for token in range(3):
        quarantine.set_aside([token], PARAMS, 0.0)
    quarantine.check([0], PARAMS, 0.0)
    for token in (1, 2):
        with pytest.raises(SetAside):
            quarantine.check([token], PARAMS, 0.0)
