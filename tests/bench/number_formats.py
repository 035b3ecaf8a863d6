"""What each number format costs in perplexity and gains in speed, in one run.

    python tests/bench/number_formats.py --text README.md --tokens 1024

One rank in this process, no service around it. The text is scored in one prompt; decode steps are
those of running sequences, each with `--context` tokens behind it, and of every size the quickest of
`--repeats` is shown: the machine at its best, so leave it alone meanwhile. Formats are measured in
turns, so that what disturbs one disturbs all.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from phalanx.controller.model import ServedModel, resolve_model
from phalanx.kernels.select import select_backend
from phalanx.protos.sampling import SamplingParams
from phalanx.protos.specs import CacheSpec, WorkerSpec
from phalanx.protos.steps import NewSequence, Row, StepPlan, StepResult
from phalanx.workers.engine import Engine
from phalanx.workers.parallel import SingleRank

BLOCK_SIZE, CHUNK = 16, 256
FORMATS = ("float32:float32", "bfloat16:bfloat16", "bfloat16:int8", "int8:bfloat16", "int8:int8")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--model", default="smollm2", help="smollm2, a folder or a .gguf file")
    parser.add_argument("--formats", nargs="+", default=FORMATS, help="dtype:kv_dtype")
    parser.add_argument("--text", type=Path, default=Path("README.md"), help="what is scored")
    parser.add_argument("--tokens", type=int, default=1024, help="of the text")
    parser.add_argument(
        "--batch", type=int, nargs="*", default=[1, 64], help="sizes of decode steps"
    )
    parser.add_argument("--context", type=int, default=64, help="tokens behind each decoded one")
    parser.add_argument("--repeats", type=int, default=20, help="decode steps of each size")
    parser.add_argument("--rounds", type=int, default=2, help="turns of the formats")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--kernels", help="cpu-native, cpu-torch or reference")
    parser.add_argument("--output", type=Path, help="where the figures go, JSON")
    return parser.parse_args()


@dataclass
class Rank:
    """An engine and what its next plan has to know."""

    engine: Engine
    kernels: str
    weight_bytes: int
    step: int = 0
    sequences: int = 0
    finished: list[int] = field(default_factory=list)

    @classmethod
    def load(cls, model: ServedModel, formats: str, options: argparse.Namespace) -> Rank:
        """A rank alone, with room for the largest batch."""
        dtype, kv_dtype = formats.split(":")
        longest = options.context + options.repeats + 1
        blocks = max(options.batch, default=1) * -(-longest // BLOCK_SIZE)
        blocks = max(blocks, -(-options.tokens // BLOCK_SIZE))
        spec = WorkerSpec(
            checkpoint=model.checkpoint,
            model=model.spec,
            dtype=dtype,  # type: ignore[arg-type]
            tp_size=1,
            cache=CacheSpec(block_size=BLOCK_SIZE, num_blocks=blocks, dtype=kv_dtype),  # type: ignore[arg-type]
            max_tokens_per_step=max(CHUNK, *options.batch),
            max_running=max(options.batch, default=1),
            eos_token_ids=(),
            device="cpu",
        )
        torch.set_num_threads(options.threads)
        backend, reason = select_backend("cpu", options.kernels)
        engine = Engine(spec, SingleRank(), backend, reason)
        return cls(engine, reason, engine.load().weight_bytes)

    def execute(self, new: list[NewSequence], rows: list[Row]) -> tuple[float, StepResult]:
        """Seconds of one plan, and its result."""
        plan = StepPlan(0, self.step, self.finished, new, [], rows)
        self.step, self.finished = self.step + 1, []
        began = time.perf_counter()
        result = self.engine.step(plan)
        return time.perf_counter() - began, result

    def score(self, tokens: list[int]) -> tuple[list[float], list[int], float]:
        """Log-probabilities and likeliest tokens behind each of `tokens`; tokens a second."""
        params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1)
        seq, seconds = self.sequences, 0.0
        blocks = list(range(-(-len(tokens) // BLOCK_SIZE)))
        found: list[float] = []
        best: list[int] = []
        for first in range(0, len(tokens), CHUNK):
            new = [NewSequence(seq, tokens, len(tokens), 0, params)] if first == 0 else []
            count = min(CHUNK, len(tokens) - first)
            took, result = self.execute(new, [Row(seq, count, [] if first else blocks)])
            seconds += took
            for part in result.prompt_logprobs:
                found += [token.logprob for token in part.tokens]
                best += [top[0].token_id for top in part.top]
        self.sequences, self.finished = seq + 1, [seq]
        return found, best, len(tokens) / seconds

    def decode(self, tokens: list[int], batch: int, context: int, repeats: int) -> float:
        """Tokens a second of the quickest greedy step of `batch` sequences."""
        params = SamplingParams(temperature=0.0, max_tokens=repeats + 1, ignore_eos=True)
        each = -(-(context + repeats + 1) // BLOCK_SIZE)
        seqs = range(self.sequences, self.sequences + batch)
        for index, seq in enumerate(seqs):
            prompt = (tokens * 2)[index % len(tokens) :][:context]
            new = [NewSequence(seq, prompt, len(prompt), 0, params)]
            self.execute(
                new, [Row(seq, len(prompt), list(range(index * each, (index + 1) * each)))]
            )
        rows = [Row(seq, 1, []) for seq in seqs]
        quickest = min(self.execute([], rows)[0] for _ in range(repeats))
        self.sequences, self.finished = seqs.stop, list(seqs)
        return batch / quickest


def main() -> None:
    """Measure and show."""
    options = arguments()
    model = resolve_model(options.model)
    text = options.text.read_text(encoding="utf-8")
    tokens = list(model.tokenizer.encode(text).ids)[: options.tokens]
    ranks = {formats: Rank.load(model, formats, options) for formats in options.formats}
    figures: dict[str, dict[str, float]] = {formats: {} for formats in ranks}
    expected: list[int] = []
    for _ in range(options.rounds):
        for formats, rank in ranks.items():
            values, best, rate = rank.score(tokens)
            expected = expected or best
            row = figures[formats]
            row["perplexity"] = math.exp(-sum(values) / len(values))
            same = sum(a == b for a, b in zip(best, expected, strict=True))
            row["same_best_token"] = same / len(best)
            row["weight_mib"] = rank.weight_bytes / 2**20
            row["scored_per_s"] = max(row.get("scored_per_s", 0.0), rate)
            for batch in options.batch:
                rate = rank.decode(
                    tokens, batch, min(options.context, len(tokens)), options.repeats
                )
                key = f"decoded_per_s_{batch}"
                row[key] = max(row.get(key, 0.0), rate)
    show(figures, f"{model.name}, {len(tokens)} tokens of {options.text}, {rank.kernels}")
    if options.output:
        options.output.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def show(figures: dict[str, dict[str, float]], title: str) -> None:
    """A table on the terminal."""
    table = Table("dtype:kv_dtype", *figures, title=title)
    for name in next(iter(figures.values())):
        table.add_row(name, *(f"{row[name]:.4g}" for row in figures.values()))
    Console().print(table)


if __name__ == "__main__":
    main()
