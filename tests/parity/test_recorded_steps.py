"""Recorded decode steps give the tokens of steps that are not recorded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from phalanx.protos.sampling import Grammar, SamplingParams
from phalanx.workers.graphs.device import CallAgain, Work
from phalanx.workers.graphs.steps import Tail


class Counting(CallAgain):
    """Counts what is recorded and what is replayed."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def record(self, work: Work) -> Work:
        replay = super().record(work)
        self.recorded += 1

        def counted() -> None:
            self.replayed += 1
            replay()

        return counted


KINDS: dict[str, list[dict[str, Any]]] = {
    "greedy": [{"temperature": 0.0}, {"temperature": 0.9, "top_k": 1}],
    "drawn": [{}, {"temperature": 0.0}, {"temperature": 0.4}, {"temperature": 5.0}],
    "filtered": [{"top_p": 0.8}, {}, {"temperature": 0.0}, {"top_k": 30, "min_p": 0.02}],
    "penalised": [
        {"repetition_penalty": 1.3},
        {"frequency_penalty": 0.6, "presence_penalty": -0.3, "top_p": 0.9},
        {},
        {"temperature": 0.0, "repetition_penalty": 0.7, "min_tokens": 3},
    ],
    "adjusted": [{"repetition_penalty": 1.3}, {}, {"logit_bias": {7: 6.0}}, {"logprobs": 3}],
    "changing": [{"min_tokens": 9, "stop_token_ids": (3, 4)}, {}, {"prompt_logprobs": 1}],
    "formed": [
        {"temperature": 0.0, "grammar": Grammar("regex", "([a-z]{2} ){9}"), "ignore_eos": False},
        {},
        {"grammar": Grammar("choice", '["yes", "not in the least"]'), "ignore_eos": False},
        {"temperature": 0.0},
    ],
}


def requests(kinds: list[dict[str, Any]], count: int) -> list[tuple[list[int], SamplingParams]]:
    """Prompts of 1 to 30 tokens and outputs of 5 to 24, several samples of some."""
    made = []
    for index in range(count):
        prompt = [(37 * index + 11 * place) % 500 for place in range(1 + 7 * index % 30)]
        kind = {"seed": 100 + index, "max_tokens": 5 + 3 * index % 20, "ignore_eos": True}
        kind |= kinds[index % len(kinds)] | ({"n": 3} if index % 5 == 4 else {})
        made.append((prompt, SamplingParams(**kind)))
    return made


def outputs(run: Any, wanted: list[tuple[list[int], SamplingParams]]) -> list[Any]:
    """Tokens and log-probabilities of all samples."""
    return [
        [
            [(token.token_id, token.logprob) for event in events for token in event.tokens]
            for events in samples
        ]
        for samples in run.generate(wanted)
    ]


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("kinds", KINDS.values(), ids=KINDS.keys())
def test_the_same_tokens(
    tiny_llama: Callable[..., Path],
    local_replica: Callable[..., Any],
    kinds: list[dict[str, Any]],
    tp: int,
) -> None:
    """More requests than may run, prompts in chunks, few blocks: rows come and go."""
    sizes = {"tp": tp, "block_size": 4, "num_blocks": 28, "max_running": 11, "reserve_tokens": 0}
    sizes["max_tokens_per_step"] = 24
    wanted, recorder = requests(kinds, 24), Counting()
    plain = outputs(local_replica(tiny_llama(), **sizes), wanted)
    recorded = local_replica(tiny_llama(), **sizes, recorder=recorder)
    assert outputs(recorded, wanted) == plain
    assert recorded.scheduler.stats().preemptions
    assert recorder.recorded == tp * len(Tail) * len([1, 2, 4, 8, 11])
    assert recorder.replayed > 20 * tp


@pytest.mark.parametrize("kind", ["greedy", "drawn"])
def test_the_same_tokens_in_int8(
    tiny_llama: Callable[..., Path], local_replica: Callable[..., Any], kind: str
) -> None:
    """Weights and caches; unrecorded, the likeliest tokens are found without the logits."""
    sizes = {"tp": 2, "dtype": "int8", "block_size": 4, "num_blocks": 64, "max_running": 5}
    wanted, recorder = requests(KINDS[kind], 8), Counting()
    plain = outputs(local_replica(tiny_llama(), **sizes), wanted)
    assert outputs(local_replica(tiny_llama(), **sizes, recorder=recorder), wanted) == plain
    assert recorder.replayed > 20


def test_stages_record_nothing(
    tiny_llama: Callable[..., Path], local_replica: Callable[..., Any]
) -> None:
    wanted, recorder = requests(KINDS["drawn"], 6), Counting()
    expected = outputs(local_replica(tiny_llama()), wanted)
    assert outputs(local_replica(tiny_llama(), pp=2, recorder=recorder), wanted) == expected
    assert not recorder.recorded
