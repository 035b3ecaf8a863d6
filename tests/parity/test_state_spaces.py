"""Models with state spaces behind the real scheduler, against `transformers` on the same weights."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from phalanx.protos.sampling import SamplingParams

SIZES = {
    "hidden_size": 45,
    "num_hidden_layers": 2,
    "state_size": 7,
    "vocab_size": 515,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba": ("MambaConfig", SIZES | {"time_step_rank": 5}),
    "mamba2": ("Mamba2Config", SIZES | {"num_heads": 9, "head_dim": 10, "n_groups": 3}),
}
LENGTHS = (70, 1, 23, 4, 37)
PROMPTS = [[(7 * i * i + 3 * i + length) % 515 for i in range(length)] for length in LENGTHS]

Make = Callable[..., Any]


def greedy(count: int = 12, **given: Any) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, **given)


@pytest.fixture(params=MODELS)
def model(
    request: Any, random_model: Make, tiny_llama: Make, tmp_path: Path, one_thread: None
) -> Any:
    """A random model, its folder with a tokenizer."""
    kind, fields = MODELS[request.param]
    made = random_model(kind, **fields)
    folder = tmp_path / "model"
    shutil.copytree(made.folder, folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_llama() / name, folder / name)
    made.served = folder
    return made


def check(model: Any, prompts: Sequence[list[int]], outputs: Sequence[list[int]]) -> None:
    """Every token is the one that `transformers` finds most likely."""
    for prompt, output in zip(prompts, outputs, strict=True):
        expected = model.logprobs(prompt + output)[len(prompt) - 1 : -1].argmax(-1)
        assert output == expected.tolist()


@pytest.mark.parametrize(("tp", "budget"), [(1, 5), (1, 256), (2, 7), (3, 13), (4, 33)])
def test_any_chunks_in_any_company(local_replica: Make, model: Any, tp: int, budget: int) -> None:
    run = local_replica(
        model.served, tp=tp, block_size=4, max_tokens_per_step=budget, max_running=5
    )
    check(model, PROMPTS, run.tokens([(prompt, greedy()) for prompt in PROMPTS]))


def test_stages_carry_their_own_layers_states(local_replica: Make, model: Any) -> None:
    """Twice: the second time from kept states, while micro-batches follow one another."""
    run = local_replica(model.served, tp=2, pp=2, block_size=4, max_running=5, num_states=7)
    for _ in range(2):
        check(model, PROMPTS, run.tokens([(prompt, greedy()) for prompt in PROMPTS]))
    assert run.scheduler.stats().prefix_hit > 0


@pytest.mark.parametrize("tp", [1, 3])
def test_a_kept_state_gives_the_same_tokens_for_less(
    local_replica: Make, model: Any, tp: int
) -> None:
    run = local_replica(model.served, tp=tp, block_size=4, max_running=4)
    prompt = PROMPTS[0]
    longer = prompt + PROMPTS[2]
    spared = []
    for asked in (prompt, prompt, longer, longer):
        events = run.generate([(asked, greedy())])[0][0]
        check(model, [asked], [[token.token_id for event in events for token in event.tokens]])
        spared.append(events[0].cached_prompt_tokens)
    assert spared == [0, 68, 68, 92]
    assert run.scheduler.stats().prefix_hit == sum(spared)


def test_who_gives_way_goes_on_as_before(local_replica: Make, model: Any) -> None:
    run = local_replica(
        model.served, block_size=4, num_blocks=32, max_running=5, reserve_tokens=1, num_states=6
    )
    check(model, PROMPTS, run.tokens([(prompt, greedy(40)) for prompt in PROMPTS]))
    assert run.scheduler.stats().preemptions > 0


@pytest.mark.parametrize("num_states", [1, 2, 8])
def test_forks_do_not_share_their_states(local_replica: Make, model: Any, num_states: int) -> None:
    """Each sample is the one of a lone run, as many as may run together."""
    run = local_replica(model.served, tp=2, block_size=4, max_running=6, num_states=num_states)
    params = SamplingParams(n=4, seed=5, max_tokens=10, ignore_eos=True, logprobs=1)
    samples = run.generate([(PROMPTS[2], params)])[0]
    outputs = [[t.token_id for event in events for t in event.tokens] for events in samples]
    assert len({tuple(output) for output in outputs}) == 4
    for events, output in zip(samples, outputs, strict=True):
        expected = model.logprobs(PROMPTS[2] + output)[len(PROMPTS[2]) - 1 : -1]
        found = [token for event in events for token in event.tokens]
        for row, token in zip(expected, found, strict=True):
            assert token.logprob.logprob == pytest.approx(float(row[token.token_id]), abs=1e-4)
    alone = local_replica(model.served, block_size=4, max_running=1, prefix_caching=False)
    again = alone.generate([(PROMPTS[2], params)])[0]
    assert outputs == [[t.token_id for event in events for t in event.tokens] for events in again]


def test_steps_with_states_are_not_recorded(local_replica: Make, model: Any) -> None:
    recorder = object()  # can do nothing
    run = local_replica(model.served, tp=2, recorder=recorder)
    check(model, PROMPTS[:3], run.tokens([(prompt, greedy()) for prompt in PROMPTS[:3]]))
