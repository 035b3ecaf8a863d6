"""Groups of rank threads, and a sampler over the whole vocabulary in plain numpy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from phalanx.protos.sampling import SamplingParams
from phalanx.protos.shards import Span
from phalanx.workers.parallel import ThreadRank
from phalanx.workers.sampling.sampler import Sampler, SampleRow

EOS = (1,)


class CountingRank(ThreadRank):
    """Counts its collectives."""

    calls = 0

    def all_gather(self, tensor: Tensor) -> Tensor:
        self.calls += 1
        return super().all_gather(tensor)


class Group:
    """Samplers on threads, one for each slice of the vocabulary."""

    def __init__(self, sizes: Sequence[int], eos: tuple[int, ...] = EOS) -> None:
        stops = np.cumsum(sizes).tolist()
        self.spans = [Span(stop - size, stop) for stop, size in zip(stops, sizes, strict=True)]
        self.ranks = CountingRank.group(len(sizes))
        self.samplers = [
            Sampler(rank, span, stops[-1], eos)
            for rank, span in zip(self.ranks, self.spans, strict=True)
        ]

    def on_all(self, logits: Tensor, call: Callable[[Sampler, Tensor], Any]) -> Any:
        """Run `call(sampler, slice)` on every rank; the one result that all ranks must share."""
        with ThreadPoolExecutor(len(self.spans)) as pool:
            jobs = [
                pool.submit(call, sampler, logits[:, span.start : span.stop].clone())
                for sampler, span in zip(self.samplers, self.spans, strict=True)
            ]
            errors = [job.exception() for job in jobs]
        if any(errors):
            assert {repr(error) for error in errors} == {repr(errors[0])}
            raise errors[0]
        results = [job.result() for job in jobs]
        assert all(result == results[0] for result in results)
        return results[0]

    def sample(self, logits: Tensor, rows: Sequence[SampleRow]) -> Any:
        return self.on_all(logits, lambda sampler, part: sampler.sample(part, rows))

    def score(self, logits: Tensor, targets: Sequence[int], top: int) -> Any:
        return self.on_all(logits, lambda sampler, part: sampler.score(part, targets, top))

    @property
    def calls(self) -> int:
        """Collectives so far, equal on every rank."""
        counts = {rank.calls for rank in self.ranks}
        assert len(counts) == 1
        return counts.pop()


def full_gumbel(key: int, vocab_size: int) -> np.ndarray:
    """Noise of every token: SplitMix64 written down once more, in unsigned numpy arithmetic."""
    with np.errstate(over="ignore"):
        z = np.uint64(key % 2**64) + np.arange(1, vocab_size + 1, dtype=np.uint64) * np.uint64(
            0x9E3779B97F4A7C15
        )
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    v = ((z >> np.uint64(12)).astype(np.float64) + 0.5) / 2.0**52
    return -np.log(-np.log1p(-v))


def processed(logits: np.ndarray, row: SampleRow) -> np.ndarray:
    """One row's logits after penalties, biases and bans, token by token."""
    params, tokens = row.params, list(row.token_ids)
    output = tokens[row.num_prompt :]
    x = logits.astype(np.float32).copy()
    for token in set(tokens):
        penalty = np.float32(params.repetition_penalty)
        x[token] = x[token] / penalty if x[token] > 0 else x[token] * penalty
    for token in set(output):
        count = output.count(token)
        x[token] -= np.float32(params.frequency_penalty * count + params.presence_penalty)
    for token, bias in params.logit_bias.items():
        x[token] += np.float32(bias)
    banned = set()
    if len(output) < params.min_tokens:
        banned |= set(params.stop_token_ids) | (set() if params.ignore_eos else set(EOS))
    for word in params.bad_words_ids:
        known = len(word) - 1
        if tuple(tokens[len(tokens) - known :]) == word[:-1]:
            banned.add(word[-1])
    size = params.no_repeat_ngram_size
    if size and len(tokens) >= size:
        tail = tokens[len(tokens) - size + 1 :]
        for start in range(len(tokens) - size + 1):
            if tokens[start : start + size - 1] == tail:
                banned.add(tokens[start + size - 1])
    x[list(banned)] = -np.inf
    return x


def filtered(x: np.ndarray, params: SamplingParams) -> np.ndarray:
    """Ids that the filters keep, best first."""
    x = x.astype(np.float64)
    order = np.lexsort((np.arange(x.size), -x))
    order = order[np.isfinite(x[order])]
    if params.top_k:
        order = order[: params.top_k]
    weights = np.exp((x[order] - x[order[0]]) / params.temperature)
    if params.top_p < 1.0:
        goal = params.top_p * weights.sum() * (1 - 1e-12)
        order = order[: int((weights.cumsum() < goal).sum()) + 1]
    if params.min_p > 0.0:
        floor = x[order[0]] + params.temperature * np.log(params.min_p)
        order = order[x[order] >= floor]
    return order


def expected_token(logits: np.ndarray, row: SampleRow, key: int) -> int:
    """What the whole-vocabulary sampler draws."""
    x = processed(logits, row)
    if row.params.temperature == 0.0:
        return int(np.argmax(x))
    keep = filtered(x, row.params)
    raced = np.full(x.size, -np.inf)
    noise = full_gumbel(key, x.size)
    raced[keep] = x[keep].astype(np.float64) + row.params.temperature * noise[keep]
    return int(np.argmax(raced))


@pytest.fixture(scope="session")
def group() -> type[Group]:
    return Group


@pytest.fixture(scope="session")
def row() -> Callable[..., SampleRow]:
    def make(
        tokens: Sequence[int] = (5, 6, 7), num_prompt: int = 3, sample_index: int = 0, **params: Any
    ) -> SampleRow:
        return SampleRow(list(tokens), num_prompt, SamplingParams(**params), sample_index)

    return make


class Reference:
    """The whole-vocabulary model of every step."""

    gumbel = staticmethod(full_gumbel)
    processed = staticmethod(processed)
    filtered = staticmethod(filtered)
    token = staticmethod(expected_token)


@pytest.fixture(scope="session")
def reference() -> type[Reference]:
    return Reference


@pytest.fixture(scope="session")
def random_logits() -> Callable[..., Tensor]:
    def make(rows: int, vocab_size: int, seed: int = 0, scale: float = 3.0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(rows, vocab_size, generator=generator) * scale

    return make


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
