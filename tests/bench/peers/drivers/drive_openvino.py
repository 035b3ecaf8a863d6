"""OpenVINO GenAI: its continuous batching, stepped by us so that first tokens can be timed."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import openvino
import openvino_genai
from driving import Job, Output, Run, serve

RUNNING = 64
CACHE_GB = 2


def load(settings: dict[str, Any]) -> tuple[Run, dict[str, Any]]:
    """A GGUF file as it is, prefix caching on."""
    scheduling = openvino_genai.SchedulerConfig()
    scheduling.cache_size, scheduling.max_num_seqs = CACHE_GB, RUNNING
    scheduling.enable_prefix_caching = scheduling.dynamic_split_fuse = True
    scheduling.max_num_batched_tokens = settings["step_tokens"]
    pipeline = openvino_genai.ContinuousBatchingPipeline(settings["file"], scheduling, "CPU", {})
    numbers = iter(range(1 << 30))

    def run(job: Job) -> list[Output]:
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = job.output_tokens, True, False
        handles = [
            pipeline.add_request(next(numbers), openvino.Tensor(np.array([prompt])), config)
            for prompt in job.prompts
        ]
        first: list[float | None] = [None] * len(handles)
        tokens: list[list[int]] = [[] for _ in handles]
        while pipeline.has_non_finished_requests():
            pipeline.step()
            now = time.perf_counter()
            for index, handle in enumerate(handles):
                while handle.can_read():
                    for output in handle.read().values():
                        tokens[index] += output.generated_ids
                        first[index] = first[index] or now
        return [Output(*pair) for pair in zip(first, tokens, strict=True)]

    return run, {"version": openvino_genai.__version__}


if __name__ == "__main__":
    serve(load)
