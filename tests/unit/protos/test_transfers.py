"""Which ranks hold what another rank needs of a block."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phalanx.protos.errors import TransferFailed
from phalanx.protos.shards import cut_heads, cut_stages
from phalanx.protos.specs import DecoderSpec, RopeSpec, StateSpec
from phalanx.protos.transfers import pieces_for


def model_of(layers: int, kv_heads: int, group: int, state: StateSpec | None = None) -> DecoderSpec:
    return DecoderSpec(
        family="llama",
        num_layers=layers,
        hidden_size=16,
        intermediate_size=40,
        num_heads=kv_heads * group,
        num_kv_heads=kv_heads,
        head_dim=4,
        vocab_size=50,
        max_context=64,
        norm_eps=1e-5,
        rope=RopeSpec(rotary_dim=4),
        state=state,
    )


@given(st.data(), st.integers(1, 5), st.integers(1, 6), st.integers(1, 4))
def test_pieces_are_all_that_a_rank_keeps_each_once(
    data: st.DataObject, layers: int, kv_heads: int, group: int
) -> None:
    """By brute force over every (layer, head) of a block; ranks may outnumber the heads."""
    model = model_of(layers, kv_heads, group)
    ranks = st.integers(1, kv_heads * group)
    (tp, pp), source = (
        (data.draw(ranks), data.draw(st.integers(1, layers))) for _ in ("target", "source")
    )
    for rank in range(tp * pp):
        held = cut_heads(model.num_heads, kv_heads, tp, rank % tp).kv
        stage = cut_stages(model, pp)[rank // tp]
        needed = Counter((layer, head) for layer in range(*stage.layers) for head in range(*held))
        found = Counter[tuple[int, int]]()
        for piece in pieces_for(model, (tp, pp, rank), source):
            place, theirs = piece.rank % source[0], piece.rank // source[0]
            has = cut_heads(model.num_heads, kv_heads, source[0], place).kv
            where = cut_stages(model, source[1])[theirs].layers
            assert has.start <= piece.heads.start < piece.heads.stop <= has.stop
            assert where.start <= piece.layers.start < piece.layers.stop <= where.stop
            found.update((la, head) for la in range(*piece.layers) for head in range(*piece.heads))
        assert found == needed


def test_ranks_of_one_head_are_asked_in_turn() -> None:
    model = model_of(1, 1, 4)
    asked = [pieces_for(model, (4, 1, rank), (4, 1))[0].rank for rank in range(4)]
    assert asked == [0, 1, 2, 3]


def test_states_are_not_moved() -> None:
    state = StateSpec(inner_size=8, state_size=2, conv_width=2, step_rank=1, layers=(0,))
    with pytest.raises(TransferFailed):
        pieces_for(model_of(2, 1, 1, state), (1, 1, 0), (1, 1))
