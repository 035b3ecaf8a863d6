"""Stages of layers give the tokens that one rank gives, whatever the scheduler does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from phalanx.protos.sampling import SamplingParams

LAYERS = 5


def requests() -> list[tuple[list[int], SamplingParams]]:
    """Prompts of 1 to 60 tokens; greedy, filtered and penalised, several samples, scored."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0, "logprobs": 3},
        {"temperature": 1.0, "n": 3},
        {"temperature": 1.3, "top_k": 40, "prompt_logprobs": 2},
        {"top_p": 0.8, "repetition_penalty": 1.3, "n": 2},
        {"min_p": 0.05, "logprobs": 1},
    ]
    lengths = [60, 1, 33, 7, 18, 2, 45]
    return [
        (
            [(37 * number + 11 * place) % 500 + 3 for place in range(length)],
            SamplingParams(
                seed=number, max_tokens=12, ignore_eos=True, **kinds[number % len(kinds)]
            ),
        )
        for number, length in enumerate(lengths)
    ]


def outcome(run: Any) -> Any:
    """All that callers see of each sample: its tokens, what was scored of its prompt, its end."""

    def seen(events: list[Any]) -> Any:
        runs = [event.prompt_logprobs for event in events if event.prompt_logprobs]
        scored = [pair for run in runs for pair in zip(run.tokens, run.top, strict=True)]
        tokens = [(each.token_id, each.logprob, each.top) for e in events for each in e.tokens]
        return tokens, scored, events[-1].finish

    return [[seen(events) for events in samples] for samples in run.generate(requests())]


@pytest.mark.parametrize(("pp", "tp"), [(2, 1), (3, 1), (5, 1), (2, 2)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_any_number_of_stages_gives_the_same_tokens(
    tiny_llama: Callable[..., Path],
    local_replica: Callable[..., Any],
    pp: int,
    tp: int,
    dtype: str,
) -> None:
    """In chunks of prompts, mixed steps, and with too few blocks, so that samples are preempted."""
    folder = tiny_llama(num_hidden_layers=LAYERS, dtype=dtype)
    sizes = {
        "dtype": dtype,
        "max_tokens_per_step": 24,
        "max_running": 8,
        "block_size": 4,
        "reserve_tokens": 1,
    }
    one = local_replica(folder, tp=tp, **sizes)
    expected = outcome(one)
    for num_blocks in (400, 24):
        run = local_replica(folder, tp=tp, pp=pp, num_blocks=num_blocks, **sizes)
        assert outcome(run) == expected
        assert (run.scheduler.stats().preemptions > 0) == (num_blocks == 24)
        run.replica.stop()
        assert run.replica.lost is not None and "was stopped" in str(run.replica.lost)
