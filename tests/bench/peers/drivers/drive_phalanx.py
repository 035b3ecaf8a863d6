"""Phalanx without a server: the controller in this process, ranks as its children."""

from __future__ import annotations

import atexit
import importlib.metadata
import time
from typing import Any

from driving import Job, Output, Run, serve

from phalanx.controller.offline import Offline


def load(settings: dict[str, Any]) -> tuple[Run, dict[str, Any]]:
    """`settings["engine"]` goes to `Offline` as it is."""
    offline = Offline(settings["model"], **settings["engine"])
    atexit.register(offline.close)
    ranks = offline.ranks

    def run(job: Job) -> list[Output]:
        began = time.perf_counter()
        answers = offline.generate(
            job.prompts, max_tokens=job.output_tokens, temperature=0.0, ignore_eos=True
        )
        return [
            Output(began + (answer.time_to_first_token_s or 0.0), list(answer.token_ids))
            for answer in answers
        ]

    return run, {
        "version": importlib.metadata.version("phalanx"),
        "dtype": offline.dtype,
        "weight_bytes": sum(rank.weight_bytes for rank in ranks),
        "kv_bytes": sum(rank.kv_bytes for rank in ranks),
    }


if __name__ == "__main__":
    serve(load)
