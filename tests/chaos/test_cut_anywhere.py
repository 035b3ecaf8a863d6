"""Test 31: whoever has prompt, parameters and the tokens so far goes on as if nothing had been."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from phalanx.controller.journal.records import Header, Kept
from phalanx.controller.scheduling.request import FinishReason, Request, TokenEvent
from phalanx.controller.server.sessions import Session
from phalanx.controller.server.tokens import TokenTexts
from phalanx.protos.sampling import Grammar, SamplingParams
from phalanx.protos.steps import SampledToken

TOKENS = 24
CUTS = 7
QUIET = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]

PARAMS = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**31),
        "temperature": st.sampled_from((0.0, 0.7, 1.5)),
        "max_tokens": st.integers(2, TOKENS),
    },
    optional={
        "top_k": st.integers(1, 60),
        "top_p": st.sampled_from((0.5, 0.95)),
        "min_p": st.sampled_from((0.02, 0.2)),
        "repetition_penalty": st.sampled_from((0.8, 1.3)),
        "presence_penalty": st.sampled_from((-1.0, 1.5)),
        "frequency_penalty": st.sampled_from((-0.5, 0.7)),
        "no_repeat_ngram_size": st.integers(1, 4),
        "logit_bias": st.just({7: 6.0, 300: 6.0}),
        "min_tokens": st.integers(0, TOKENS),
        "stop_token_ids": st.just((7, 300)),
        "logprobs": st.integers(0, 3),
        "regex": st.just("([a-z]+ )+"),
    },
)


def run(replica: Any, jobs: Sequence[Request]) -> list[list[Any]]:
    """The events of each job; all are computed together."""
    events: dict[tuple[str, int], list[Any]] = {job.key: [] for job in jobs}
    for job in jobs:
        replica.replica.add([job], readmitted=True)
    left = len(jobs)
    while left:
        for event in replica.events.get(timeout=120):
            events[event.request_id, event.sample_index].append(event)
            left -= event.finish is not None
    return [events[job.key] for job in jobs]


def answer(
    events: Sequence[TokenEvent], before: int = 0
) -> tuple[list[int], list[float], Any, Any]:
    """Tokens, log-probabilities, finish and stop token; every index once."""
    tokens: list[int] = []
    scores: list[float] = []
    for event in events:
        assert not event.tokens or event.first_index == before + len(tokens)
        tokens += [token.token_id for token in event.tokens]
        scores += [token.logprob.logprob for token in event.tokens if token.logprob is not None]
    return tokens, scores, events[-1].finish, events[-1].stop_token


@pytest.mark.bar(31)
@pytest.mark.timeout(3600)
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    "examples", [25, pytest.param(2000 // CUTS + 1, marks=pytest.mark.chaos)], ids=["gate", "all"]
)
def test_a_model_goes_on_from_any_cut(
    tiny_llama: Callable[..., Path], local_replica: Callable[..., Any], examples: int
) -> None:
    """The whole run by itself; then as many continuations together as there are cuts."""
    replica = local_replica(tiny_llama(), tp=2)
    counter = iter(range(10**6))

    @settings(max_examples=examples, deadline=None, suppress_health_check=QUIET, database=None)
    @given(
        PARAMS,
        st.lists(st.integers(5, 400), min_size=1, max_size=40),
        st.integers(0, 3),
        st.lists(st.floats(0, 1), min_size=CUTS, max_size=CUTS),
    )
    def property_holds(
        drawn: dict[str, Any], prompt: list[int], sample: int, cuts: list[float]
    ) -> None:
        fields = {name: value for name, value in drawn.items() if name != "regex"}
        if "regex" in drawn:
            fields |= {"grammar": Grammar("regex", drawn["regex"])}
        else:
            fields |= {"ignore_eos": True}
        fields["min_tokens"] = min(fields.get("min_tokens", 0), fields["max_tokens"])
        params = SamplingParams(**fields)

        def job(known: list[int]) -> Request:
            return Request(
                request_id=f"cut-{next(counter)}",
                sample_index=sample,
                prompt_token_ids=prompt,
                params=params,
                arrival=0.0,
                output_token_ids=list(known),
            )

        [whole] = run(replica, [job([])])
        tokens, scores, finish, stop = answer(whole)
        assert finish in (FinishReason.STOP, FinishReason.LENGTH)
        places = [int(cut * (len(tokens) - 1)) for cut in cuts]
        rests = run(replica, [job(tokens[:place]) for place in places])
        for place, rest in zip(places, rests, strict=True):
            went_on, later, ended, by = answer(rest, place)
            assert (tokens[:place] + went_on, ended, by) == (tokens, finish, stop)
            if scores:
                assert later == pytest.approx(scores[place:], abs=1e-4)

    property_holds()


@pytest.fixture(scope="module")
def texts(tiny_llama: Callable[..., Path]) -> TokenTexts:
    tokenizer = Tokenizer.from_file(str(tiny_llama() / "tokenizer.json"))
    return TokenTexts(tokenizer)


@pytest.mark.bar(31)
@settings(max_examples=300, deadline=None, suppress_health_check=QUIET)
@given(
    tokens=st.lists(st.integers(3, 490), min_size=1, max_size=30),
    stops=st.lists(st.text("abehqtu ", min_size=1, max_size=3), min_size=1, max_size=4),
    minimum=st.integers(0, 20),
    include=st.booleans(),
    cut=st.floats(0, 1),
)
def test_a_stop_string_across_the_cut_is_found(
    texts: TokenTexts,
    tokens: list[int],
    stops: list[str],
    minimum: int,
    include: bool,
    cut: float,
) -> None:
    """A session that is made of what the journal has ends at the same token."""
    params = SamplingParams(
        stop=tuple(stops), min_tokens=minimum, include_stop=include, max_tokens=40
    )
    header = Header(
        tenant="t",
        request_id="r",
        fingerprint=b"",
        prompt_token_ids=[5],
        params=params,
        arrival=0.0,
        deadline=None,
    )

    def event(index: int) -> TokenEvent:
        sampled = (SampledToken(0, tokens[index]),)
        return TokenEvent(request_id="r", sample_index=0, first_index=index, tokens=sampled)

    def play(session: Session, index: int) -> int:
        """Say the rest; how many tokens had been said when it ended."""
        while index < len(tokens) and not session.ended:
            session.take([event(index)])
            index += 1
        return index

    whole = Session(Kept(1, header, []), texts)
    said = play(whole, 0)
    place = int(cut * (said - 1))
    again = Session(Kept(1, header, [event(index) for index in range(place)]), texts)
    assert play(again, place) == said
    assert again.open == whole.open
