"""The parts of `driver.py`."""

from __future__ import annotations

import argparse
import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import stepping  # type: ignore[import-not-found]
from stepping import Rendezvous, demo, generate, make_engine, make_spec, wanted

from phalanx.kernels.bench.__main__ import check, run
from phalanx.kernels.reference import ReferenceBackend
from phalanx.kernels.select import select_backend

Outcome = dict[str, Any]
TIE = 1e-3
"""Two tokens whose log-probabilities differ by less may change places in float32."""
MOST_DRIFT = 0.1
"""Mean difference of log-probabilities in bfloat16, nats."""


def kernels(words: argparse.Namespace) -> Outcome:
    """Small odd shapes and a model's own, in float32 and bfloat16."""
    shape = "llama-3.1-8b" if words.device == "cuda" else "smollm2-135m"
    rows = []
    for dtype in ("float32", "bfloat16"):
        rows += check(words.device, shape, dtype, words.kernels, tokens=129, context=300)
    rows += _numerics(words)
    return {"ok": all(row["ok"] for row in rows), "rows": rows}


def _numerics(words: argparse.Namespace) -> list[dict[str, Any]]:
    """The kernels' own tests, on the device: fused and quantised kernels are there."""
    folder = Path(__file__).resolve().parents[1] / "unit" / "kernels" / "gpu" / "numerics"
    if words.device == "cpu" or not folder.is_dir():
        return []
    flags = ["-q", "-p", "no:cacheprovider", "-m", "", str(folder)]
    environment = os.environ | {"PYTHONSAFEPATH": "1", "TRITON_INTERPRET": "0"}
    tests = subprocess.run(
        [sys.executable, "-m", "pytest", *flags],
        env=environment,
        cwd=folder.parents[4],
        capture_output=True,
        text=True,
        check=False,
    )
    print(tests.stdout[-6000:])
    last = tests.stdout.strip().splitlines()[-1:]
    row = {"kernel": "tests/unit/kernels/gpu", "size": " ".join(last), "dtype": "all"}
    return [row | {"error": None, "limit": None, "ok": tests.returncode == 0}]


def engine(words: argparse.Namespace) -> Outcome:
    """The demo model's shape: tokens in float32, log-probabilities in bfloat16."""
    rows = []
    for kind in stepping.KINDS:
        spec = make_spec(demo(words.device), "float32", words.device)
        reference = make_engine(make_spec(demo(words.device), "float32", "cpu"), ReferenceBackend())
        margins = kind == "greedy"
        expected = generate(reference, wanted(kind, logprobs=2 if margins else None))
        del reference
        ours = make_engine(spec, select_backend(words.device, words.kernels)[0])
        got = generate(ours, wanted(kind))
        del ours
        rows.append(_compared(kind, expected, got))
    rows += [_drift(words, *formats) for formats in FORMATS]
    return {"ok": all(row["ok"] for row in rows), "rows": rows}


def _compared(kind: str, expected: list[Any], got: list[Any]) -> dict[str, Any]:
    """Equal up to the first token that another one ties with, where that can be seen."""
    equal = ties = 0
    for one, other in zip(expected, got, strict=True):
        pairs = zip(one.tokens, other.tokens, strict=True)
        place = next((place for place, pair in enumerate(pairs) if len(set(pair)) > 1), None)
        if place is None:
            equal += 1
        elif one.tops[place] is not None:
            first, second = (entry.logprob for entry in one.tops[place][:2])
            ties += first - second < TIE
    row = {"what": f"{kind} tokens, float32", "sequences": len(expected), "equal": equal}
    return row | {"ties": ties, "drift": None, "ok": equal + ties == len(expected)}


FORMATS = (("bfloat16", "bfloat16"), ("fp8", "fp8"), ("int4", "bfloat16"))
"""Of weights and cache; each beside the reference in the same formats."""


def _drift(words: argparse.Namespace, dtype: str, kv_dtype: str) -> dict[str, Any]:
    scored = []
    for device, kernels in (("cpu", "reference"), (words.device, words.kernels)):
        spec = make_spec(demo(words.device), dtype, device, kv_dtype=kv_dtype)
        if dtype != "bfloat16" and device == "cpu":
            kernels = "reference"  # CPUs have none of their own
        model = make_engine(spec, select_backend(device, kernels)[0])
        scored.append(generate(model, wanted("scored")))
        del model
    pairs = [
        (a.logprob, b.logprob)
        for one, other in zip(*scored, strict=True)
        for a, b in zip(one.prompt_logprobs, other.prompt_logprobs, strict=True)
    ]
    drift = sum(abs(a - b) for a, b in pairs) / len(pairs)
    well = drift < MOST_DRIFT and not math.isnan(drift)
    return {
        "what": f"prompt log-probabilities, {dtype}, cache {kv_dtype}",
        "sequences": len(scored[0]),
        "equal": None,
        "ties": None,
        "drift": drift,
        "ok": well,
    }


def two_ranks(words: argparse.Namespace) -> Outcome:
    """Tokens of two processes on one device, and of one process; all in float32."""
    ways = [words.collectives] if words.collectives else stepping.ways(words.device)
    alone = make_engine(
        make_spec(demo(words.device), "float32", words.device),
        select_backend(words.device, words.kernels)[0],
    )
    expected = {kind: generate(alone, wanted(kind)) for kind in stepping.KINDS}
    del alone
    rows = []
    for way in ways:
        answers = _start_ranks(words, way)
        for kind, sequences in expected.items():
            equal = sum(
                one.tokens == answers[0][kind][index] == answers[1][kind][index]
                for index, one in enumerate(sequences)
            )
            agree = answers[0][kind] == answers[1][kind]
            rows.append({"collectives": way, "tokens": kind, "sequences": len(sequences)})
            rows[-1] |= {
                "equal": equal,
                "ranks agree": agree,
                "ok": agree and equal == len(sequences),
            }
    return {"ok": all(row["ok"] for row in rows), "rows": rows}


def _start_ranks(words: argparse.Namespace, way: str) -> list[dict[str, Any]]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    program = [sys.executable, str(Path(__file__).with_name("driver.py")), "rank"]
    flags = ["--device", words.device, "--port", str(port), "--collectives", way]
    flags += ["--out", str(words.out)] + (["--kernels", words.kernels] if words.kernels else [])
    ranks = [
        subprocess.Popen([*program, *flags, "--rank", str(rank)], stdout=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    outputs = [rank.communicate(timeout=400)[0] for rank in ranks]
    if any(rank.returncode for rank in ranks):
        raise RuntimeError(f"a rank ended with {[rank.returncode for rank in ranks]}")
    return [json.loads(text.splitlines()[-1]) for text in outputs]


def rank(words: argparse.Namespace) -> Outcome:
    """One of two ranks: prints its tokens."""
    from phalanx.workers.group import form_group

    spec = make_spec(demo(words.device), "float32", words.device, tp_size=2)
    listener = socket.create_server(("127.0.0.1", words.port)) if words.rank == 0 else None
    meeting = Rendezvous("127.0.0.1", words.port, words.collectives, 1, 300.0)
    group, _ = form_group(spec, words.rank, meeting, listener)
    engine = make_engine(spec, select_backend(words.device, words.kernels)[0], group)
    tokens = {
        kind: [sequence.tokens for sequence in generate(engine, wanted(kind))]
        for kind in stepping.KINDS
    }
    print(json.dumps(tokens), flush=True)
    return {"ok": True, "rows": []}


def speed(words: argparse.Namespace) -> Outcome:
    """See `pace.py`."""
    from pace import speed as measured  # type: ignore[import-not-found]

    outcome: Outcome = measured(words)
    return outcome


def bench_kernels(words: argparse.Namespace) -> Outcome:
    """`phalanx.kernels.bench`, in this process."""
    large = words.device == "cuda"
    shape, tokens = ("llama-3.1-8b", 2048) if large else ("smollm2-135m", 64)
    lines = list(run(words.device, shape, "bfloat16", words.kernels, tokens, 1024))
    device, ceilings, *measured = lines
    rows = [
        {
            "kernel": line["kernel"],
            "size": line["size"],
            "us": line["seconds"] * 1e6,
            "GB/s": line["bytes"] / line["seconds"] / 1e9,
            "TFLOP/s": line["flops"] / line["seconds"] / 1e12,
            "bound": line["bound"],
            "share %": 100 * line["share"],
        }
        for line in measured
    ]
    return {"ok": True, "rows": rows, "device": device, "ceilings": ceilings}
