"""What is asked: how long prompts and outputs are, and when requests are due."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phalanx.protos.errors import ConfigError

FORMATS = (
    'one JSON object a line, {"prompt_tokens": 120, "output_tokens": 64}, or conversations as '
    'ShareGPT has them, {"conversations": [{"from": "human", "value": "..."}, '
    '{"from": "gpt", "value": "..."}]}'
)


@dataclass(frozen=True, slots=True)
class Length:
    """A request's size in tokens; exactly `output` are written when ends are ignored."""

    prompt: int
    output: int


@dataclass(frozen=True, slots=True)
class Turn:
    """A recorded question and its answer, as texts; a tokenizer knows their lengths."""

    prompt: str
    output: str


@dataclass(frozen=True, slots=True)
class Job:
    """One request to be sent: the prompt's token ids, and how many tokens to write."""

    prompt: Sequence[int]
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Span:
    """A closed range of token counts, drawn from uniformly."""

    low: int
    high: int

    @classmethod
    def parse(cls, name: str, text: str) -> Span:
        """Read "128" or "64-256". Raises `ConfigError` naming the field `name`."""
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
        low, high = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not 1 <= low <= high:
            raise ConfigError(f"{name} is {text!r}, allowed: a count such as 128 or 64-256")
        return cls(low, high)


def draw_lengths(prompt: Span, output: Span, count: int, seed: int) -> list[Length]:
    """`count` lengths, uniform over both spans. The same seed gives the same lengths."""
    source = random.Random(f"lengths {seed}")
    return [
        Length(source.randint(prompt.low, prompt.high), source.randint(output.low, output.high))
        for _ in range(count)
    ]


def read_recorded(path: Path) -> list[Length | Turn]:
    """Lengths or turns from a file in one of `FORMATS`.

    Of a conversation the first question and its answer count. Raises `ConfigError` for a file
    that cannot be read or an entry of another shape, naming the entry.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"lengths is {path}, which cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"lengths is {path}, which is not UTF-8 text") from None
    try:
        entries = json.loads(text) if text.lstrip().startswith("[") else _lines(text)
    except ValueError as error:
        raise ConfigError(f"lengths is {path}, which is not JSON: {error}") from None
    found = [_entry(path, number, entry) for number, entry in enumerate(entries, 1)]
    if not found:
        raise ConfigError(f"lengths is {path}, which holds no entry; allowed: {FORMATS}")
    return found


def _lines(text: str) -> list[Any]:
    return [json.loads(line) for line in text.splitlines() if line.strip()]


def _entry(path: Path, number: int, entry: Any) -> Length | Turn:
    if isinstance(entry, dict) and "conversations" in entry:
        turns = entry["conversations"]
        if isinstance(turns, list) and len(turns) >= 2:
            question, answer = (
                turn.get("value") if isinstance(turn, dict) else None for turn in turns[:2]
            )
            if isinstance(question, str) and isinstance(answer, str) and question and answer:
                return Turn(question, answer)
    elif isinstance(entry, dict):
        prompt, output = entry.get("prompt_tokens"), entry.get("output_tokens")
        if type(prompt) is int and type(output) is int and prompt >= 1 and output >= 1:
            return Length(prompt, output)
    raise ConfigError(f"lengths is {path}, whose entry {number} is {entry!r}; allowed: {FORMATS}")


def choose(entries: Sequence[Length], count: int, seed: int) -> list[Length]:
    """`count` of the entries in an order drawn with `seed`; all of them before any comes again."""
    source = random.Random(f"order {seed}")
    chosen: list[Length] = []
    while len(chosen) < count:
        chosen += source.sample(entries, len(entries))
    return chosen[:count]


def make_jobs(
    lengths: Iterable[Length], vocab_size: int, excluded: Collection[int], seed: int
) -> list[Job]:
    """Prompts of random token ids, so that no prompt shares a cached prefix with another.

    `excluded` ids (the model's ends) are never in a prompt.
    """
    source = random.Random(f"prompts {seed}")
    allowed = [token for token in range(vocab_size) if token not in excluded]
    return [Job(source.choices(allowed, k=item.prompt), item.output) for item in lengths]


def poisson_arrivals(rate: float, count: int, seed: int) -> list[float]:
    """When `count` requests are due, in seconds from the start: a Poisson process of `rate` a
    second, whose gaps are exponential. The first one is due at once."""
    source = random.Random(f"arrivals {seed}")
    times, now = [], 0.0
    for _ in range(count):
        times.append(now)
        now += source.expovariate(rate)
    return times
