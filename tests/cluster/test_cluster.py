"""The whole path: client, gRPC, scheduler, sockets, two ranks, and back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from typing import Any

import pytest

from phalanx.controller.app import RunningCluster
from phalanx.controller.client import Client
from phalanx.protos.errors import DeadlineExceeded, InvalidArgument

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
MIXED = {"temperature": 0.9, "top_k": 40, "top_p": 0.95, "repetition_penalty": 1.1}


def blocks_free(client: Client) -> tuple[int, int]:
    """(free, total) blocks of the first replica."""
    replica = client.cluster_state().replicas[0]
    return replica.kv_blocks_free, replica.kv_blocks_total


def wait_all_free(client: Client, timeout_s: float = 30) -> None:
    """Wait until no block has a user; how long the step in flight takes is the machine's affair."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        free, total = blocks_free(client)
        if free == total:
            return
        time.sleep(0.05)
    raise AssertionError(f"{total - free} of {total} blocks are still held")


def test_the_model_answers_in_a_stream(client: Client) -> None:
    messages = list(client.chat(QUESTION, temperature=0.0, max_tokens=32))
    text = "".join(sample.text for message in messages for sample in message.samples)
    assert "Paris" in text
    assert len(messages) > 3
    assert messages[-1].usage.prompt_tokens > 10


def test_the_state_shows_the_uneven_cut(client: Client) -> None:
    [replica] = client.cluster_state().replicas
    assert replica.state == "ready"
    assert [(rank.head_start, rank.head_stop) for rank in replica.ranks] == [(0, 6), (6, 9)]
    assert replica.ranks[0].kv_bytes == 2 * replica.ranks[1].kv_bytes
    assert client.healthy()
    assert client.model_info().dtype == "float32"


def test_a_batch_gives_each_request_what_it_gets_alone(client: Client) -> None:
    prompts = [f"Chapter {number}. It was" for number in range(16)]
    alone = [
        client.complete(prompt, seed=7 + index, max_tokens=12, **MIXED).token_ids
        for index, prompt in enumerate(prompts)
    ]
    together: list[tuple[int, ...]] = [()] * len(prompts)

    def ask(index: int) -> None:
        answer = client.complete(prompts[index], seed=7 + index, max_tokens=12, **MIXED)
        together[index] = answer.token_ids

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


def test_several_samples_share_a_prompt_and_differ(client: Client) -> None:
    answer = client.complete("My favourite animal is", n=4, seed=3, max_tokens=12, temperature=1.2)
    texts = [sample.text for sample in answer.samples]
    assert len(set(texts)) > 1
    again = client.complete("My favourite animal is", n=4, seed=3, max_tokens=12, temperature=1.2)
    assert [sample.text for sample in again.samples] == texts


def test_a_repeated_prompt_is_found_in_the_cache(client: Client) -> None:
    prompt = "The lighthouse keeper counted the ships. " * 12
    first = client.complete(prompt, temperature=0.0, max_tokens=8)
    second = client.complete(prompt, temperature=0.0, max_tokens=8)
    assert second.usage.cached_prompt_tokens >= 64
    assert second.token_ids == first.token_ids


def test_a_stop_string_ends_the_text_before_it(client: Client) -> None:
    whole = client.ask(QUESTION, temperature=0.0, max_tokens=32).text
    cut = client.ask(QUESTION, temperature=0.0, max_tokens=32, stop=["ital of Fr"])
    assert cut.text == whole.split("ital of Fr")[0]
    assert cut.finish_reason == "stop"


def test_a_deadline_ends_a_request_and_frees_its_blocks(cluster: RunningCluster) -> None:
    with Client(cluster.address, timeout=0.5) as hasty, pytest.raises(DeadlineExceeded):
        hasty.complete("Once upon a time", max_tokens=1500, ignore_eos=True)
    with Client(cluster.address) as client:
        wait_all_free(client)


BAD_INPUTS: list[tuple[str, dict[str, Any]]] = [
    ("params.temperature", {"temperature": float("nan")}),
    ("params.top_p", {"top_p": 1.5}),
    ("params.n", {"n": 99}),
    ("params.logit_bias", {"logit_bias": {10**6: 1.0}}),
    ("params.stop_token_ids[0]", {"stop_token_ids": [10**6]}),
    ("params.max_tokens", {"max_tokens": 10**6}),
]


def test_bad_input_is_named_and_leaves_a_running_stream_alone(client: Client) -> None:
    ask = {"temperature": 0.0, "max_tokens": 60, "ignore_eos": True}
    expected = client.complete("The old bridge", **ask).token_ids
    seen: list[tuple[int, ...]] = []
    background = threading.Thread(
        target=lambda: seen.append(client.complete("The old bridge", **ask).token_ids)
    )
    background.start()
    for field, params in BAD_INPUTS:
        with pytest.raises(InvalidArgument) as caught:
            client.complete("Hello", **params)
        assert field in {violation.field for violation in caught.value.violations}
    for prompt, field in [([10**6], "token_ids.ids[0]"), ("word " * 9000, "text"), ("", "text")]:
        with pytest.raises(InvalidArgument) as caught:
            client.complete(prompt)  # type: ignore[arg-type]
        assert field in {violation.field for violation in caught.value.violations}
    background.join()
    assert seen == [expected]


def test_the_metrics_page_counts_what_happened(cluster: RunningCluster, client: Client) -> None:
    client.complete("Hello", max_tokens=3, ignore_eos=True)
    page = urllib.request.urlopen(f"http://{cluster.metrics_address}/metrics").read().decode()
    figures = dict(
        line.rsplit(" ", 1) for line in page.splitlines() if line and not line.startswith("#")
    )
    assert float(figures["phalanx_completion_tokens_total"]) >= 3
    assert float(figures["phalanx_time_to_first_token_seconds_count"]) >= 1
    assert float(figures["phalanx_steps_total"]) >= 3
    assert float(figures['phalanx_step_seconds_total{phase="execute"}']) > 0


READER = """
import sys, threading
from phalanx.controller.client import Client

client = Client(sys.argv[1])
begun = threading.Semaphore(0)

def read(number):
    for message in client.generate(f"Story {number}:", max_tokens=1000, ignore_eos=True):
        begun.release()

count = int(sys.argv[2])
for number in range(count):
    threading.Thread(target=read, args=(number,), daemon=True).start()
for _ in range(2 * count):
    begun.acquire()
print("reading", flush=True)
threading.Event().wait()
"""


def test_200_killed_clients_leave_every_block_free(cluster: RunningCluster, client: Client) -> None:
    """8 processes with 25 streams each, killed while they read."""
    for _ in range(8):
        process = subprocess.Popen(
            [sys.executable, "-c", READER, cluster.address, "25"],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "reading\n"
        assert blocks_free(client)[0] < blocks_free(client)[1]
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    wait_all_free(client)
    assert "Paris" in client.ask(QUESTION, temperature=0.0, max_tokens=32).text
