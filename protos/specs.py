"""What a group of ranks is told at birth: the model's shape, the cut, the cache."""

from __future__ import annotations

from typing import Literal

import msgspec

DType = Literal["float32", "bfloat16", "float16", "int8", "fp8", "int4"]
DTYPE_BYTES: dict[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "fp8": 1}
"""Of an element, where elements have bytes of their own: a KV cache takes any of these."""
ROUNDED_DTYPES = ("int8", "fp8", "int4")
"""Formats of the weights of linear layers alone."""
HOMES = {"int8": "cpu", "fp8": "cuda", "int4": "cuda"}
"""Formats that only one kind of device has."""
SCALE_BYTES = 4
"""Of the float32 number that a row of int8 or float8 is multiplied by."""
INT8_MOST_INPUTS = 2**16 - 1
"""Of an int8 product, which is summed in 32 bits; what has more stays bfloat16."""


FLOAT8_UNIT = 16
"""Both sizes of a float8 matrix are padded to a multiple of it."""
INT4_GROUP = 128
"""Inputs of an output that share a scale in int4; a matrix is padded to whole groups."""


def activation_dtype(dtype: DType) -> DType:
    """Of all that is not the weight of a linear layer: rounded models are otherwise bfloat16."""
    return "bfloat16" if dtype in ROUNDED_DTYPES else dtype


def foreign_formats(dtype: str, kv_dtype: str, device: str) -> list[str]:
    """What is wrong with number formats on this kind of device, which may not be known yet."""
    kinds = {"cpu": "CPUs", "cuda": "GPUs"}
    return [
        f"{name} is {value!r}, which {kinds[device]} do not have here: "
        f"allowed with device {HOMES[value]}"
        for name, value in (("dtype", dtype), ("kv_dtype", kv_dtype))
        if device in kinds and HOMES.get(value, device) != device
    ]


def linear_bytes(dtype: str, outputs: int, inputs: int) -> int:
    """Bytes of a linear layer's weight in a model of a rounded dtype, scales included."""
    wide = DTYPE_BYTES["bfloat16"]
    if dtype == "int8":
        if inputs > INT8_MOST_INPUTS:
            return wide * outputs * inputs
        return outputs * (inputs + SCALE_BYTES)
    if dtype == "fp8":
        outputs, inputs = (-(-n // FLOAT8_UNIT) * FLOAT8_UNIT for n in (outputs, inputs))
        return outputs * (inputs + SCALE_BYTES)
    groups = -(-inputs // INT4_GROUP)
    return outputs * groups * (INT4_GROUP // 2 + wide)


Scaling = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"]


class RopeSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Rotary positions. `scaling` names the rule; its numbers follow Hugging Face's config."""

    theta: float = 10000.0
    rotary_dim: int
    """Leading elements of a head that are rotated; the others pass through."""
    scaling: Scaling = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    """Multiplies cos and sin."""
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()


class ExpertSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A mixture of gated experts in place of the feed-forward block of `layers`."""

    num_experts: int
    per_token: int
    """Experts that each token goes through."""
    intermediate_size: int
    """Columns of one expert; every rank holds its part of every expert."""
    renormalize: bool
    """The chosen experts' weights are scaled to a sum of 1."""
    shared_size: int = 0
    """Columns of one more expert that every token goes through."""
    shared_gated: bool = True
    """The shared expert is weighted by a gate of its own."""
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    corrected: bool = False
    """A stored number for each expert is added to its score for the choice, not to its weight."""
    groups: int = 1
    """Experts stand in so many groups of equal size, of which a token chooses among
    `groups_per_token`, those with the greatest sums of their `group_best` best scores."""
    groups_per_token: int = 1
    group_best: int = 1
    scale: float = 1.0
    """Of the chosen experts' weights, after they are renormalized."""
    biased: bool = False
    """The router and the experts' projections have biases."""
    limit: float = 0.0
    """Gates are clamped to at most this, what they are multiplied by to [-limit, limit] and then
    raised by 1 (gpt-oss); 0 = neither."""
    layers: tuple[int, ...]


class LatentSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Multi-head latent attention (DeepSeek-AI 2024, section 2.1): keys and values of all heads
    are made from one small vector a token. A head's rotated elements, `RopeSpec.rotary_dim`, come
    first; a key's are the same in all heads."""

    query_rank: int = 0
    """Size of the vector that queries are made from; 0 = from the hidden states."""
    kv_rank: int
    value_dim: int
    """Elements of a value head, at most `head_dim`; the pool holds zeros behind them."""


class StateSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A selective state space in place of attention in `layers`.

    From the hidden states come channels x, gates z, steps d and the vectors b, c of `state_size`.
    x goes through a short convolution and SiLU, as do b and c where `heads`. With h the state,

        h = exp(d a) h + d x b^T;   y = h c + skip x;   y silu(z), projected, is the output

    With `heads` = 0 (Mamba, Gu 2023) every channel has its own d and vector a, and d, b, c come
    from x. Else (Mamba-2, Dao 2024) channels stand in heads with one d and number a each, and
    y silu(z) is normed within each of `groups`.
    """

    inner_size: int
    """Channels."""
    state_size: int
    """Numbers that each channel carries on."""
    conv_width: int
    """Tokens that the convolution sees, the current one included."""
    conv_bias: bool = True
    bias: bool = False
    """On the projections into the channels and out of them."""
    step_rank: int = 0
    """Size of the vector that the steps of all channels are made from; 0 with heads."""
    heads: int = 0
    groups: int = 1
    """Sets of heads that share b and c."""
    min_step: float = 0.0
    max_step: float | None = None
    """Steps are clamped to this range."""
    inner_eps: float | None = None
    """Of the RMS norm, without a weight, of b, c and what steps are made from; None = no norm."""
    layers: tuple[int, ...]

    @property
    def units(self) -> int:
        """What is dealt out to ranks: heads, or channels."""
        return self.heads or self.inner_size

    @property
    def unit_size(self) -> int:
        """Channels of a unit."""
        return self.inner_size // self.units


Activation = Literal["silu", "gelu", "gelu_tanh", "gelu_quick", "relu", "relu2"]
Block = Literal["pre", "sandwich", "post", "parallel", "parallel_two", "single"]
QKNorm = Literal["none", "head", "each", "width"]


class DecoderSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A decoder-only transformer as data: everything that the one decoder needs to know.

    `block` is how a layer adds to the hidden states h, with norms n, p and blocks a, m:

        pre           h += a(n1(h));      h += m(n2(h))
        sandwich      h += p1(a(n1(h)));  h += p2(m(n2(h)))
        post          h += p1(a(h));      h += p2(m(h))
        parallel      h += a(n1(h)) + m(n1(h))
        parallel_two  h += a(n1(h)) + m(n2(h))
        single        h += a(n1(h))

    In the layers of `state`, a is a state space. Heads and `intermediate_size` are 0 in a model
    without attention and feed-forward blocks.
    """

    family: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_context: int
    """Positions the model was made for (tokens)."""
    norm_eps: float
    rope: RopeSpec | None = None
    local_rope: RopeSpec | None = None
    """Rotation of the layers that have a window, where it differs."""
    unrotated: tuple[int, ...] = ()
    """Layers that do not rotate."""
    activation: Activation = "silu"
    tie_embeddings: bool = False
    attention_bias: bool = False
    """Bias on the query, key and value projections."""
    output_bias: bool = False
    """Bias on the attention output projection."""
    mlp_bias: bool = False
    head_bias: bool = False
    block: Block = "pre"
    norm: Literal["rms", "layer"] = "rms"
    norm_affine: bool = True
    """Norms have a weight."""
    norm_bias: bool = False
    norm_offset: float = 0.0
    """Added to every norm weight (Gemma stores weight - 1)."""
    qk_norm: QKNorm = "none"
    """Norm of queries and keys before rotation, without bias: one weight [head_dim] for all heads,
    a weight for each head, or one norm over all heads of the projection together."""
    learned_positions: bool = False
    """A table of `max_context` + `position_offset` rows, added to the embedding."""
    position_offset: int = 0
    alibi_slopes: tuple[float, ...] = ()
    """One for each query head (Press 2022); empty = none."""
    windows: tuple[int, ...] = ()
    """Tokens that each layer sees, the querying one included; 0 = all. Empty = all, everywhere."""
    attention_scale: float | None = None
    """Factor of the scores; None = head_dim ** -0.5."""
    attention_softcap: float = 0.0
    """Scores s become cap * tanh(s / cap); 0 = not."""
    attention_sinks: bool = False
    """Each query head has one more score, learned, whose weight goes nowhere (Xiao 2023)."""
    qkv_clip: float = 0.0
    """Queries, keys and values are clamped to [-clip, clip]; 0 = not."""
    gated_mlp: bool = True
    """down(act(gate(x)) * up(x)), else down(act(up(x)))."""
    experts: ExpertSpec | None = None
    latent: LatentSpec | None = None
    state: StateSpec | None = None
    embedding_scale: float = 1.0
    embedding_norm: bool = False
    residual_scale: float = 1.0
    """Of all that is added to h."""
    logit_scale: float = 1.0
    final_softcap: float = 0.0

    def window(self, layer: int) -> int:
        """Tokens that layer `layer` sees, 0 = all."""
        return self.windows[layer] if self.windows else 0

    @property
    def longest_context(self) -> int:
        """Most positions that can be served. Dynamic NTK scaling reaches beyond those that the
        model was made for, by its factor."""
        if self.rope is None or self.rope.scaling != "dynamic":
            return self.max_context
        return max(int(self.rope.original_max_position * self.rope.factor), self.max_context)

    @property
    def rotary_dim(self) -> int:
        """Leading elements of a head that are rotated."""
        return self.rope.rotary_dim if self.rope else 0

    def rope_of(self, layer: int) -> RopeSpec | None:
        """The rotation of layer `layer`."""
        if layer in self.unrotated:
            return None
        local = self.local_rope is not None and self.window(layer) > 0
        return self.local_rope if local else self.rope

    def has_state(self, layer: int) -> bool:
        """Whether layer `layer` has a state space in place of attention."""
        return self.state is not None and layer in self.state.layers

    @property
    def attention_layers(self) -> int:
        """Layers that keep keys and values."""
        return self.num_layers - (len(self.state.layers) if self.state else 0)

    @property
    def max_ranks(self) -> int:
        """Ranks that each have a part of every layer."""
        heads = [self.num_heads] if self.attention_layers else []
        return min([*heads, *([self.state.units] if self.state else [])])

    def has_experts(self, layer: int) -> bool:
        """Whether layer `layer` has experts in place of the dense feed-forward block."""
        return self.experts is not None and layer in self.experts.layers


class CacheSpec(msgspec.Struct, frozen=True, kw_only=True):
    """The paged KV pool, the same number of blocks on every rank."""

    block_size: int
    """Tokens a block."""
    num_blocks: int
    dtype: DType
    """In int8, every key and value of a head has a float32 scale behind it."""
    num_states: int = 0
    """Slots that each hold the states of one sequence or prefix, in all layers that have them."""


class TierSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Where blocks go that the pool has no room for. Numbers are equal on every rank."""

    host_slots: int
    """Blocks that host memory holds."""
    disk_slots: int = 0
    """Files that the disk holds, a block each; 0 = no disk."""
    disk_folder: str = ""
    """Of the replica, on each rank's own machine; ranks have folders of their own in it."""


class WeightCacheSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Where a rank keeps weights as it packed them."""

    folder: str
    """On each rank's own machine; empty: its user's own, for weights that take long to pack."""
    most_bytes: int
    """Of all files in it together."""


class WorkerSpec(msgspec.Struct, frozen=True, kw_only=True):
    """All that one group of ranks needs to build its shard. Equal on every rank."""

    checkpoint: str
    """Folder or .gguf file, readable at this path on every node."""
    model: DecoderSpec
    dtype: DType
    """Of weights and activations; see `activation_dtype`."""
    tp_size: int
    pp_size: int = 1
    """Pipeline stages, each of `tp_size` ranks that follow one another."""
    cache: CacheSpec
    max_tokens_per_step: int
    max_running: int
    eos_token_ids: tuple[int, ...]
    device: Literal["cpu", "cuda"]
    record_steps: bool = True
    """On a GPU, decode steps are recorded when the rank starts, and replayed."""
    epoch: int = 0
    tiers: TierSpec | None = None
    """Below the KV pool; None = no tiers."""
    weight_cache: WeightCacheSpec | None = None
    """None = weights are packed anew at every start."""
    tokenizer: str = ""
    """The tokenizer as `tokenizers` writes it, JSON, for grammars; empty where none is needed."""
    trace_endpoint: str = ""
    """OTLP collector for the steps that plans ask to be told of; empty: none."""

    @property
    def num_ranks(self) -> int:
        """Ranks of the group; rank s * tp_size + t is place t of stage s."""
        return self.pp_size * self.tp_size

    @property
    def answering_rank(self) -> int:
        """The rank that answers plans: the first one of the last stage."""
        return self.num_ranks - self.tp_size


class LoadReport(msgspec.Struct, frozen=True, kw_only=True, array_like=True, tag="ready"):
    """A rank's account of what it loaded. Sizes in bytes."""

    rank: int
    weight_bytes: int
    kv_bytes: int
    tensors_used: int
    tensors_ignored: list[str]
    kernels: str
    state_bytes: int = 0
    exchange: tuple[str, int] | None = None
    """Where the rank hands out KV blocks to other replicas' ranks."""
    disk_slots: int = 0
    """Of the disk tier as far as this rank can use it."""
    disk_digests: bytes = b""
    """Of the blocks found on disk, one after the other, the least recently written first."""
    disk_refused: int = 0
    """Files found there that are damaged or of something else."""
