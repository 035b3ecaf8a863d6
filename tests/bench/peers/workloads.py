"""What every system is asked to do: the same token ids for all, others in every round."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from phalanx.controller.benchmark.workload import Length, make_jobs

OUTPUT, PROMPT, FIRST = "output tokens/s", "prompt tokens/s", "first token p50, ms"


@dataclass(frozen=True)
class Workload:
    """`requests` at once, of `prompt` tokens and `output` more; `shared` of the prompt's tokens are
    the same for all and have been computed before."""

    name: str
    title: str
    metric: str
    requests: int
    prompt: int
    output: int
    shared: int = 0

    def jobs(self, vocabulary: int, ends: Sequence[int], seed: int) -> list[dict[str, Any]]:
        """For a driver; the last one is the one that is timed."""
        lengths = [Length(self.prompt, self.output)] * self.requests
        made = make_jobs(lengths, vocabulary, set(ends), seed)
        prompts = [list(job.prompt) for job in made]
        if not self.shared:
            return [self._job(prompts, self.output)]
        prefix = prompts[0][: self.shared]
        prompts = [prefix + prompt[self.shared :] for prompt in prompts]
        # the prefix once before, with another end than any of the timed prompts
        return [self._job([prefix + prompts[0][:1]], 1), self._job(prompts, self.output)]

    def _job(self, prompts: list[list[int]], output: int) -> dict[str, Any]:
        return {"prompts": prompts, "output_tokens": output, "room": self.prompt + self.output}

    def tiny(self) -> Workload:
        """The same in small; its figures mean nothing."""
        return dataclasses.replace(
            self,
            requests=min(self.requests, 3),
            prompt=min(self.prompt, 32),
            output=min(self.output, 4),
            shared=min(self.shared, 16),
        )

    def value(self, answer: dict[str, Any]) -> float:
        """The metric, from a driver's answer."""
        if self.metric == OUTPUT:
            return self.requests * self.output / answer["seconds"]
        if self.metric == PROMPT:
            return self.requests * self.prompt / answer["seconds"]
        ordered = sorted(answer["first_s"])
        half = len(ordered) // 2
        return 1000 * (ordered[half] + ordered[-1 - half]) / 2


SINGLE = Workload("single", "1 stream, 128 in, 128 out", OUTPUT, 1, 128, 128)
STREAMS = Workload("streams", "64 streams, 128 in, 128 out", OUTPUT, 64, 128, 128)
PREFILL = Workload("prefill", "prefill, 64 x 128", PROMPT, 64, 128, 1)
LONG = Workload("long", "prefill, 1 x 4096", PROMPT, 1, 4096, 1)
COLD = Workload("cold", "32 x 1056 at once, nothing cached", FIRST, 32, 1056, 1)
SHARED = Workload("shared", "32 x 1056 at once, 1024 shared and cached", FIRST, 32, 1056, 1, 1024)
ALL = (SINGLE, STREAMS, PREFILL, LONG, COLD, SHARED)
CACHED = (COLD, SHARED)
"""For systems with a prefix cache."""
LONGEST = max(workload.prompt + workload.output for workload in ALL)
