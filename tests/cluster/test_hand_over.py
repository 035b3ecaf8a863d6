"""A replica of a real cluster is drained while it streams; in a process of its own, as Ray allows
one cluster each."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).parents[1] / "bench" / "handover.py"


def test_32_running_streams_go_on_elsewhere_with_the_same_tokens(
    tmp_path: Path, smollm2_gguf: Path
) -> None:
    report = tmp_path / "report.json"
    sizes = {"streams": 32, "prompt-tokens": 40, "output-tokens": 96, "before": 4, "rounds": 1}
    flags = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    done = subprocess.run(
        [sys.executable, str(BENCH), *flags, "--output", str(report)],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    [found] = json.loads(report.read_text())["rounds"]
    print(f"gap p95 {found['gap_p95_s']:.3f} s, undisturbed {found['calm_gap_p95_s']:.3f} s")
    assert (found["lost"], found["other_tokens"]) == (0, 0)
    assert found["recomputed"] == 0 and found["moved"] >= 16, done.stdout  # others end meanwhile
