"""The memory plan: what it says fits does fit, and one block more does not."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phalanx.controller.cluster.placement import MemoryPlan, plan_memory
from phalanx.protos.errors import ConfigError
from phalanx.protos.shards import cut_model
from phalanx.protos.specs import DTYPE_BYTES, DecoderSpec, RopeSpec, StateSpec

GIB = 2**30
SMOLLM2 = DecoderSpec(
    family="llama",
    num_layers=30,
    hidden_size=576,
    intermediate_size=1536,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    vocab_size=49152,
    max_context=8192,
    norm_eps=1e-5,
    rope=RopeSpec(theta=1e5, rotary_dim=64),
    tie_embeddings=True,
)


def plan(model: DecoderSpec = SMOLLM2, **changes: Any) -> MemoryPlan:
    settings: dict[str, Any] = {
        "dtype": "bfloat16",
        "kv_dtype": "bfloat16",
        "tp_size": 1,
        "block_size": 16,
        "max_tokens_per_step": 512,
        "max_running": 64,
        "memory_per_rank": None,
        "kv_tokens": None,
    }
    return plan_memory(model, **(settings | changes))


@pytest.mark.parametrize(
    ("dtype", "layer"),
    [
        # [out, in] of qkv, output, gate and up, down
        ("fp8", 32 * (32 + 4) + 32 * (16 + 4) + 64 * (32 + 4) + 32 * (32 + 4)),
        ("int4", (28 + 30 + 60 + 30) * (64 + 2)),
    ],
)
def test_fp8_and_int4_round_layers_and_leave_the_head(dtype: str, layer: int) -> None:
    """Sizes are filled up to multiples of 16 in fp8, and inputs to groups of 128 in int4."""
    model = msgspec.structs.replace(
        SMOLLM2, num_layers=3, hidden_size=30, intermediate_size=30, num_heads=2, num_kv_heads=1,
        head_dim=7, vocab_size=50,
    )  # fmt: skip
    norms, table = 2 * 30 * (2 * 3 + 1), 2 * 50 * 30
    ranks = plan(model, dtype=dtype, kv_dtype="bfloat16", kv_tokens=64).ranks
    assert ranks[0].weights == 3 * layer + norms + table
    wide = plan(model, dtype="bfloat16", kv_dtype="bfloat16", kv_tokens=64).ranks[0]
    unpacked = 2 * 60 * 30 if dtype == "int4" else 0
    assert ranks[0].activations >= wide.activations + unpacked
    if dtype == "fp8":
        narrow = plan(model, dtype=dtype, kv_dtype="fp8", kv_tokens=64).ranks[0]
        assert 2 * narrow.kv_per_token == wide.kv_per_token


@st.composite
def models(draw: st.DrawFn) -> DecoderSpec:
    kv_heads = draw(st.integers(1, 4))
    return msgspec.structs.replace(
        SMOLLM2,
        num_layers=draw(st.integers(1, 4)),
        hidden_size=draw(st.integers(1, 300)),
        intermediate_size=draw(st.integers(1, 300)),
        num_kv_heads=kv_heads,
        num_heads=kv_heads * draw(st.integers(1, 4)),
        head_dim=2 * draw(st.integers(1, 32)),
        vocab_size=draw(st.integers(1, 2000)),
        tie_embeddings=draw(st.booleans()),
        attention_bias=draw(st.booleans()),
        output_bias=draw(st.booleans()),
        mlp_bias=draw(st.booleans()),
    )


def test_smollm2_on_one_rank() -> None:
    memory = plan(kv_tokens=8192).ranks[0]
    assert memory.weights == 134_515_008 * 2  # the parameters of SmolLM2-135M
    assert memory.kv_per_token == 2 * 30 * 3 * 64 * 2
    assert memory.kv == 8192 * memory.kv_per_token
    assert memory.rope_table == 8192 * 64 * 2
    assert memory.total == memory.weights + memory.rope_table + memory.activations + memory.kv


def test_ranks_of_an_uneven_cut_differ() -> None:
    first, second = plan(tp_size=2, kv_tokens=1600).ranks
    assert (first.kv_per_token, second.kv_per_token) == (2 * 30 * 2 * 64 * 2, 2 * 30 * 64 * 2)
    assert first.kv_tokens == second.kv_tokens == 1600
    assert first.weights > second.weights


@settings(max_examples=60, deadline=None)
@given(model=models(), data=st.data())
def test_weights_of_the_ranks_are_the_model_and_its_copies(
    model: DecoderSpec, data: st.DataObject
) -> None:
    """What is not cut (norms, output biases) is on each rank, what is replicated is counted."""
    tp_size = data.draw(st.integers(1, model.num_kv_heads))
    ranks = plan(model, tp_size=tp_size, kv_tokens=1, dtype="float32").ranks
    whole = plan(model, kv_tokens=1, dtype="float32").ranks[0]
    per_layer = 2 + model.output_bias + model.mlp_bias
    copied = 4 * model.hidden_size * (1 + per_layer * model.num_layers)
    assert sum(rank.weights for rank in ranks) == whole.weights + (tp_size - 1) * copied
    assert sum(rank.kv_per_token for rank in ranks) == whole.kv_per_token


@settings(max_examples=60, deadline=None)
@given(model=models(), data=st.data())
def test_ranks_of_equal_place_hold_together_what_one_stage_holds(
    model: DecoderSpec, data: st.DataObject
) -> None:
    """A tied embedding is held twice, by the first and by the last stage."""
    tp_size = data.draw(st.integers(1, model.num_heads))
    pp_size = data.draw(st.integers(1, model.num_layers))
    one = plan(model, tp_size=tp_size, kv_tokens=1, dtype="float32")
    staged = plan(model, tp_size=tp_size, pp_size=pp_size, kv_tokens=1, dtype="float32")
    assert staged.cache == one.cache
    for place, alone in enumerate(one.ranks):
        lane = staged.ranks[place::tp_size]
        assert len(lane) == pp_size
        assert sum(rank.kv for rank in lane) == alone.kv
        again = sum(rank.weights for rank in lane) - alone.weights
        table = cut_model(model, tp_size, place).vocab.size * model.hidden_size * 4
        assert again == table * (model.tie_embeddings and pp_size > 1)


def test_int8_halves_layers_and_cache_and_leaves_the_rest() -> None:
    wide, narrow = (
        plan(dtype=dtype, kv_dtype=dtype, kv_tokens=64) for dtype in ("bfloat16", "int8")
    )
    assert narrow.cache.dtype == "int8"
    assert narrow.ranks[0].kv_per_token == 2 * 30 * 3 * (64 + 4)
    hidden, inner, kv = 576, 1536, 192
    linear = 30 * (2 * hidden * hidden + 2 * kv * hidden + 3 * hidden * inner)
    scales = 4 * (30 * (2 * hidden + 2 * kv + 2 * inner + hidden) + 49152)
    # the table is the embedding in two bytes, and the head in one
    saved = linear - scales - 49152 * hidden
    assert wide.ranks[0].weights - narrow.ranks[0].weights == saved
    assert wide.ranks[0].rope_table == narrow.ranks[0].rope_table
    # where inputs are rounded, they and the products are wide for a while
    assert wide.ranks[0].activations <= narrow.ranks[0].activations


@settings(max_examples=100, deadline=None)
@given(
    model=models(),
    block_size=st.integers(1, 32),
    dtype=st.sampled_from(sorted(DTYPE_BYTES)),
    kv_dtype=st.sampled_from(sorted(DTYPE_BYTES)),
    data=st.data(),
)
def test_fills_the_memory_and_not_more(
    model: DecoderSpec, block_size: int, dtype: str, kv_dtype: str, data: st.DataObject
) -> None:
    tp_size = data.draw(st.integers(1, model.num_heads))
    pp_size = data.draw(st.integers(1, model.num_layers))
    changes = {"tp_size": tp_size, "block_size": block_size, "dtype": dtype, "kv_dtype": kv_dtype}
    changes["pp_size"] = pp_size
    least = plan(model, **changes, kv_tokens=1)
    assert [rank.rank for rank in least.ranks] == list(range(pp_size * tp_size))
    count = pp_size * tp_size
    spare = data.draw(st.lists(st.integers(0, 10**7), min_size=count, max_size=count))
    memory = [rank.total + extra for rank, extra in zip(least.ranks, spare, strict=True)]
    found = plan(model, **changes, memory_per_rank=memory)
    assert found.cache.num_blocks >= 1
    assert found.kv_tokens == found.cache.num_blocks * block_size
    for rank, available in zip(found.ranks, memory, strict=True):
        assert rank.kv_tokens == found.kv_tokens
        assert rank.total <= available
    assert any(
        rank.total + rank.kv_per_token * block_size > available
        for rank, available in zip(found.ranks, memory, strict=True)
    )
    asked = plan(model, **changes, memory_per_rank=memory, kv_tokens=found.kv_tokens)
    assert asked.ranks == found.ranks
    with pytest.raises(ConfigError, match="has .*; would help: "):
        plan(model, **changes, memory_per_rank=memory, kv_tokens=found.kv_tokens + 1)


@settings(max_examples=60, deadline=None)
@given(model=models(), data=st.data())
def test_more_work_never_needs_less_memory(model: DecoderSpec, data: st.DataObject) -> None:
    tp_size = data.draw(st.integers(1, model.num_heads))
    tokens, running = data.draw(st.integers(1, 4096)), data.draw(st.integers(1, 256))
    small = plan(
        model, tp_size=tp_size, kv_tokens=1, max_tokens_per_step=tokens, max_running=running
    )
    for more in ({"max_tokens_per_step": tokens + 1}, {"max_running": running + 1}):
        sizes = {"max_tokens_per_step": tokens, "max_running": running} | more
        large = plan(model, tp_size=tp_size, kv_tokens=1, **sizes)
        for before, after in zip(small.ranks, large.ranks, strict=True):
            assert after.activations >= before.activations > 0


def test_pool_is_rounded_up_to_blocks() -> None:
    found = plan(kv_tokens=33)
    assert (found.cache.num_blocks, found.kv_tokens) == (3, 48)
    assert (found.cache.block_size, found.cache.dtype) == (16, "bfloat16")


def test_refusal_names_rank_bytes_and_advice() -> None:
    with pytest.raises(ConfigError) as caught:
        plan(dtype="float32", tp_size=2, memory_per_rank=[10**9, 10**8])
    text = str(caught.value)
    needed = plan(dtype="float32", tp_size=2, kv_tokens=16).ranks[1]
    assert f"rank 1 needs {needed.total} bytes" in text and "has 100000000" in text
    assert "tp_size above 2, a pp_size above 1" in text and "2-byte dtype" in text


def test_refusal_says_how_many_tokens_fit() -> None:
    full = plan(memory_per_rank=[10**9])
    with pytest.raises(ConfigError, match="kv_tokens of at most") as caught:
        plan(memory_per_rank=[10**9], kv_tokens=10 * full.kv_tokens)
    most = int(str(caught.value).rsplit(" ", 1)[1])
    assert full.kv_tokens <= most < full.kv_tokens + 16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tp_size": 0}, "tp_size is 0, allowed are 1 to 9"),
        ({"tp_size": 10}, "tp_size is 10, allowed are 1 to 9"),
        ({"pp_size": 31}, "pp_size is 31, allowed are 1 to 30, the model's layers"),
        ({"pp_size": 3, "memory_per_rank": [10**9] * 2}, "has 2 entries, 3 ranks need as many"),
        ({"block_size": 0}, "block_size is 0"),
        ({"max_tokens_per_step": 0}, "max_tokens_per_step is 0"),
        ({"max_running": -1}, "max_running is -1"),
        ({"kv_tokens": 0}, "kv_tokens is 0"),
        ({"kv_tokens": None}, "kv_tokens is needed"),
        ({"dtype": "int3"}, "dtype is 'int3', allowed are float32"),
        ({"kv_dtype": "int4"}, "kv_dtype is 'int4'"),
        ({"memory_per_rank": [10**9] * 2}, "memory_per_rank has 2 entries"),
        ({"kv_tokens": 100, "min_kv_tokens": 8192}, "kv_tokens is 100, at least 8192"),
        ({"memory_per_rank": [10**9], "kv_tokens": None, "min_kv_tokens": 10**6}, "rank 0 needs"),
    ],
)
def test_refuses_absurd_sizes(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(**({"kv_tokens": 64} | changes))


MAMBA2 = msgspec.structs.replace(
    SMOLLM2,
    family="mamba2",
    num_layers=24,
    hidden_size=768,
    intermediate_size=0,
    num_heads=0,
    num_kv_heads=0,
    head_dim=0,
    rope=None,
    block="single",
    state=StateSpec(
        inner_size=1536, state_size=128, conv_width=4, heads=24, layers=tuple(range(24))
    ),
)


def test_states_take_the_memory_where_blocks_take_none() -> None:
    found = plan(MAMBA2, memory_per_rank=[8 * GIB], max_running=16)
    rank = found.ranks[0]
    # float32 states, and in bfloat16 what the convolution still needs of channels, b and c
    assert rank.state_slot == 24 * (4 * 1536 * 128 + 2 * 3 * (1536 + 2 * 128))
    assert found.cache.num_states == rank.state_slots == 32
    assert rank.total == rank.weights + rank.activations + 32 * rank.state_slot
    assert rank.kv == 0 and found.kv_tokens == 2**20


@settings(max_examples=60, deadline=None)
@given(memory=st.integers(GIB, 4 * GIB), tp_size=st.integers(1, 8))
def test_slots_fill_the_memory_and_not_more(memory: int, tp_size: int) -> None:
    found = plan(MAMBA2, memory_per_rank=[memory] * tp_size, tp_size=tp_size, max_running=512)
    assert all(rank.total <= memory for rank in found.ranks)
    if found.cache.num_states < 1024:
        assert any(rank.total + rank.state_slot > memory for rank in found.ranks)
    assert sum(rank.state_slot for rank in found.ranks) >= 24 * 4 * 1536 * 128


def test_slots_that_do_not_fit_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"300 states \d+.*fewer state_slots"):
        plan(MAMBA2, memory_per_rank=[2 * GIB], state_slots=300)
    with pytest.raises(ConfigError, match="state_slots is 0, at least 1"):
        plan(MAMBA2, memory_per_rank=[2 * GIB], state_slots=0)
    with pytest.raises(ConfigError, match="dtype is 'int8'"):
        plan(MAMBA2, memory_per_rank=[2 * GIB], dtype="int8")
    with pytest.raises(ConfigError, match="state_slots is 5, the model has no state spaces"):
        plan(memory_per_rank=[2 * GIB], state_slots=5)
    with pytest.raises(ConfigError, match="allowed are 1 to 24, the model's heads or channels"):
        plan(MAMBA2, memory_per_rank=[2 * GIB] * 25, tp_size=25)


def test_states_and_blocks_share_the_memory() -> None:
    """Half of the layers have states: their slots come first, blocks take what is left."""
    state = StateSpec(
        inner_size=1152, state_size=64, conv_width=4, heads=9, layers=tuple(range(0, 30, 2))
    )
    found = plan(
        msgspec.structs.replace(SMOLLM2, state=state), memory_per_rank=[2 * GIB], max_running=8
    )
    (rank,) = found.ranks
    assert rank.state_slots == 16 and rank.kv_per_token == 15 * 2 * 3 * 64 * 2
    assert 2 * GIB - rank.kv_per_token * 16 < rank.total <= 2 * GIB
