"""Generation without a server: ranks as child processes of the caller."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from phalanx.controller.offline import Offline
from phalanx.protos.errors import ConfigError, GroupLost, InvalidArgument
from phalanx.protos.sampling import SamplingParams

SIZES: dict[str, Any] = {"dtype": "float32", "threads": 1, "kv_tokens": 4096}
PROMPTS = [[5, 9, 300, 41], [7], [200, 201, 202, 203, 204, 205, 206], [11, 12]]


def ranks() -> list[psutil.Process]:
    """Rank processes of this one."""
    children = psutil.Process().children(recursive=True)
    return [child for child in children if "phalanx.workers.process" in child.cmdline()]


@pytest.fixture(scope="module")
def model(tiny_llama: Callable[..., Path]) -> str:
    """A checkpoint with a chat template."""
    return str(tiny_llama())


@pytest.mark.parametrize("tp", [1, 2])
def test_tokens_are_those_of_the_step_loop_itself(
    model: str, tp: int, local_replica: Callable[..., Any]
) -> None:
    params = SamplingParams(max_tokens=12, temperature=0.9, seed=5, ignore_eos=True)
    known = local_replica(model).tokens([(prompt, params) for prompt in PROMPTS])
    with Offline(model, tp=tp, max_running=2, **SIZES) as offline:  # two have to wait
        assert len(ranks()) == tp
        answers = offline.generate(PROMPTS, max_tokens=12, temperature=0.9, seed=5, ignore_eos=True)
        again = offline.generate(PROMPTS[0], max_tokens=12, temperature=0.9, seed=5)
    assert [list(answer.token_ids) for answer in answers] == known
    assert again[0].token_ids == answers[0].token_ids[: len(again[0].token_ids)]
    assert all(0 < (answer.time_to_first_token_s or 0) <= answer.total_s for answer in answers)
    assert ranks() == []


def test_requests_end_as_they_do_over_a_service(model: str) -> None:
    with Offline(model, **SIZES) as offline:
        [whole] = offline.generate("The rain", max_tokens=30, temperature=0.0, ignore_eos=True)
        stop = whole.text[len(whole.text) // 2 :][:2]
        [cut] = offline.generate(
            ["The rain"], max_tokens=30, temperature=0.0, ignore_eos=True, stop=[stop]
        )
        assert cut.finish_reason == "stop" and cut.stop_reason == stop
        assert cut.text == whole.text[: whole.text.index(stop)]

        [two] = offline.chat(["Hello"], n=2, seed=1, max_tokens=5, ignore_eos=True)
        assert [len(sample.token_ids) for sample in two.samples] == [5, 5]
        assert two.samples[0].token_ids != two.samples[1].token_ids
        assert offline.generate([]) == []

        with pytest.raises(InvalidArgument, match=r"params\.top_p"):
            offline.generate(["good", "bad"], top_p=2.0)
        with pytest.raises(InvalidArgument, match="token_ids"):
            offline.generate([[1], [10**6]])
        with pytest.raises(TypeError, match="did you mean temperature"):
            offline.generate("x", temperatur=1.0)
        assert offline.generate("The rain", max_tokens=30, temperature=0.0, ignore_eos=True)[
            0
        ].token_ids == (whole.token_ids)


def test_settings_that_mean_nothing_here_are_refused(model: str) -> None:
    with pytest.raises(ConfigError, match="port: no such setting; allowed: tp, dtype"):
        Offline(model, port=1)
    with pytest.raises(ConfigError, match="tp is 0"):
        Offline(model, tp=0)
    with pytest.raises(ConfigError, match="collectives is 'nccl'"):
        Offline(model, collectives="nccl", **SIZES)
    assert ranks() == []


def test_a_lost_rank_ends_generation_at_once(model: str) -> None:
    with Offline(model, tp=2, **SIZES) as offline:
        os.kill(ranks()[1].pid, signal.SIGKILL)
        for _ in range(2):  # and it stays so
            with pytest.raises(GroupLost):
                offline.generate("The rain", max_tokens=200, ignore_eos=True)
    assert ranks() == []


def test_the_readme_s_example_runs(smollm2_gguf: Path) -> None:
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    [example] = [block for block in blocks if "import Offline" in block]
    command = [sys.executable, "-P", "-c", example]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    assert "Paris" in done.stdout and done.returncode == 0, done.stderr
