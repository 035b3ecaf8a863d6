"""Workloads as other benchmarks write them: read into entries that say what to send, and when.

One JSON object a line, or a JSON list of them, all of one of these kinds:

- conversations of ShareGPT, `{"conversations": [{"value": "..."}, {"value": "..."}]}`; the first
  question and its answer count;
- prompts of `vllm bench` and guidellm, `{"prompt": "...", "output_tokens": 64}`;
- lengths, `{"prompt_tokens": 120, "output_tokens": 64}`;
- a trace as Mooncake published them, `{"timestamp": 27000, "input_length": 6758,
  "output_length": 500, "hash_ids": [0, 1, ...]}`: milliseconds, and an id for every 512 tokens of
  the prompt, the same for the same tokens.

Or, in place of a file, guidellm's synthetic data: "prompt_tokens=256,prompt_tokens_stdev=32,..."
or the same as a JSON object.
"""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phalanx.protos.errors import ConfigError

TRACE_BLOCK_TOKENS = 512
DEFAULT_OUTPUT_TOKENS = 128
MAX_LENGTH = 10_000_000
PROMPTS = ("prompt", "text", "input")
INPUT_COUNTS = ("prompt_tokens", "input_length", "input_tokens", "prompt_tokens_count")
OUTPUT_COUNTS = (
    "output_tokens",
    "output_length",
    "output_tokens_count",
    "completion_tokens",
    "max_tokens",
)
SIZES = ("prompt_tokens", "output_tokens")
KINDS = (
    "conversations of ShareGPT, objects with prompt and output_tokens, with prompt_tokens and "
    "output_tokens, or with timestamp, input_length, output_length and hash_ids"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One request of a workload."""

    prompt: int | str
    """Its tokens' number, or its text."""
    output: int | str
    """How many tokens to write, or a recorded answer of that length."""
    time_s: float | None = None
    """When it is due, seconds from the trace's own zero."""
    blocks: tuple[int, ...] = ()
    """Ids of the prompt's pieces of `TRACE_BLOCK_TOKENS`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Lengths of a normal distribution, rounded, and cut to [low, high]."""

    mean: int
    deviation: float = 0.0
    low: int = 1
    high: int = MAX_LENGTH

    def draw(self, source: random.Random) -> int:
        """One length."""
        if self.deviation == 0.0:
            return min(max(self.mean, self.low), self.high)
        return min(max(round(source.gauss(self.mean, self.deviation)), self.low), self.high)


@dataclass(frozen=True, slots=True)
class Synthetic:
    """Prompts of random tokens, of drawn lengths."""

    prompt: Spread
    output: Spread

    def draw(self, count: int, seed: int) -> list[Entry]:
        """So many entries; the same seed gives the same ones."""
        source = random.Random(f"synthetic {seed}")
        return [
            Entry(prompt=self.prompt.draw(source), output=self.output.draw(source))
            for _ in range(count)
        ]


def read_workload(text: str) -> Synthetic | list[Entry]:
    """What `--workload` names: a file, or a description of synthetic data.

    Raises `ConfigError` naming the entry and what is allowed.
    """
    path = Path(text)
    described = _described(text)
    if described is not None and not path.exists():
        return _synthetic(described)
    entries = [_entry(path, number, item) for number, item in enumerate(_objects(path), 1)]
    if not entries:
        raise ConfigError(f"workload is {path}, which holds no entry; allowed: {KINDS}")
    timed = sum(entry.time_s is not None for entry in entries)
    if timed not in (0, len(entries)):
        raise ConfigError(f"workload is {path}, of which {timed} entries have a timestamp, not all")
    if timed:
        entries.sort(key=lambda entry: entry.time_s or 0.0)
    return entries


def _described(text: str) -> dict[str, Any] | None:
    """Fields of a description; None for what can only be a file's name."""
    if text.lstrip().startswith("{"):
        try:
            found = json.loads(text)
        except ValueError as error:
            raise ConfigError(f"workload is {text[:80]!r}, which is not JSON: {error}") from None
        return dict(found)
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(separator for _, separator, _ in pairs):
        return None
    return {name.strip(): value.strip() for name, _, value in pairs}


def _synthetic(fields: dict[str, Any]) -> Synthetic:
    """Raises `ConfigError` for unknown fields and values that are no lengths."""
    parts = ("", "_stdev", "_min", "_max")
    allowed = [name + part for name in SIZES for part in parts]
    unknown = sorted(set(fields) - set(allowed))
    missing = [name for name in SIZES if name not in fields]
    if unknown or missing:
        raise ConfigError(
            f"workload: {', '.join(unknown or missing)}: {'no such field' if unknown else 'missing'}; "
            f"allowed: {', '.join(allowed)}"
        )
    numbers = {name: _number(name, value) for name, value in fields.items()}

    def spread(name: str) -> Spread:
        low, high = numbers.get(name + "_min", 1), numbers.get(name + "_max", MAX_LENGTH)
        if not low <= high:
            raise ConfigError(f"workload: {name}_min is {low:g}, allowed: at most {name}_max")
        return Spread(
            mean=int(numbers[name]),
            deviation=numbers.get(name + "_stdev", 0.0),
            low=int(low),
            high=int(high),
        )

    return Synthetic(spread("prompt_tokens"), spread("output_tokens"))


def _number(name: str, value: Any) -> float:
    low = 0 if name.endswith("_stdev") else 1
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    whole = name.endswith("_stdev") or number.is_integer()
    if not low <= number <= MAX_LENGTH or not whole:
        raise ConfigError(f"workload: {name} is {value!r}, allowed: {low} to {MAX_LENGTH}")
    return number


def _objects(path: Path) -> list[Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"workload is {path}, which cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"workload is {path}, which is not UTF-8 text") from None
    try:
        if text.lstrip().startswith("["):
            return list(json.loads(text))
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"workload is {path}, which is not JSON: {error}") from None


def _entry(path: Path, number: int, item: Any) -> Entry:
    entry = _turns(item) if isinstance(item, dict) and "conversations" in item else _plain(item)
    if entry is None:
        shown = json.dumps(item)[:120]
        raise ConfigError(f"workload is {path}, whose entry {number} is {shown}; allowed: {KINDS}")
    return entry


def _turns(item: dict[str, Any]) -> Entry | None:
    turns = item["conversations"]
    if not isinstance(turns, list) or len(turns) < 2:
        return None
    texts = [turn.get("value") if isinstance(turn, dict) else None for turn in turns[:2]]
    if not all(isinstance(text, str) and text for text in texts):
        return None
    return Entry(prompt=str(texts[0]), output=str(texts[1]))


def _plain(item: Any) -> Entry | None:
    if not isinstance(item, dict):
        return None
    texts = [item[name] for name in PROMPTS if name in item]
    counts = [item[name] for name in INPUT_COUNTS if name in item]
    outputs = [item[name] for name in OUTPUT_COUNTS if name in item]
    time, blocks = item.get("timestamp"), item.get("hash_ids") or []
    prompt = (texts or counts or [None])[0]
    output = outputs[0] if outputs else DEFAULT_OUTPUT_TOKENS if texts else None
    known = isinstance(prompt, str) and prompt != "" if texts else _is_length(prompt)
    timed = time is None or (_is_finite(time) and time >= 0)
    numbered = isinstance(blocks, list) and all(type(block) is int for block in blocks)
    if prompt is None or output is None:
        return None
    if not (known and _is_length(output) and timed and numbered):
        return None
    return Entry(
        prompt=prompt,
        output=output,
        time_s=None if time is None else time / 1000,
        blocks=tuple(blocks),
    )


def _is_length(value: Any) -> bool:
    return type(value) is int and 1 <= value <= MAX_LENGTH


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
