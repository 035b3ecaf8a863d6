"""Log-probabilities against log-softmax over the whole vocabulary in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

VOCAB = 300
CUTS = [[300], [150, 150], [0, 120, 1, 0, 179]]


def expected_entries(logits: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities, and ids from the best to the worst with ties by id."""
    logprobs = logits.double().log_softmax(-1).numpy()
    return logprobs, np.lexsort((np.arange(logits.numel()), -logits.float().numpy()))


def check(entry, top, logits: torch.Tensor, token_id: int, count: int) -> None:
    logprobs, order = expected_entries(logits)
    assert entry.token_id == token_id
    assert entry.logprob == pytest.approx(logprobs[token_id], abs=1e-6)
    assert entry.rank == order.tolist().index(token_id) + 1
    assert [each.token_id for each in top] == order[:count].tolist()
    assert [each.rank for each in top] == list(range(1, count + 1))
    assert [each.logprob for each in top] == pytest.approx(logprobs[order[:count]], abs=1e-6)


@pytest.mark.parametrize("sizes", CUTS, ids=str)
@pytest.mark.parametrize("ties", [False, True])
def test_sampled_tokens(group, row, random_logits, sizes, ties) -> None:
    logits = random_logits(12, VOCAB, scale=2.0)
    if ties:
        logits = logits.round()
    # penalties, bans, temperature and filters choose the token but do not touch its probability
    kinds = [
        {"temperature": 0.0},
        {"temperature": 3.0, "repetition_penalty": 2.0, "logit_bias": {9: -50.0, 200: 3.0}},
        {"temperature": 8.0, "top_p": 0.99, "bad_words_ids": ((5,),)},
        {"temperature": 2.0, "top_k": 100, "presence_penalty": -2.0},
    ]
    counts = [0, 1, 5, 20] * 3
    rows = [
        row([5, 9, 9, 200], 1, seed=i, logprobs=counts[i], **kinds[(i + i // 4) % 4])
        for i in range(12)
    ]
    for index, result in enumerate(group(sizes).sample(logits, rows)):
        check(result.logprob, result.top, logits[index], result.token_id, counts[index])


def test_only_rows_that_ask_get_them(group, row, random_logits) -> None:
    rows = [row(), row(logprobs=0), row(temperature=0.0), row(logprobs=2, temperature=0.0)]
    results = group([100, 200]).sample(random_logits(4, VOCAB), rows)
    assert [result.logprob is not None for result in results] == [False, True, False, True]
    assert [len(result.top) for result in results] == [0, 0, 0, 2]


@pytest.mark.parametrize("sizes", CUTS, ids=str)
@pytest.mark.parametrize("top", [0, 1, 20])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_prompt_scores(group, random_logits, sizes, top, kind) -> None:
    logits = random_logits(25, VOCAB).to(kind)
    targets = [0, 299, 120, 119, 121, *range(20, 220, 10)]
    ranks = group(sizes)
    for index, (entry, best) in enumerate(ranks.score(logits, targets, top)):
        check(entry, best, logits[index], targets[index], top)
    assert ranks.calls == 2


def test_whole_small_vocabulary_may_be_asked_for(group, row) -> None:
    logits = torch.tensor([[0.5, 2.0, 0.5]])
    result = group([1, 0, 2]).sample(logits, [row([2], 1, temperature=0.0, logprobs=3)])[0]
    assert [entry.token_id for entry in result.top] == [1, 0, 2]
    assert sum(np.exp(entry.logprob) for entry in result.top) == pytest.approx(1.0)


def test_large_logits_do_not_overflow(group, row) -> None:
    logits = torch.tensor([[1e30, -1e30, 0.0, 1e30]])
    result = group([2, 2]).sample(logits, [row([2], 1, temperature=0.0, logprobs=1)])[0]
    assert result.logprob.logprob == pytest.approx(np.log(0.5))
