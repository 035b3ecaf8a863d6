"""What all drivers share: settings as JSON in the first argument, then a job a line, an answer a line.

Needs nothing but the standard library, as it runs in every peer's environment. A job is
`{"prompts": [[token, ...], ...], "output_tokens": n, "room": tokens of the longest request}`: all
requests at once, greedy, exactly so many tokens each, whatever they are. The answer has the seconds
that took, when each request's first token was there, and how many tokens came.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

SHOWN_TOKENS = 16


class Output(NamedTuple):
    """What became of a request. first: `time.perf_counter()` at its first token, if known."""

    first: float | None
    tokens: list[int]


class Job(NamedTuple):
    """Requests to be run together; `room`: tokens of the longest, prompt and output."""

    prompts: list[list[int]]
    output_tokens: int
    room: int


Run = Callable[[Job], list[Output]]


def serve(load: Callable[[dict[str, Any]], tuple[Run, dict[str, Any]]]) -> None:
    """Load the system, say so, and answer jobs until there are no more.

    load: from the settings to what runs a job, and facts for the report.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer

    def say(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    try:
        run, facts = load(json.loads(sys.argv[1]))
        run(Job([list(range(100, 108))], 1, 16))
        say({"facts": facts})
        for line in sys.stdin:
            say(_answer(run, Job(**json.loads(line))))
    except Exception as error:  # noqa: BLE001  whatever it is, the report wants to say it
        traceback.print_exc()
        text = " ".join(str(error).split())
        say({"error": f"{type(error).__name__}: {text}"})
        raise SystemExit(1) from None


def _answer(run: Run, job: Job) -> dict[str, Any]:
    began = time.perf_counter()
    outputs = run(job)
    seconds = time.perf_counter() - began
    return {
        "seconds": seconds,
        "first_s": [None if item.first is None else item.first - began for item in outputs],
        "counts": [len(item.tokens) for item in outputs],
        "tokens": outputs[0].tokens[:SHOWN_TOKENS],
    }
