"""`transformers` generate: one batch, greedy, in this process."""

from __future__ import annotations

import time
from typing import Any

import torch
import transformers
from driving import Job, Output, Run, serve


class FirstToken(transformers.StoppingCriteria):
    """Stops nothing; notes when it was first asked."""

    def __init__(self) -> None:
        self.at: float | None = None

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """After every token of the batch."""
        self.at = self.at or time.perf_counter()
        return torch.zeros(len(input_ids), dtype=torch.bool)


def load(settings: dict[str, Any]) -> tuple[Run, dict[str, Any]]:
    """A folder of safetensors in the dtype that they have."""
    torch.set_num_threads(settings["threads"])
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        settings["folder"], dtype=getattr(torch, settings["dtype"])
    ).eval()
    model.generation_config.eos_token_id = None  # it writes the full length

    def run(job: Job) -> list[Output]:
        tokens, first = torch.tensor(job.prompts), FirstToken()
        with torch.inference_mode():
            rows = model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=job.output_tokens,
                do_sample=False,
                pad_token_id=0,
                stopping_criteria=transformers.StoppingCriteriaList([first]),
            )
        return [Output(first.at, row[tokens.shape[1] :].tolist()) for row in rows]

    return run, {"version": transformers.__version__, "torch": torch.__version__}


if __name__ == "__main__":
    serve(load)
