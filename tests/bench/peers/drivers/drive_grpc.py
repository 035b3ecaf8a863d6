"""Phalanx as a server with Ray: a client in this process asks it over gRPC."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import time
from typing import Any

from driving import Job, Output, Run, serve

from phalanx.controller.benchmark.served import served
from phalanx.controller.client import AsyncClient


def load(settings: dict[str, Any]) -> tuple[Run, dict[str, Any]]:
    """`settings["flags"]` goes to `phalanx serve` as it is."""
    stack = contextlib.ExitStack()
    atexit.register(stack.close)
    began = time.perf_counter()
    address = stack.enter_context(served(settings["model"], settings["flags"]))
    ready_s = time.perf_counter() - began
    loop = asyncio.new_event_loop()
    stack.callback(loop.close)

    async def connect() -> AsyncClient:
        return AsyncClient(address=address)

    client = loop.run_until_complete(connect())

    async def ask(prompt: list[int], count: int) -> Output:
        first: float | None = None
        tokens: list[int] = []
        stream = client.generate(prompt, max_tokens=count, temperature=0.0, ignore_eos=True)
        async for message in stream:
            for sample in message.samples:
                tokens += sample.token_ids
            if tokens and first is None:
                first = time.perf_counter()
        return Output(first, tokens)

    async def ask_all(job: Job) -> list[Output]:
        return await asyncio.gather(*(ask(prompt, job.output_tokens) for prompt in job.prompts))

    def run(job: Job) -> list[Output]:
        return loop.run_until_complete(ask_all(job))

    run(Job([list(range(100, 108))], 1, 16))
    first_token_s = time.perf_counter() - began
    return run, {"serve_ready_s": ready_s, "serve_first_token_s": first_token_s}


if __name__ == "__main__":
    serve(load)
