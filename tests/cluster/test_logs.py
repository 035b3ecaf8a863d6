"""A whole cluster at its most talkative: nothing that users wrote is in any log."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from phalanx.controller.client import Client
from phalanx.protos.errors import PhalanxError

pytestmark = pytest.mark.slow

SECRET = "xyzzy-plugh"
PHALANX = [sys.executable, "-P", "-m", "phalanx.controller"]


def test_no_log_holds_a_prompt(tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    words = ["serve", str(tiny_llama()), "--tp", "2", "--kv-tokens", "2048", "--port", "0"]
    words += ["--metrics-port", "off", "--log-level", "debug", "--log-format", "json"]
    outputs = tmp_path / "stdout", tmp_path / "stderr"
    # what processes of Ray say, the ranks among them, is below this folder
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:
        with outputs[0].open("w") as stdout, outputs[1].open("w") as stderr:
            own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
            server = subprocess.Popen(
                [*PHALANX, *words], stdout=stdout, stderr=stderr, env=own | {"RAY_TMPDIR": folder}
            )
            try:
                ask(wait_ready(server, outputs[0]))
                server.send_signal(signal.SIGTERM)
                assert server.wait(60) == 0
            finally:
                server.kill()
        logs = [path for path in Path(folder).rglob("*") if path.is_file()]
        assert any("worker" in path.name for path in logs)
        found = [path.name for path in [*logs, *outputs] if SECRET.encode() in path.read_bytes()]
        assert found == []
    lines = [line for line in outputs[1].read_text().splitlines() if line.startswith("{")]
    ended = [json.loads(line) for line in lines if "a request has ended" in line]
    assert [line["outcome"] for line in ended] == ["length", "length", "invalid_argument"]
    assert ended[0]["request_id"] == "first"


def wait_ready(server: subprocess.Popen[bytes], output: Path) -> str:
    while server.poll() is None:
        for line in output.read_text().splitlines():
            if line.startswith("ready on "):
                return line.split()[2]
        try:
            server.wait(0.5)
        except subprocess.TimeoutExpired:
            continue
    pytest.fail(f"the server ended with code {server.returncode}")


def ask(address: str) -> None:
    with Client(address, timeout=120) as client:
        for request_id in ("first", "second"):
            text = f"{SECRET} {request_id}"
            client.complete(text, request_id=request_id, max_tokens=4, ignore_eos=True)
        with pytest.raises(PhalanxError):
            client.complete(SECRET, stop=[SECRET] * 99)
