"""Any cut of any layout is what indexing the whole tensor gives, read in pieces of any size."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phalanx.protos.errors import ModelError
from phalanx.protos.shards import Span
from phalanx.workers.checkpoint.slices import Array, TensorSlice, rectangle
from phalanx.workers.loading import assign
from phalanx.workers.loading.pieces import Piece
from phalanx.workers.models.layout import Layout, grouped_heads, side_by_side, unpermute_heads


class Memory:
    """A checkpoint that remembers how much of it was read."""

    kind, path, description = "safetensors", Path("memory"), None

    def __init__(self, **tensors: Array) -> None:
        self._tensors = tensors
        self.elements = 0

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def dtype(self, name: str) -> str:
        return "float32"

    def read(
        self,
        name: str,
        rows: slice | None = None,
        columns: slice | None = None,
        entry: int | None = None,
    ) -> TensorSlice:
        whole = self._tensors[name]
        part = rectangle(whole if entry is None else whole[entry], rows, columns)
        self.elements += part.size
        return TensorSlice(part, "float32")


class OneStage:
    """A model of one stage."""

    def __init__(self, *pieces: Piece) -> None:
        self.stages = [list(pieces)]

    def open(self, stage: int) -> list[Piece]:
        return self.stages[stage]

    def pack(self, stage: int) -> None:
        pass


def numbered(*shape: int) -> Array:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


class Case(NamedTuple):
    """Part of a projection of `total` rows in a tensor of `stored` rows."""

    layout: Layout
    total: int
    stored: int
    unit: int


@st.composite
def cases(draw: st.DrawFn) -> Case:
    dim = draw(st.sampled_from([2, 4, 6]))
    groups, queries = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    role = draw(st.sampled_from(["query", "key", "value"]))
    if draw(st.booleans()):
        layout = grouped_heads(queries, dim)[role]
        total = groups * dim * (queries if role == "query" else 1)
        return Case(layout, total, groups * (queries + 2) * dim, dim)
    sizes = {"query": groups * queries * dim, "key": groups * dim, "value": groups * dim}
    layout = side_by_side(sizes, transposed=draw(st.booleans()))[role]
    return Case(layout, sizes[role], sum(sizes.values()), dim)


@settings(max_examples=150, deadline=None)
@given(cases(), st.data(), st.integers(1, 7), st.integers(1, 200), st.booleans())
def test_a_cut_is_what_indexing_gives(
    case: Case, data: st.DataObject, width: int, chunk: int, permuted: bool
) -> None:
    heads = case.total // case.unit
    first = data.draw(st.integers(0, heads - 1))
    last = data.draw(st.integers(first, heads))
    rows = Span(first * case.unit, last * case.unit)
    left = data.draw(st.integers(0, width - 1))
    columns = Span(left, data.draw(st.integers(left + 1, width)))
    rotary = data.draw(st.integers(1, case.unit // 2)) * 2

    whole = numbered(case.stored, width)
    run, stride = case.layout.run or case.total, case.layout.stride
    index = [case.layout.offset + r // run * stride + r % run for r in range(*rows)]
    expected = whole[index, slice(*columns)]
    if permuted:
        expected = unpermute_heads(expected, case.unit, rotary)

    stored = np.ascontiguousarray(whole.T) if case.layout.transposed else whole
    target = torch.full((rows.size, columns.size), -1.0)
    bias = torch.full((rows.size,), -1.0)
    checkpoint = Memory(weight=stored, bias=whole[:, 0])
    about = {"head_dim": case.unit, "rotary_dim": rotary, "layout": case.layout}
    model = OneStage(
        Piece("weight", target, rows, columns, **about), Piece("bias", bias, rows, **about)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assign, "CHUNK_ELEMENTS", chunk)
        assert assign.fill(model, checkpoint, permuted_heads=permuted) == []
    np.testing.assert_array_equal(target.numpy(), expected)
    first_column = whole[index, 0]
    if permuted:
        first_column = unpermute_heads(first_column, case.unit, rotary)
    np.testing.assert_array_equal(bias.numpy(), first_column)
    assert checkpoint.elements == target.numel() + bias.numel()  # and not one more


def test_only_the_rotated_part_of_a_head_is_reordered() -> None:
    rows = np.arange(12)  # two heads of six
    assert unpermute_heads(rows, 6, 4).tolist() == [0, 2, 1, 3, 4, 5, 6, 8, 7, 9, 10, 11]
    assert unpermute_heads(rows, 6, 2).tolist() == rows.tolist()


def test_heads_may_be_rows() -> None:
    whole = numbered(5, 6)
    target = torch.empty(2, 6)
    piece = Piece(
        "t", target, Span(1, 3), head_dim=6, rotary_dim=4, layout=Layout(heads_as_rows=True)
    )
    assign.fill(OneStage(piece), Memory(t=whole), permuted_heads=True)
    assert target.tolist() == whole[1:3][:, [0, 2, 1, 3, 4, 5]].tolist()


@pytest.mark.parametrize("chunk", [1, 5, 200])
@pytest.mark.parametrize("offset", [0, 1])
def test_every_other_column_of_one_tensor_of_a_stack(
    monkeypatch: pytest.MonkeyPatch, chunk: int, offset: int
) -> None:
    monkeypatch.setattr(assign, "CHUNK_ELEMENTS", chunk)
    stack, biases = numbered(3, 4, 10), numbered(3, 10)
    layout = Layout(offset=offset, run=1, stride=2, transposed=True, entry=2)
    weight, bias = torch.empty(3, 4), torch.empty(3)
    model = OneStage(
        Piece("w", weight, Span(2, 5), layout=layout), Piece("b", bias, Span(2, 5), layout=layout)
    )
    assert assign.fill(model, Memory(w=stack, b=biases), permuted_heads=False) == []
    np.testing.assert_array_equal(weight.numpy(), stack[2, :, 4 + offset :: 2].T)
    np.testing.assert_array_equal(bias.numpy(), biases[2, 4 + offset :: 2])


def test_a_shift_is_added_before_rounding() -> None:
    target = torch.empty(3, dtype=torch.bfloat16)
    stored = np.array([1.0009765625, 2.0, 0.5], np.float32)
    piece = Piece("t", target, layout=Layout(shift=-1.0))
    assign.fill(OneStage(piece), Memory(t=stored), permuted_heads=False)
    assert target.tolist() == [0.0009765625, 1.0, -0.5]


@pytest.mark.parametrize(
    ("shape", "rows", "columns", "layout"),
    [
        ((8, 4), Span(0, 2), None, Layout(offset=7)),
        ((8, 4), Span(2, 4), None, Layout(run=2, stride=8)),
        ((4, 8), Span(0, 2), None, Layout(offset=7, transposed=True)),
        ((8, 4), Span(0, 2), Span(2, 6), Layout()),
        ((8, 5), Span(0, 2), None, Layout()),
        ((3, 4), None, None, Layout()),
        ((8,), Span(0, 2), None, Layout()),
        ((2, 4), None, None, Layout(entry=0)),
        ((5, 3, 4), None, None, Layout(entry=0)),
    ],
)
def test_a_tensor_that_does_not_hold_the_cut_is_refused(
    shape: tuple[int, ...], rows: Span | None, columns: Span | None, layout: Layout
) -> None:
    piece = Piece("t", torch.empty(2, 4), rows, columns, layout=layout)
    with pytest.raises(ModelError, match="tensor 't' has shape"):
        assign.fill(OneStage(piece), Memory(t=numbered(*shape)), permuted_heads=False)
