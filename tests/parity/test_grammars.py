"""Texts that must look like something: judged by independent judges, at several sizes, across cuts.

The judges: `jsonschema`, Python's `re`, and a list. The model is the demo model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import jsonschema
import msgspec
import pytest

from phalanx.controller.scheduling.request import FinishReason
from phalanx.protos.errors import InvalidArgument
from phalanx.protos.sampling import Grammar, SamplingParams

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
DATE = r"(19|20)\d\d-[01]\d-[0-3]\d"
CHOICES = ["yes", "no", "not in the least"]
LARK = 'start: "<" WORD ">" \nWORD: /[a-z]{3,6}/'
GRAMMARS = {
    "json_schema": Grammar("json_schema", json.dumps(SCHEMA)),
    "regex": Grammar("regex", DATE),
    "choice": Grammar("choice", json.dumps(CHOICES)),
    "lark": Grammar("lark", LARK),
}
QUESTION = "Tell me about a person, a day, or whether you agree:"


def satisfied(kind: str, text: str) -> bool:
    """What somebody else says of the text."""
    if kind == "json_schema":
        jsonschema.validate(json.loads(text), SCHEMA)
        return True
    if kind == "choice":
        return text in CHOICES
    pattern = DATE.replace(r"\d", "[0-9]") if kind == "regex" else "<[a-z]{3,6}>"
    return re.fullmatch(pattern, text) is not None


def params(kind: str, **values: Any) -> SamplingParams:
    return SamplingParams(max_tokens=120, grammar=GRAMMARS[kind], **values)


def outputs(run: Any, asked: list[SamplingParams]) -> list[list[list[int]]]:
    """Tokens of every sample of each request, after checking that all ended by themselves."""
    prompt = run.model.tokenizer.encode(QUESTION).ids
    found = []
    for samples in run.generate([(prompt, item) for item in asked]):
        assert [sample[-1].finish for sample in samples] == [FinishReason.STOP] * len(samples)
        found.append([[t.token_id for event in s for t in event.tokens] for s in samples])
    return found


@pytest.fixture
def run(local_replica: Callable[..., Any], one_thread: None) -> Callable[[int], Any]:
    return lambda tp: local_replica("smollm2", tp=tp, num_blocks=256)


ASKED = [
    *(params(kind, temperature=0.0) for kind in GRAMMARS),
    *(params(kind, temperature=1.3, seed=7, n=3) for kind in GRAMMARS),
    params("json_schema", temperature=0.9, top_p=0.9, seed=1, frequency_penalty=0.2),
    SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True),
]


def test_every_sample_is_what_was_asked_at_any_number_of_ranks(run: Callable[[int], Any]) -> None:
    found = {}
    for tp in (1, 3):
        local = run(tp)
        found[tp] = outputs_of_all(local)
        kinds = [*GRAMMARS, *GRAMMARS, "json_schema"]
        for kind, samples in zip(kinds, found[tp], strict=False):
            for tokens in samples:
                text = local.model.tokenizer.decode(tokens, skip_special_tokens=True)
                assert satisfied(kind, text), text
    assert found[1] == found[3]


def outputs_of_all(local: Any) -> list[list[list[int]]]:
    *constrained, free = ASKED
    prompt = local.model.tokenizer.encode(QUESTION).ids
    alone = local.tokens([(prompt, free)])
    together = local.generate([(prompt, item) for item in ASKED])
    tokens = [
        [[t.token_id for event in sample for t in event.tokens] for sample in samples]
        for samples in together
    ]
    assert tokens[-1] == alone, "a request without a grammar is not touched by those with one"
    assert len(constrained) == len(tokens) - 1
    return tokens


def test_a_continuation_is_the_same_wherever_it_is_cut(run: Callable[[int], Any]) -> None:
    from phalanx.controller.scheduling.request import Request

    local = run(1)
    asked = params("json_schema", temperature=0.8, seed=3)
    ((whole,),) = outputs(local, [asked])
    prompt = local.model.tokenizer.encode(QUESTION).ids
    for cut in (1, len(whole) // 2, len(whole) - 1):
        request = Request(
            request_id=f"cut-{cut}",
            prompt_token_ids=prompt,
            params=asked,
            arrival=0.0,
            output_token_ids=whole[:cut],
        )
        local.replica.add([request])
        rest: list[int] = []
        while True:
            events = local.events.get(timeout=60)
            rest += [token.token_id for event in events for token in event.tokens]
            if any(event.finish is not None for event in events):
                break
        assert whole[:cut] + rest == whole


def test_one_that_gets_too_complex_ends_alone(run: Callable[[int], Any]) -> None:
    local = run(1)
    prompt = local.model.tokenizer.encode(QUESTION).ids
    # each symbol has ever more ways to have come about
    bomb = Grammar("lark", 'start: e\ne: e e | e e e | "a" | "aa" | ""')
    asked = [
        SamplingParams(max_tokens=400, temperature=0.0, grammar=bomb, logit_bias={}),
        params("json_schema", temperature=0.0),
    ]
    samples = local.generate([(prompt, item) for item in asked])
    assert samples[1][0][-1].finish is FinishReason.STOP
    last = samples[0][0][-1]
    assert last.finish in (FinishReason.ERROR, FinishReason.LENGTH, FinishReason.STOP)
    assert last.finish is not FinishReason.ERROR or "grammar" in str(last.error)


def test_min_tokens_against_a_short_choice_is_an_error_of_its_own(
    run: Callable[[int], Any],
) -> None:
    local = run(1)
    prompt = local.model.tokenizer.encode(QUESTION).ids
    asked = msgspec.structs.replace(params("choice", temperature=0.0), min_tokens=50)
    ((sample,),) = local.generate([(prompt, asked)])
    assert sample[-1].finish is FinishReason.ERROR
    assert isinstance(sample[-1].error, InvalidArgument) and "banned" in str(sample[-1].error)
