"""Small random models of every family, and greedy generation by ranks on threads."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor

from phalanx.kernels.select import select_backend
from phalanx.protos.sampling import SamplingParams
from phalanx.protos.shards import kv_bytes_per_token, weight_bytes
from phalanx.protos.specs import CacheSpec, DecoderSpec, DType, WorkerSpec
from phalanx.protos.steps import NO_STATE, NewSequence, PromptLogprobs, Row, StateUse, StepPlan
from phalanx.workers.engine import Engine
from phalanx.workers.fused import FusedLayers
from phalanx.workers.models.registry import describe
from phalanx.workers.models.verified import CHUNKS, HITS, LENGTHS, ONE_CALL
from phalanx.workers.parallel import SingleRank, TensorParallel, ThreadRank

VOCAB, NEW_TOKENS, BLOCK_SIZE, NUM_BLOCKS = 131, 16, 4, 40
PROMPTS = [[(7 * i * i + 3 * i + 5) % VOCAB for i in range(37)], [i * 5 % VOCAB for i in range(21)]]
PIECES = [[5, 1, 14, 17], [20, 1]]
SERVED = {"block_size": 4, "num_blocks": 120, "max_tokens_per_step": 13, "max_running": 4}
SERVED |= {"num_states": 40, "state_stride": 8}
Tops = list[list[Any]]
Seen = dict[tuple[str, str], dict[str, list[int]]]
SEEN = pytest.StashKey[Seen]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", type=Path, metavar="FILE", help="for what was verified")


def pytest_deselected(items: list[pytest.Item]) -> None:
    """A run of a part of the tests is no record."""
    for item in items:
        if "verify" in getattr(item, "fixturenames", ()):
            item.config.option.record = None


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    file = session.config.getoption("--record", None)
    if file is None or exitstatus != 0:
        return
    lines = []
    for (name, family), features in sorted(session.config.stash.get(SEEN, {}).items()):
        kept = {feature: sorted(features[feature]) for feature in sorted(features)}
        lines.append(f"{json.dumps(name)}: {json.dumps({'family': family, 'features': kept})}")
    file.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


@pytest.fixture
def verify(request: pytest.FixtureRequest) -> Callable[[str, str, int, set[str]], None]:
    """`verify(configuration, family, tp, features)`: this was seen to be right."""

    def note(name: str, family: str, tp: int, features: set[str]) -> None:
        found = request.config.stash.setdefault(SEEN, {}).setdefault((name, family), {})
        for feature in features:
            found.setdefault(feature, []).append(tp)

    return note


@dataclass(frozen=True)
class Greedy:
    """What `transformers` generates: tokens [prompt][step], log-probabilities [prompt, step, V]."""

    tokens: list[list[int]]
    logprobs: Tensor

    @property
    def margin(self) -> float:
        """By how much the likeliest token leads, where that is the least."""
        best = self.logprobs.topk(2, dim=-1).values
        return float((best[..., 0] - best[..., 1]).min())


@dataclass
class RandomModel:
    """A checkpoint on disk, and the model of `transformers` that it was saved from."""

    folder: Path
    reference: Any
    spec: DecoderSpec
    known: dict[str, Greedy] = field(default_factory=dict)

    def logprobs(self, tokens: list[int]) -> Tensor:
        """Log-probabilities of what follows each token, [len(tokens), vocabulary]."""
        dynamic = self.spec.rope is not None and self.spec.rope.scaling == "dynamic"
        # by the length of the pass; ours is by the length that is served
        padded = tokens + [0] * (self.spec.max_context - len(tokens) if dynamic else 0)
        with torch.no_grad():
            logits = self.reference(torch.tensor([padded]), use_cache=False).logits
        return torch.as_tensor(logits[0, : len(tokens)].double().log_softmax(-1))

    def greedy(self, prompts: list[list[int]], count: int, length: int) -> Greedy:
        """`count` tokens after each prompt, every one from a pass over all tokens before it.

        Passes are over `length` tokens; what stands behind a token does not reach it.
        """
        key = json.dumps([prompts, count, length])
        if key in self.known:
            return self.known[key]
        tokens = torch.zeros(len(prompts), length, dtype=torch.int64)
        for row, prompt in zip(tokens, prompts, strict=True):
            row[: len(prompt)] = torch.tensor(prompt)
        rows, last = torch.arange(len(prompts)), torch.tensor([len(p) - 1 for p in prompts])
        steps = []
        with torch.no_grad():
            for _ in range(count):
                logits = self.reference(tokens, use_cache=False).logits[rows, last]
                steps.append(logits.double().log_softmax(-1))
                last = last + 1
                tokens[rows, last] = steps[-1].argmax(-1)
        outputs = [
            row[len(prompt) : len(prompt) + count].tolist()
            for row, prompt in zip(tokens, prompts, strict=True)
        ]
        self.known[key] = Greedy(outputs, torch.stack(steps, 1))
        return self.known[key]


@pytest.fixture(scope="session")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., RandomModel]:
    """Factory: `random_model("GPT2Config", n_embd=55, ...)`, a model with that configuration.

    "ChatGLMConfig", which `transformers` lacks, is a Glm rewritten. Every parameter is drawn anew, norms and biases too, so that no one or zero hides a mistake.
    `seed` draws other ones. Equal calls give the same model, whose folder must not be changed.
    """
    made: dict[str, RandomModel] = {}

    def make(kind: str, *, seed: int = 0, **fields: Any) -> RandomModel:
        key = json.dumps([kind, seed, fields], sort_keys=True)
        made[key] = made.get(key) or _save(tmp_path_factory.mktemp(kind), kind, seed, fields)
        return made[key]

    return make


def _save(folder: Path, kind: str, seed: int, fields: dict[str, Any]) -> RandomModel:
    import transformers

    chatglm = kind == "ChatGLMConfig"
    named = "GlmConfig" if chatglm else kind
    config = getattr(transformers, named)(**json.loads(json.dumps(fields)))
    # eager attention caps scores, the fused kind does not; but eager Falcon adds ALiBi twice
    attention = "sdpa" if kind == "FalconConfig" else "eager"
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation=attention, experts_implementation="eager"
    )
    # a tied head says the last token again, unless the layers outweigh the embedding
    gain = 3.0 if config.tie_word_embeddings else 1.2
    generator = torch.Generator().manual_seed(sum(map(ord, kind)) + 10_000 * seed)
    with torch.no_grad():
        for label, parameter in model.named_parameters():
            if label.endswith("weight") and ("norm" in label or "ln_" in label):
                parameter.uniform_(0.5, 1.5, generator=generator)
            elif parameter.dim() == 1:
                parameter.normal_(0, 0.2, generator=generator)
            else:
                scale = 1.2 if parameter.shape[0] == config.vocab_size else gain
                parameter.normal_(0, scale * parameter.shape[-1] ** -0.5, generator=generator)
        for label, buffer in model.named_buffers():
            if "correction" in label:
                buffer.normal_(0, 0.2, generator=generator)
    model.tie_weights()
    model.save_pretrained(folder)
    vocabulary = {f"<{token}>": token for token in range(config.vocab_size)}
    Tokenizer(WordLevel(vocabulary, unk_token="<0>")).save(str(folder / "tokenizer.json"))
    saved = as_chatglm(folder) if chatglm else json.loads((folder / "config.json").read_text())
    spec = describe(saved)
    spec = msgspec.structs.replace(spec, max_context=spec.longest_context)
    return RandomModel(folder, model.eval(), spec)


# ChatGLM's words for what Glm has
CHATGLM_FIELDS = {
    "num_hidden_layers": "num_layers", "intermediate_size": "ffn_hidden_size",
    "head_dim": "kv_channels", "num_key_value_heads": "multi_query_group_num",
    "vocab_size": "padded_vocab_size", "max_position_embeddings": "seq_length",
    "rms_norm_eps": "layernorm_epsilon", "attention_bias": "add_qkv_bias",
}  # fmt: skip
CHATGLM_NAMES = {
    "self_attn.o_proj": "self_attention.dense", "mlp.gate_up_proj": "mlp.dense_h_to_4h",
    "mlp.down_proj": "mlp.dense_4h_to_h", "model.layers.": "transformer.encoder.layers.",
    "model.embed_tokens": "transformer.embedding.word_embeddings",
    "model.norm": "transformer.encoder.final_layernorm", "lm_head": "transformer.output_layer",
}  # fmt: skip


def as_chatglm(folder: Path) -> dict[str, Any]:
    """Rewrite a Glm checkpoint as ChatGLM3's are written; its config."""
    glm = json.loads((folder / "config.json").read_text())
    same = ("hidden_size", "num_attention_heads", "tie_word_embeddings", "vocab_size")
    config = {CHATGLM_FIELDS.get(name, name): glm[name] for name in (*CHATGLM_FIELDS, *same)}
    config |= {"architectures": ["ChatGLMModel"], "model_type": "chatglm", "original_rope": True}
    config |= {"multi_query_attention": True, "rmsnorm": True, "post_layer_norm": True}
    config |= {"add_bias_linear": False, "quantization_bit": 0, "classifier_dropout": None}
    config |= {"rope_ratio": glm["rope_parameters"]["rope_theta"] / 10000}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    for layer, kind in itertools.product(range(config["num_layers"]), ("weight", "bias")):
        parts = [tensors.pop(f"model.layers.{layer}.self_attn.{p}_proj.{kind}") for p in "qkv"]
        tensors[f"model.layers.{layer}.self_attention.query_key_value.{kind}"] = torch.cat(parts)
    found = {"transformer.rotary_pos_emb.inv_freq": torch.ones(2)}
    for name, tensor in tensors.items():
        for ours, theirs in CHATGLM_NAMES.items():
            name = name.replace(ours, theirs)
        found[name] = tensor
    save_file(found, folder / "model.safetensors")
    return config


def on_all_ranks(engines: list[Engine], work: Callable[[Engine], Any]) -> list[Any]:
    with ThreadPoolExecutor(len(engines)) as pool:
        return list(pool.map(work, engines))


def start(
    checkpoint: Path,
    spec: DecoderSpec,
    tp: int,
    num_blocks: int = NUM_BLOCKS,
    dtype: DType = "float32",
    kernels: str | None = None,
    kv_dtype: DType | None = None,
) -> list[Engine]:
    sizes = {"block_size": BLOCK_SIZE, "num_blocks": num_blocks, "num_states": len(PROMPTS)}
    worker = WorkerSpec(
        checkpoint=str(checkpoint),
        model=spec,
        dtype=dtype,
        tp_size=tp,
        cache=CacheSpec(dtype=kv_dtype or dtype, **sizes),
        max_tokens_per_step=100,
        max_running=8,
        eos_token_ids=(),
        device="cpu",
    )
    groups: list[TensorParallel] = [SingleRank()] if tp == 1 else list(ThreadRank.group(tp))
    engines = [Engine(worker, group, select_backend("cpu", kernels)[0]) for group in groups]
    for report in on_all_ranks(engines, lambda engine: engine.load()):
        assert report.weight_bytes == weight_bytes(spec, tp, report.rank, dtype)
        token = kv_bytes_per_token(spec, tp, report.rank, worker.cache.dtype)
        assert report.kv_bytes == token * BLOCK_SIZE * num_blocks
    return engines


def generate(engines: list[Engine]) -> tuple[list[list[int]], list[Tops]]:
    """Greedy outputs of `PROMPTS` in one batch, chunked oddly, in scattered blocks.

    With them, for each sequence and position from the second on, the most likely tokens.
    """
    params = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, logprobs=5, prompt_logprobs=5)
    free = [(index * 11 + 3) % NUM_BLOCKS for index in range(NUM_BLOCKS)]
    chunks = [list(sizes) for sizes in PIECES]
    outputs: list[list[int]] = [[], []]
    tops, step = [Tops(), Tops()], 0
    while min(map(len, outputs)) < NEW_TOKENS:
        new = [NewSequence(seq, p, len(p), 0, params) for seq, p in enumerate(PROMPTS)]
        rows = []
        for seq in (0, 1):
            blocks, begin = ([], seq) if step else (free[20 * seq : 20 * seq + 16], NO_STATE)
            count, use = chunks[seq].pop(0) if chunks[seq] else 1, StateUse(begin, seq)
            rows.append(Row(seq, count, blocks, use))
        plan = StepPlan(0, step, [], new if step == 0 else [], [], rows)
        results = on_all_ranks(engines, lambda engine, plan=plan: engine.step(plan))
        assert all(result.sampled == results[0].sampled for result in results)
        for scored in results[0].prompt_logprobs:
            tops[scored.seq] += scored.top
        for token in results[0].sampled:
            outputs[token.seq].append(token.token_id)
            tops[token.seq].append(token.top)
        step += 1
    return outputs, tops


@dataclass(frozen=True)
class Served:
    """What a replica answered to several requests at once, and what its plans held meanwhile."""

    tokens: list[list[int]]
    tops: list[Tops]
    features: set[str]


@pytest.fixture
def served(
    local_replica: Callable[..., Any], one_thread: None, monkeypatch: pytest.MonkeyPatch
) -> Callable[[RandomModel, list[list[int]], int, int], Served]:
    """`served(model, prompts, count, tp)`: all through one scheduler, in few tokens a step."""
    calls: list[Any] = []
    layers = FusedLayers.__call__
    counted = lambda *inputs: (calls.append(inputs), layers(*inputs))[1]
    monkeypatch.setattr(FusedLayers, "__call__", counted)

    def run(model: RandomModel, prompts: list[list[int]], count: int, tp: int) -> Served:
        replica = local_replica(model.folder, tp=tp, max_context=model.spec.max_context, **SERVED)
        plans: list[StepPlan] = []
        schedule = replica.scheduler.schedule

        def watched(now: float) -> StepPlan | None:
            plan = schedule(now)
            plans.extend([] if plan is None else [plan])
            return plan

        replica.scheduler.schedule = watched
        calls.clear()
        params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, logprobs=3)
        answers = replica.generate([(prompt, params) for prompt in prompts])
        events = [samples[0] for samples in answers]
        assert not any(event.error for sample in events for event in sample)
        hit = any(event.cached_prompt_tokens for sample in events for event in sample)
        features = _features(plans) | ({HITS} if hit else set())
        assert len(calls) in (0, tp * len(plans))
        features |= {ONE_CALL} if calls else set()
        said = [[token for event in sample for token in event.tokens] for sample in events]
        tokens = [[token.token_id for token in sample] for sample in said]
        return Served(tokens, [[token.top for token in sample] for sample in said], features)

    return run


def _features(plans: list[StepPlan]) -> set[str]:
    """What these plans exercise."""
    found, lengths = set(), dict[int, int]()
    for plan in plans:
        lengths |= {new.seq: new.num_computed for new in plan.new}
        chunks = {row.seq: row.num_new for row in plan.rows if row.num_new > 1}
        if any(size % 2 and lengths[seq] for seq, size in chunks.items()):
            found.add(CHUNKS)
        for row in plan.rows:
            lengths[row.seq] += row.num_new
        if chunks and len(chunks) < len(plan.rows) == len({lengths[r.seq] for r in plan.rows}) > 2:
            found.add(LENGTHS)
    return found


@pytest.fixture
def difference(one_thread: None) -> Callable[..., float]:
    """`difference(model, tp, checkpoint=..., kernels=...)`: the largest of a log-probability.

    Two prompts, longer than any window, are continued greedily by `tp` ranks. Asserts that every
    token is the one that `transformers` finds most likely.
    """

    def compare(
        model: RandomModel, tp: int, checkpoint: Path | None = None, kernels: str | None = None
    ) -> float:
        folder = checkpoint or model.folder
        outputs, tops = generate(start(folder, model.spec, tp, kernels=kernels))
        largest = 0.0
        for prompt, output, top in zip(PROMPTS, outputs, tops, strict=True):
            expected = model.logprobs(prompt + output)[:-1]
            assert output == expected[len(prompt) - 1 :].argmax(-1).tolist()
            assert len(top) == len(expected)
            for row, candidates in zip(expected, top, strict=True):
                assert len(candidates) == 5
                found = (abs(float(row[item.token_id]) - item.logprob) for item in candidates)
                largest = max(largest, *found)
        return largest

    return compare


@pytest.fixture(scope="session")
def scored() -> Callable[..., list[PromptLogprobs]]:
    """`scored(checkpoint, spec, tp, tokens, dtype, kernels, kv_dtype)`: a prompt's scores, computed
    in steps of 100 tokens, in blocks from the last to the first."""

    def run(
        checkpoint: Path, spec: DecoderSpec, tp: int, tokens: list[int], *formats: Any
    ) -> list[PromptLogprobs]:
        params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=3)
        blocks = list(range(-(-len(tokens) // BLOCK_SIZE)))[::-1]
        engines = start(checkpoint, spec, tp, len(blocks), *formats)
        parts: list[PromptLogprobs] = []
        for step, first in enumerate(range(0, len(tokens), 100)):
            new = [NewSequence(0, tokens, len(tokens), 0, params)] if step == 0 else []
            own, begin = ([], 0) if step else (blocks, NO_STATE)
            row = Row(0, min(100, len(tokens) - first), own, StateUse(begin, 0))
            plan = StepPlan(0, step, [], new, [], [row])
            results = on_all_ranks(engines, lambda engine, plan=plan: engine.step(plan))
            assert not results[0].failures
            parts += results[0].prompt_logprobs
        return parts

    return run
