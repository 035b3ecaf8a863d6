"""Time to the first token of a prompt whose KV blocks have left the pool: loaded, and computed.

    python tests/bench/kv_tiers.py --tokens 2048 --rounds 5

The pool holds one prompt and one block more. Every round brings a new prompt, which is computed; then
other prompts, which take its blocks; then the first one again, whose blocks lie in host memory, or,
with host memory as small as may be, on disk. The first rounds of each engine only teach it how fast
it copies and computes, and are not counted. `loaded` is what part of the prompt's blocks was not
computed again: less than all means that computing was predicted to be faster.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from phalanx.controller.benchmark.report import date_now, machine_facts, software_versions
from phalanx.controller.offline import Offline

WARM_UP_ROUNDS = 2
BLOCK_TOKENS = 16


def first_token_s(engine: Offline, prompt: list[int]) -> float:
    """Seconds until a prompt's first token, of an engine that has nothing else to do."""
    started = time.perf_counter()
    engine.generate(prompt, max_tokens=1, temperature=0.0)
    return time.perf_counter() - started


def settle(engine: Offline) -> None:
    """Wait until nothing is copied any more."""
    last, since = engine.stats.tiers, time.perf_counter()
    while time.perf_counter() - since < 0.7:
        time.sleep(0.05)
        if (now := engine.stats.tiers) != last:
            last, since = now, time.perf_counter()


def measure(model: str, tokens: int, rounds: int, tp: int, **tiers: Any) -> dict[str, Any]:
    """Medians over rounds, seconds, with the part of the blocks that were loaded."""
    draw = random.Random(0)
    computed, loaded, parts = [], [], []
    room = tokens + BLOCK_TOKENS
    settings = {"tp": tp, "kv_tokens": room, "max_context": room} | tiers
    with Offline(model, **settings) as engine:
        vocabulary = engine.model.spec.vocab_size

        def new_prompt() -> list[int]:
            return [draw.randrange(1000, vocabulary) for _ in range(tokens)]

        for number in range(WARM_UP_ROUNDS + rounds):
            prompt = new_prompt()
            compute_s = first_token_s(engine, prompt)
            settle(engine)
            first_token_s(engine, new_prompt())
            settle(engine)
            before = engine.stats.tiers
            load_s = first_token_s(engine, prompt)
            settle(engine)
            after = engine.stats.tiers
            if number >= WARM_UP_ROUNDS and before is not None and after is not None:
                moved = after.loaded_host + after.loaded_disk
                moved -= before.loaded_host + before.loaded_disk
                computed.append(compute_s)
                loaded.append(load_s)
                parts.append(moved / ((tokens - 1) // BLOCK_TOKENS))
    return {
        "computed_s": median(computed),
        "loaded_s": median(loaded),
        "ratio": median(loaded) / median(computed),
        "loaded": median(parts),
    }


def main() -> None:
    """Measure both tiers and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument(
        "--folder", type=Path, help="where the disk tier lies; its disk is measured"
    )
    parser.add_argument("--output", type=Path, help="a JSON file for the numbers")
    args = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        sizes: dict[str, dict[str, Any]] = {
            "host memory": {"host_kv_memory": 2**30},
            "disk": {"host_kv_memory": 24 * 2**20, "disk_kv_path": folder},
        }
        for name, tiers in sizes.items():
            results[name] = measure(args.model, args.tokens, args.rounds, args.tp, **tiers)
    table = Table("from", "computed", "loaded", "ratio", "blocks loaded")
    for name, row in results.items():
        table.add_row(
            name,
            f"{row['computed_s'] * 1000:.0f} ms",
            f"{row['loaded_s'] * 1000:.0f} ms",
            f"{row['ratio']:.2f}",
            f"{row['loaded']:.0%}",
        )
    Console().print(table)
    if args.output is not None:
        facts = {"date": date_now(), "machine": machine_facts(), "software": software_versions()}
        args.output.write_text(json.dumps(facts | {"results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
