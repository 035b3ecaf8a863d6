"""vLLM on CPUs: its engine in this process, stepped by us so that first tokens can be timed."""

from __future__ import annotations

import os
import time
from typing import Any

from driving import Job, Output, Run, serve

RUNNING = 64


def load(settings: dict[str, Any]) -> tuple[Run, dict[str, Any]]:
    """Both cores bound, prefix caching on, compiled as it does by default."""
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "2"  # GiB
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_CACHE_ROOT"] = settings["cache"]
    os.environ["VLLM_NO_USAGE_STATS"] = os.environ["HF_HUB_OFFLINE"] = "1"
    import vllm

    llm = vllm.LLM(
        settings["folder"],
        dtype=settings["dtype"],
        skip_tokenizer_init=True,
        max_model_len=settings["context"],
        max_num_seqs=RUNNING,
        enable_prefix_caching=True,
    )
    engine, numbers = llm.llm_engine, iter(range(1 << 30))

    def run(job: Job) -> list[Output]:
        params = vllm.SamplingParams(
            temperature=0, max_tokens=job.output_tokens, ignore_eos=True, detokenize=False
        )
        names = [str(next(numbers)) for _ in job.prompts]
        for name, prompt in zip(names, job.prompts, strict=True):
            engine.add_request(name, {"prompt_token_ids": prompt}, params)
        first: dict[str, float] = {}
        tokens: dict[str, list[int]] = {}
        while engine.has_unfinished_requests():
            for output in engine.step():
                # it may add to the name; what comes back begins with it
                name = output.request_id.partition("-")[0]
                first.setdefault(name, time.perf_counter())
                tokens[name] = list(output.outputs[0].token_ids)
        return [Output(first[name], tokens[name]) for name in names]

    return run, {"version": vllm.__version__}


if __name__ == "__main__":
    serve(load)
