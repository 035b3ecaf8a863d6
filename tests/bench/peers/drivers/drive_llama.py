"""llama.cpp through its bindings: batches of the low-level interface, a stream for each request."""

from __future__ import annotations

import ctypes
import time
from typing import Any

import llama_cpp
import numpy as np
from driving import Job, Output, Run, serve

BATCH_TOKENS = 2048
STEP_TOKENS = 512


class Contexts:
    """A context is made once for so many streams of such a length."""

    def __init__(self, model: Any, threads: int) -> None:
        self._model, self._threads = model, threads
        self._made: dict[tuple[int, int], Any] = {}

    def get(self, streams: int, room: int) -> Any:
        """An empty context."""
        room = -(-room // 256) * 256
        if (streams, room) not in self._made:
            params = llama_cpp.llama_context_default_params()
            params.n_ctx, params.n_seq_max = streams * room, streams
            params.n_batch, params.n_ubatch = BATCH_TOKENS, STEP_TOKENS
            params.n_threads = params.n_threads_batch = self._threads
            params.kv_unified = False  # a cache for each stream: attention looks at no other
            context = llama_cpp.llama_init_from_model(self._model, params)
            if not context:
                raise RuntimeError(f"llama.cpp makes no context of {streams} x {room} tokens")
            self._made[streams, room] = context
        context = self._made[streams, room]
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        return context


def load(settings: dict[str, Any]) -> tuple[Run, dict[str, Any]]:
    """A GGUF file as it is."""
    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_default_params()
    model = llama_cpp.llama_model_load_from_file(settings["file"].encode(), params)
    if not model:
        raise RuntimeError(f"llama.cpp cannot load {settings['file']}")
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    contexts = Contexts(model, settings["threads"])
    batch = llama_cpp.llama_batch_init(BATCH_TOKENS, 0, 1)

    def step(context: Any, items: list[tuple[int, int, int, bool]]) -> list[tuple[int, int]]:
        """items: (token, position, stream, whether it is sampled) -> (stream, next token)."""
        batch.n_tokens = len(items)
        for at, (token, position, stream, sampled) in enumerate(items):
            batch.token[at], batch.pos[at] = token, position
            batch.n_seq_id[at], batch.seq_id[at][0] = 1, stream
            batch.logits[at] = sampled
        if code := llama_cpp.llama_decode(context, batch):
            raise RuntimeError(f"llama_decode gave {code}")
        chosen = []
        for at, (_, _, stream, sampled) in enumerate(items):
            if sampled:
                row = llama_cpp.llama_get_logits_ith(context, at)
                logits = np.ctypeslib.as_array(
                    ctypes.cast(row, ctypes.POINTER(ctypes.c_float)), (vocabulary,)
                )
                chosen.append((stream, int(logits.argmax())))
        return chosen

    def run(job: Job) -> list[Output]:
        context = contexts.get(len(job.prompts), job.room)
        first: list[float | None] = [None] * len(job.prompts)
        tokens: list[list[int]] = [[] for _ in job.prompts]

        def take(items: list[tuple[int, int, int, bool]]) -> None:
            for stream, token in step(context, items):
                first[stream] = first[stream] or time.perf_counter()
                tokens[stream].append(token)

        waiting = [
            (token, place, stream, place + 1 == len(prompt))
            for stream, prompt in enumerate(job.prompts)
            for place, token in enumerate(prompt)
        ]
        for start in range(0, len(waiting), BATCH_TOKENS):
            take(waiting[start : start + BATCH_TOKENS])
        for count in range(job.output_tokens - 1):
            take(
                [
                    (tokens[stream][-1], len(prompt) + count, stream, True)
                    for stream, prompt in enumerate(job.prompts)
                ]
            )
        return [Output(*pair) for pair in zip(first, tokens, strict=True)]

    return run, {"version": llama_cpp.__version__, "file": settings["file"].rpartition("/")[2]}


if __name__ == "__main__":
    serve(load)
