"""Software of others against a server process of its own: installed as it is on PyPI.

With the environment variable PHALANX_CLIENTS, a folder, its virtual environments are used instead
of new ones: FOLDER/smg, FOLDER/vllm and so on.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

START_S = 240.0

TEMPLATE = Path(__file__).parents[2] / "deploy/templates/chatml-tools.jinja"


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Factory: the folder of programs of a virtual environment that has these packages."""

    def make(name: str, *packages: str) -> Path:
        if given := os.environ.get("PHALANX_CLIENTS"):
            if not (Path(given) / name / "bin" / "python").exists():
                pytest.skip(f"PHALANX_CLIENTS has no {name}")
            return Path(given) / name / "bin"
        folder = tmp_path_factory.mktemp(name)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        install = [str(folder / "bin" / "pip"), "install", "--quiet", *packages]
        subprocess.run(install, check=True, timeout=1800)
        return folder / "bin"

    return make


class Process:
    """A program in the background; what it says is in a file."""

    def __init__(self, command: list[str], log: Path) -> None:
        self.log = log
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
                env=os.environ | {"RAY_USAGE_STATS_ENABLED": "0"},
            )  # fmt: skip

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_for(self, done: Callable[[], bool]) -> None:
        ends = time.monotonic() + START_S
        while not done():
            assert self._process.poll() is None, self.said[-3000:]
            assert time.monotonic() < ends, self.said[-3000:]
            time.sleep(0.2)

    def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process.pid, signal.SIGTERM)
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


@dataclass
class Server:
    """`phalanx serve` with the demo model on two ranks."""

    address: str
    url: str
    """Of OpenAI's API, with /v1."""


@pytest.fixture(scope="session")
def server(smollm2_gguf: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("served")
    process = Process(
        [
            str(Path(sys.executable).with_name("phalanx")), "serve", "smollm2", "--tp", "2", "--port", "0", "--openai-port", "0",
            "--metrics-port", "off", "--vllm-protocol", "--reflection",
            "--chat-template", str(TEMPLATE),
        ],
        folder / "log",
    )  # fmt: skip
    try:
        process.wait_for(lambda: "OpenAI's API on" in process.said)
        text = process.said
        address = re.search(r"ready on (\S+)", text)
        url = re.search(r"OpenAI's API on (\S+)", text)
        assert address is not None
        assert url is not None
        yield Server(address[1], url[1])
    finally:
        process.stop()


@pytest.fixture(scope="session")
def gateway(
    environment: Any, server: Server, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """smg in front of the server; the base URL of its OpenAI API."""
    programs, port = environment("smg", "smg", "openai"), free_port()
    process = Process(
        [
            str(programs / "smg"), "launch", "--host", "127.0.0.1", "--port", str(port),
            "--worker-urls", f"grpc://{server.address}", "--prometheus-port", str(free_port()),
            "--tool-call-parser", "qwen",
        ],
        tmp_path_factory.mktemp("smg") / "log",
    )  # fmt: skip

    def ready() -> bool:
        url = f"http://127.0.0.1:{port}/v1/models"
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5) as answer:
            return b"smollm2" in answer.read()
        return False

    try:
        process.wait_for(ready)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.stop()
