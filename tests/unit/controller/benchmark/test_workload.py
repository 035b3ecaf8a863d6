"""What is asked, and when: lengths, recorded files and arrivals."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from phalanx.controller.benchmark.workload import (
    Length,
    Span,
    Turn,
    choose,
    draw_lengths,
    make_jobs,
    poisson_arrivals,
    read_recorded,
)
from phalanx.protos.errors import ConfigError


def test_spans() -> None:
    assert Span.parse("prompt_tokens", "128") == Span(128, 128)
    assert Span.parse("prompt_tokens", "64-256") == Span(64, 256)
    for text in ("", "0", "5-2", "-3", "1.5", "a", "1-2-3"):
        with pytest.raises(ConfigError, match="prompt_tokens is .* allowed: a count"):
            Span.parse("prompt_tokens", text)


def test_uniform_lengths_fill_their_span_and_come_again() -> None:
    drawn = draw_lengths(Span(1, 4), Span(10, 10), 400, seed=1)
    assert {item.prompt for item in drawn} == {1, 2, 3, 4}
    assert {item.output for item in drawn} == {10}
    counts = [sum(item.prompt == size for item in drawn) for size in (1, 2, 3, 4)]
    assert min(counts) > 60  # 100 expected, standard deviation 8.7
    assert drawn == draw_lengths(Span(1, 4), Span(10, 10), 400, seed=1)
    assert drawn != draw_lengths(Span(1, 4), Span(10, 10), 400, seed=2)


def test_arrivals_are_a_poisson_process() -> None:
    rate, count = 5.0, 20000
    times = poisson_arrivals(rate, count, seed=3)
    gaps = [after - before for before, after in itertools.pairwise(times)]
    mean = sum(gaps) / len(gaps)
    variance = sum((gap - mean) ** 2 for gap in gaps) / len(gaps)
    assert times[0] == 0 and times == sorted(times)
    # an exponential has mean 1/rate and standard deviation 1/rate; three standard errors
    assert mean == pytest.approx(1 / rate, rel=3 / count**0.5)
    assert variance**0.5 == pytest.approx(1 / rate, rel=0.05)
    # and no memory: of the gaps longer than its median, half are longer by another median
    median = sorted(gaps)[len(gaps) // 2]
    longer = [gap for gap in gaps if gap > median]
    assert sum(gap > 2 * median for gap in longer) / len(longer) == pytest.approx(0.5, abs=0.02)


def test_arrivals_are_seeded() -> None:
    assert poisson_arrivals(2, 50, seed=0) == poisson_arrivals(2, 50, seed=0)
    assert poisson_arrivals(2, 50, seed=0) != poisson_arrivals(2, 50, seed=1)


def test_prompts_are_random_tokens_without_ends() -> None:
    lengths = [Length(200, 7), Length(3, 9)]
    jobs = make_jobs(lengths, vocab_size=20, excluded={2, 3}, seed=5)
    assert [(len(job.prompt), job.output_tokens) for job in jobs] == [(200, 7), (3, 9)]
    assert set(jobs[0].prompt) == set(range(20)) - {2, 3}
    assert jobs == make_jobs(lengths, 20, {2, 3}, 5)
    long = make_jobs([Length(64, 1)] * 50, 1000, set(), 0)
    assert len({tuple(job.prompt[:16]) for job in long}) == 50  # no shared block


def test_recorded_lines(tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text(
        '{"prompt_tokens": 5, "output_tokens": 6}\n\n{"prompt_tokens": 7, "output_tokens": 1, "at": 0}\n'
    )
    assert read_recorded(file) == [Length(5, 6), Length(7, 1)]


@pytest.mark.parametrize("as_lines", [True, False])
def test_recorded_conversations(tmp_path: Path, as_lines: bool) -> None:
    turns = [
        {"from": "human", "value": "How far?"},
        {"from": "gpt", "value": "A mile."},
        {"from": "human", "value": "Thanks"},
    ]
    entries = [{"id": "a", "conversations": turns}] * 2
    file = tmp_path / "talks.json"
    file.write_text(
        "\n".join(map(json.dumps, entries)) if as_lines else json.dumps(entries, indent=1)
    )
    assert read_recorded(file) == [Turn("How far?", "A mile.")] * 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt_tokens": 5}', "entry 1 is"),
        ('{"prompt_tokens": 5, "output_tokens": 0}', "entry 1 is"),
        ('{"prompt_tokens": true, "output_tokens": 4}', "entry 1 is"),
        ('{"prompt_tokens": 5, "output_tokens": 5}\n[1]', "entry 2 is"),
        ('{"conversations": [{"from": "human", "value": "Hi"}]}', "entry 1 is"),
        ('{"conversations": [{"value": "Hi"}, {"value": ""}]}', "entry 1 is"),
        ("{nonsense", "not JSON"),
        ("[]", "no entry"),
        ("", "no entry"),
    ],
)
def test_a_wrong_record_is_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_recorded(file)


def test_a_missing_record_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"trace.jsonl, which cannot be read"):
        read_recorded(tmp_path / "trace.jsonl")


def test_recorded_lengths_are_used_up_before_they_come_again() -> None:
    entries = [Length(size, 1) for size in range(1, 11)]
    chosen = choose(entries, 25, seed=0)
    assert sorted(item.prompt for item in chosen[:10]) == list(range(1, 11))
    assert sorted(item.prompt for item in chosen[10:20]) == list(range(1, 11))
    assert len(chosen) == 25 and chosen == choose(entries, 25, seed=0)
    assert chosen != choose(entries, 25, seed=1)
