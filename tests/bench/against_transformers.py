"""Phalanx and `transformers` on one machine, in one run: same weights, dtype, lengths and batches.

    python tests/bench/against_transformers.py --output build/against_transformers.json

Phalanx is measured as its users meet it: a cluster in processes of its own, asked over gRPC, with
as many requests open as the batch holds. `transformers` gets the same number of prompts as one
batch without padding, in this process, with nothing between it and the tensors. Both write exactly
the asked number of tokens, greedily, after a warm-up; rates count the reading of prompts too.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from phalanx.controller.benchmark.report import date_now, machine_facts, software_versions
from phalanx.controller.benchmark.served import served
from phalanx.controller.benchmark.session import run_benchmark
from phalanx.controller.benchmark.settings import Settings
from phalanx.controller.benchmark.workload import Job, Length, make_jobs
from phalanx.controller.client import AsyncClient
from phalanx.controller.model import ServedModel, resolve_model

SAME_TOKENS = 16


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--model", default="smollm2", help="smollm2, a folder or a .gguf file")
    parser.add_argument("--tp", type=int, nargs="+", default=[1, 2], help="ranks, one run each")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="batch sizes")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3, help="batches measured of each size")
    parser.add_argument("--flag", nargs="*", default=[], help="more words for phalanx serve")
    parser.add_argument("--output", type=Path, help="where the figures go, JSON")
    return parser.parse_args()


def measure_phalanx(options: argparse.Namespace, tp: int, probe: Job) -> dict[str, Any]:
    """Figures for every batch size, and the tokens that follow the probe."""
    words = ["--tp", str(tp), "--dtype", options.dtype, "--max-running", str(max(options.batch))]
    longest = options.prompt_tokens + options.output_tokens
    # whole blocks for every request, and as much again, so that none is ever sent back to wait
    words += ["--max-context", str(longest), "--kv-tokens", str(2 * max(options.batch) * longest)]
    with served(options.model, [*words, *options.flag]) as address:
        return asyncio.run(_ask_phalanx(address, options, probe))


async def _ask_phalanx(address: str, options: argparse.Namespace, probe: Job) -> dict[str, Any]:
    batches = {}
    async with AsyncClient(address=address) as client:
        same = await client.complete(
            list(probe.prompt), max_tokens=SAME_TOKENS, temperature=0.0, ignore_eos=True
        )
        for batch in options.batch:
            settings = Settings(
                requests=batch * options.repeats,
                concurrency=batch,
                prompt_tokens=str(options.prompt_tokens),
                output_tokens=str(options.output_tokens),
                seed=batch,  # other prompts for every size, or they would be in the prefix cache
            )
            results = (await run_benchmark(client, settings, lambda *_: lambda _: None)).results
            if results.failed or results.short:
                raise SystemExit(f"phalanx failed: {results.statuses} {results.errors}")
            first, rest = results.time_to_first_token_s, results.time_per_output_token_s
            batches[str(batch)] = {
                "output_tokens_per_s": results.output_tokens_per_s,
                "first_token_s": first.p50 if first else None,
                "token_s": rest.p50 if rest else None,
            }
    return {"batches": batches, "probe": list(same.samples[0].token_ids)}


def load_transformers(served_model: ServedModel, dtype: str) -> Any:
    """The model as `transformers` loads it, its weights dequantised to `dtype`."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    path = Path(served_model.checkpoint)
    options: dict[str, Any] = {"dtype": getattr(torch, dtype)}
    if path.is_file():
        options["gguf_file"] = path.name
        if hasattr(transformers, "GgufConfig"):  # releases that would keep the weights packed
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
        path = path.parent
    model = transformers.AutoModelForCausalLM.from_pretrained(path, **options)
    found = {parameter.dtype for parameter in model.parameters()}
    if found != {getattr(torch, dtype)}:
        raise SystemExit(f"transformers loaded {found}, not {dtype}: nothing to compare with")
    model.generation_config.eos_token_id = None  # it writes the full length
    return model.eval()


def measure_transformers(
    options: argparse.Namespace, model: Any, jobs: Sequence[Job]
) -> dict[str, Any]:
    """The same figures; `jobs[0]` is the probe."""
    import torch

    def generate(rows: Sequence[Job], count: int) -> tuple[float, list[int]]:
        tokens = torch.tensor([row.prompt for row in rows])
        began = time.perf_counter()
        with torch.inference_mode():
            output = model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=count,
                do_sample=False,
                pad_token_id=0,
            )
        return time.perf_counter() - began, output[0, tokens.shape[1] :].tolist()

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    probe = generate(jobs[:1], SAME_TOKENS)[1]
    batches = {}
    for batch in options.batch:
        rows = jobs[:batch]
        generate(rows, options.output_tokens)  # warm-up
        firsts = [generate(rows, 1)[0] for _ in range(options.repeats)]
        totals = [generate(rows, options.output_tokens)[0] for _ in range(options.repeats)]
        first, total = statistics.median(firsts), statistics.median(totals)
        batches[str(batch)] = {
            "output_tokens_per_s": batch * options.output_tokens * len(totals) / sum(totals),
            "first_token_s": first,
            "token_s": (total - first) / max(1, options.output_tokens - 1),
        }
    return {"batches": batches, "probe": probe, "threads": torch.get_num_threads()}


def shared_start(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two answers have in common from their beginning."""
    pairs = zip(one, other, strict=False)
    return next((at for at, (left, right) in enumerate(pairs) if left != right), len(one))


def ratio_table(options: argparse.Namespace, runs: dict[str, Any], reference: Any) -> Table:
    """A line for each system and batch size."""
    table = Table(title=f"{options.model}, {options.dtype}", title_justify="left")
    for name in ("", "batch", "output tokens/s", "first token, ms", "a token, ms", "ratio"):
        table.add_column(name, justify="right" if name else "left")
    for batch in map(str, options.batch):
        known = reference["batches"][batch]
        for name, run in {"transformers": reference, **runs}.items():
            row = run["batches"][batch]
            table.add_row(
                name,
                batch,
                f"{row['output_tokens_per_s']:.1f}",
                f"{row['first_token_s'] * 1000:.0f}",
                f"{row['token_s'] * 1000:.1f}",
                f"{row['output_tokens_per_s'] / known['output_tokens_per_s']:.2f}",
            )
    return table


def main() -> None:
    """Measure both, print the table, write the figures."""
    options, console = arguments(), Console()
    load, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
    if load > cores / 2:
        console.print(f"[red]this machine is busy[/]: load {load:.1f} on {cores} cores")
    model = resolve_model(options.model)
    size = Length(options.prompt_tokens, options.output_tokens)
    ends = set(model.eos_token_ids)
    jobs = make_jobs([size] * max(options.batch), model.spec.vocab_size, ends, seed=0)
    runs = {f"phalanx tp={tp}": measure_phalanx(options, tp, jobs[0]) for tp in options.tp}
    reference = measure_transformers(options, load_transformers(model, options.dtype), jobs)
    console.print(ratio_table(options, runs, reference))
    for name, run in runs.items():
        run["same_tokens"] = shared_start(run["probe"], reference["probe"])
        console.print(f"{name}: {run['same_tokens']} of {SAME_TOKENS} greedy tokens are the same")
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        report = {
            "date": date_now(),
            "settings": vars(options) | {"output": str(options.output)},
            "machine": machine_facts() | {"load_before": load},
            "versions": software_versions(),
            "phalanx": runs,
            "transformers": reference,
        }
        options.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
