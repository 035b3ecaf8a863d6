"""The commands as a user types them, against a real cluster of two ranks."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path

import openai
import pytest

PHALANX = [sys.executable, "-P", "-m", "phalanx.controller"]


def run(*words: str, input: str | None = None) -> subprocess.CompletedProcess[str]:
    """One command, to its end."""
    return subprocess.run(
        [*PHALANX, *words], capture_output=True, text=True, input=input, check=False, timeout=120
    )


def wait_ready(server: subprocess.Popen[str]) -> str:
    """The address, once the server says that it is ready."""
    assert server.stdout is not None
    for line in server.stdout:
        match = re.match(r"ready on (\S+)", line)
        if match:
            return match[1]
    pytest.fail(f"the server ended with code {server.wait()}")


def test_serve_and_everything_that_talks_to_it(
    tiny_llama: Callable[..., Path], tmp_path: Path
) -> None:
    words = ["serve", str(tiny_llama()), "--tp", "2", "--kv-tokens", "2048"]
    words += ["--port", "0", "--openai-port", "0", "--metrics-port", "off"]
    words += ["--page", "127.0.0.1:0"]
    errors = tmp_path / "stderr"
    with errors.open("w") as stderr:
        server = subprocess.Popen(
            [*PHALANX, *words], stdout=subprocess.PIPE, stderr=stderr, text=True
        )
        try:
            address = ["--address", wait_ready(server)]
            assert server.stdout is not None
            openai_url = server.stdout.readline().split()[-1]
            ask_openai(openai_url)
            watch(server.stdout.readline().split()[-1])
            use(address, tmp_path / "report.json")
            server.send_signal(signal.SIGTERM)
            assert server.wait(60) == 0
        finally:
            server.kill()
    lines = errors.read_text().splitlines()
    assert lines and [line for line in lines if ": a request has ended " not in line] == []


def ask_openai(url: str) -> None:
    """A chat through the other front, which the same request always answers the same way."""
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60) as client:
        (model,) = client.models.list().data
        texts = [
            client.chat.completions.create(
                model=model.id, messages=[{"role": "user", "content": "The"}], max_tokens=8, seed=3
            )
            .choices[0]
            .message.content
            for _ in "ab"
        ]
        assert texts[0] == texts[1] != ""


def watch(url: str) -> None:
    """The page's figures: both ranks, and every KV block in one state."""
    with urllib.request.urlopen(f"{url}state", timeout=60) as answer:
        [replica] = json.load(answer)["cluster"]["replicas"]
    assert [rank["rank"] for rank in replica["ranks"]] == [0, 1]
    kv = replica["kv"]
    assert kv["used"] + kv["cached"] + kv["free"] == kv["total"] == 2048 // 16


def use(address: list[str], report: Path) -> None:
    """Ask for its state, texts and speed."""
    status = run("status", *address)
    assert status.returncode == 0, status.stderr
    assert "ready" in status.stdout and "replica-0" in status.stdout
    once, again = (
        run("generate", "The", *address, "--max-tokens", "8", "--seed", "3") for _ in "ab"
    )
    assert (once.returncode, once.stdout) == (0, again.stdout)
    refused = run("generate", "The", *address, "--top-p", "2")
    assert refused.returncode == 2 and "top_p" in refused.stderr
    told = run("chat", *address, "--temperature", "0", "--max-tokens", "4", input="Hello\n/exit\n")
    assert told.returncode == 0, told.stderr
    sizes = ["--prompt-tokens", "4-12", "--output-tokens", "3-6"]
    load = ["--requests", "6", "--concurrency", "3", "--output", str(report)]
    measured = run("bench", *address, *sizes, *load)
    assert measured.returncode == 0, measured.stderr
    assert "6 of 6 requests completed" in measured.stdout
    results = json.loads(report.read_text())["results"]
    assert results["statuses"] == {"OK": 6} and results["short"] == 0
