"""Requests of recorded shapes: conversations, shared instructions, questions to long documents."""

from __future__ import annotations

import itertools
import math
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from random import Random

import numpy as np

from phalanx.protos.errors import ConfigError

BLOCK_TOKENS = 128
"""Tokens of a named block."""
MAX_CONTEXT = 65_536


@dataclass(slots=True)
class Turn:
    """One request."""

    session: Session
    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    last: bool

    @property
    def prompt_blocks(self) -> int:
        """How many blocks can be looked up: all full ones of the prompt but for the last token."""
        return (self.prompt_tokens - 1) // BLOCK_TOKENS

    @property
    def full_blocks(self) -> int:
        """Full blocks of prompt and answer."""
        return (self.prompt_tokens + self.output_tokens) // BLOCK_TOKENS

    @property
    def keys(self) -> array[int]:
        """Names of the full blocks, in order."""
        return self.session.names(0, self.full_blocks)

    @property
    def prompt_keys(self) -> array[int]:
        """Names of those that can be looked up."""
        return self.session.names(0, self.prompt_blocks)


@dataclass(slots=True)
class Session:
    """What one user asks, each turn repeating all that was said."""

    number: int
    tenant: str
    shared: list[int]
    """Blocks that it begins with, which other sessions have too. Two such lists are equal or have
    nothing in common."""
    turns: list[tuple[int, int, float]]
    """(new prompt tokens, output tokens, seconds before the question) of each turn."""
    told: int = 0
    """Tokens of the conversation so far."""
    known: int = 0
    """Full blocks of it that were computed before, by whomever."""
    _names: array[int] = field(default_factory=lambda: array("Q"))

    def ask(self, now: float) -> Turn:
        """The next turn."""
        prompt, output, _ = self.turns.pop(0)
        told = (self.told or len(self.shared) * BLOCK_TOKENS) + prompt
        self.told = told + output
        return Turn(self, now, told, output, not self.turns)

    def names(self, start: int, stop: int) -> array[int]:
        """Of these blocks of the conversation; made when they are first asked for."""
        if len(self._names) < stop:
            own = stop - len(self.shared)
            self._names = array("Q", self.shared)
            if own > 0:
                self._names.extend(_names(self.number, own + own // 4 + 2))
        return self._names[start:stop]

    @property
    def pause_s(self) -> float:
        """Seconds before the next question."""
        return self.turns[0][2]


_WORD = 2**64 - 1
_GAMMA, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def _names(seed: int, count: int) -> list[int]:
    """Names that no other seed has (splitmix64: Steele, Lea and Flood 2014)."""
    if count < 12:
        first = (seed + 1) << 20
        return [_mixed((first + place) * _GAMMA & _WORD) for place in range(1, count + 1)]
    word = np.arange(1, count + 1, dtype=np.uint64) + np.uint64((seed + 1) << 20)
    word = word * np.uint64(_GAMMA)
    word = (word ^ (word >> np.uint64(30))) * np.uint64(_FIRST)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(_SECOND)
    names: list[int] = (word ^ (word >> np.uint64(31))).tolist()
    return names


def _mixed(word: int) -> int:
    word = (word ^ word >> 30) * _FIRST & _WORD
    word = (word ^ word >> 27) * _SECOND & _WORD
    return word ^ word >> 31


def _lognormal(random: Random, median: float, sigma: float, most: int) -> int:
    return min(max(round(random.lognormvariate(math.log(median), sigma)), 8), most)


def _zipf(random: Random, weights: list[float]) -> int:
    return random.choices(range(len(weights)), cum_weights=weights)[0]


def chat(seed: int) -> Iterator[Session]:
    """Conversations of 1 to some 12 turns; one in two begins with one of 20 instructions."""
    random = Random(seed)
    instructions = [_names((1 << 30) + index, 4 + index % 8) for index in range(20)]
    for number in itertools.count():
        turns = min(1 + int(random.expovariate(1 / 4)), 12)
        yield Session(
            number,
            f"tenant-{number % 50}",
            random.choice(instructions) if number % 2 else [],
            [
                (
                    _lognormal(random, 120, 1.0, 4000),
                    _lognormal(random, 200, 0.7, 1000),
                    random.expovariate(1 / 5),
                )
                for _ in range(turns)
            ],
        )


def shared(seed: int) -> Iterator[Session]:
    """Single requests to 2,000 applications of very different popularity, each with instructions
    of 1,000 to 5,000 tokens."""
    random = Random(seed)
    weights = list(itertools.accumulate(1 / (1 + rank) for rank in range(2000)))
    instructions = [_names((1 << 30) + rank, random.randint(8, 40)) for rank in range(2000)]
    for number in itertools.count():
        which = _zipf(random, weights)
        prompt, output = _lognormal(random, 150, 0.8, 2000), _lognormal(random, 120, 0.8, 800)
        yield Session(number, f"tenant-{which}", instructions[which], [(prompt, output, 0.0)])


def documents(seed: int) -> Iterator[Session]:
    """One to eight questions to a document of 4,000 to 40,000 tokens."""
    random = Random(seed)
    for number in itertools.count():
        turns = random.randint(1, 8)
        pages = _lognormal(random, 12_000, 0.6, 40_000)
        questions = [
            (
                _lognormal(random, 60, 0.5, 400),
                _lognormal(random, 180, 0.6, 800),
                random.expovariate(1 / 5),
            )
            for _ in range(turns)
        ]
        first, output, pause = questions[0]
        questions[0] = (first + pages, output, pause)
        yield Session(number, f"tenant-{number % 50}", [], questions)


TRACES: dict[str, Callable[[int], Iterator[Session]]] = {
    "chat": chat,
    "shared": shared,
    "documents": documents,
}


def check_trace(name: str) -> None:
    """Raises `ConfigError` where there is no such trace."""
    if name not in TRACES:
        raise ConfigError(f"trace: {name!r} is not known; there are {', '.join(TRACES)}")
