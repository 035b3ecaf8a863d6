"""The cut of a model's layers into pipeline stages."""

from __future__ import annotations

from itertools import combinations, pairwise
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from phalanx.protos.errors import ConfigError
from phalanx.protos.shards import (
    Span,
    Stage,
    cut_stages,
    kv_bytes_per_token,
    weight_bytes,
    weight_parameters,
)
from phalanx.protos.specs import DecoderSpec, ExpertSpec, RopeSpec

PLAIN = DecoderSpec(
    family="llama",
    num_layers=6,
    hidden_size=16,
    intermediate_size=40,
    num_heads=6,
    num_kv_heads=3,
    head_dim=4,
    vocab_size=50,
    max_context=64,
    norm_eps=1e-5,
    rope=RopeSpec(rotary_dim=4),
)


@st.composite
def models(draw: st.DrawFn) -> DecoderSpec:
    """Few to many layers, some of them far larger than others; small and huge tables."""
    num_layers = draw(st.integers(1, 9))
    fields: dict[str, Any] = {
        "num_layers": num_layers,
        "vocab_size": draw(st.sampled_from([50, 5000])),
        "tie_embeddings": draw(st.booleans()),
        "learned_positions": draw(st.booleans()),
        "embedding_norm": draw(st.booleans()),
        "attention_sinks": draw(st.booleans()),
    }
    if layers := draw(st.sets(st.integers(0, num_layers - 1))):
        fields["experts"] = ExpertSpec(
            num_experts=draw(st.integers(2, 20)),
            per_token=1,
            intermediate_size=24,
            renormalize=True,
            corrected=draw(st.booleans()),
            layers=tuple(sorted(layers)),
        )
    return msgspec.structs.replace(PLAIN, **fields)


def size(model: DecoderSpec, stage: Stage) -> int:
    return weight_parameters(model, 1, 0, stage)


@given(models(), st.data())
def test_every_layer_is_in_one_stage_and_no_stage_is_empty(
    model: DecoderSpec, data: st.DataObject
) -> None:
    count = data.draw(st.integers(1, model.num_layers))
    stages = cut_stages(model, count)
    assert [stage.index for stage in stages] == list(range(count))
    assert {stage.count for stage in stages} == {count}
    layers = [layer for stage in stages for layer in range(*stage.layers)]
    assert layers == list(range(model.num_layers))
    assert all(stage.layers.size for stage in stages)
    assert [stage.is_first for stage in stages] == [index == 0 for index in range(count)]
    assert [stage.is_last for stage in stages] == [index == count - 1 for index in range(count)]


@given(models(), st.data())
def test_no_other_cut_has_a_lighter_heaviest_stage(model: DecoderSpec, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, min(model.num_layers, 5)))
    heaviest = max(size(model, stage) for stage in cut_stages(model, count))
    for inner in combinations(range(1, model.num_layers), count - 1):
        ends = (0, *inner, model.num_layers)
        other = [
            Stage(index=index, count=count, layers=Span(*pair))
            for index, pair in enumerate(pairwise(ends))
        ]
        assert heaviest <= max(size(model, stage) for stage in other)


@given(models(), st.data(), st.integers(1, 6))
def test_stages_hold_what_the_model_holds(
    model: DecoderSpec, data: st.DataObject, tp_size: int
) -> None:
    """A tied embedding is held at both ends, once each."""
    stages = cut_stages(model, data.draw(st.integers(1, model.num_layers)))
    for rank in range(tp_size):
        for dtype in ("float32", "bfloat16"):
            whole = weight_bytes(model, tp_size, rank, dtype)
            parts = sum(weight_bytes(model, tp_size, rank, dtype, stage) for stage in stages)
            table = weight_bytes(
                msgspec.structs.replace(model, tie_embeddings=False), tp_size, rank, dtype
            ) - weight_bytes(
                msgspec.structs.replace(model, tie_embeddings=True), tp_size, rank, dtype
            )
            twice = model.tie_embeddings and len(stages) > 1
            assert parts == whole + table * twice
            assert kv_bytes_per_token(model, tp_size, rank, dtype) == sum(
                kv_bytes_per_token(model, tp_size, rank, dtype, stage) for stage in stages
            )


def test_equal_layers_are_dealt_out_evenly() -> None:
    model = msgspec.structs.replace(PLAIN, num_layers=9, vocab_size=1)
    sizes = [stage.layers.size for stage in cut_stages(model, 4)]
    assert sorted(sizes) == [2, 2, 2, 3]


def test_a_great_head_takes_the_place_of_layers() -> None:
    model = msgspec.structs.replace(PLAIN, vocab_size=450, num_layers=8)
    first, middle, last = cut_stages(model, 3)
    assert first.layers.size == last.layers.size < middle.layers.size


@pytest.mark.parametrize("count", [0, -1, 7])
def test_more_stages_than_layers_are_refused(count: int) -> None:
    with pytest.raises(ConfigError, match=f"pp_size is {count}, allowed are 1 to 6"):
        cut_stages(PLAIN, count)
