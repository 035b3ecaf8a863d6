"""What is measured, and compared with the reference in float64: kernels at a model's shapes.

A case counts the fewest bytes that its kernel must move and the operations that it must do; which
of the two takes the device longer is the floor of its time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from phalanx.kernels.interface import (
    AttentionSpec,
    CapturableBackend,
    KernelBackend,
    SamplingBackend,
    SequenceSpan,
)
from phalanx.kernels.reference import ReferenceBackend

Inputs = dict[str, Tensor]
Call = Callable[[], Any]
BLOCK_SIZE = 16


class Shape(NamedTuple):
    """Sizes of a decoder."""

    hidden: int
    inner: int
    heads: int
    kv_heads: int
    dim: int
    vocab: int

    @property
    def qkv(self) -> int:
        """Columns of the fused projection."""
        return (self.heads + 2 * self.kv_heads) * self.dim


SHAPES = {
    "smollm2-135m": Shape(576, 1536, 9, 3, 64, 49152),
    "llama-3.1-8b": Shape(4096, 14336, 32, 8, 128, 128256),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One kernel at one shape. `inputs` draws its tensors, the same ones for a seed;
    `call` makes what is timed, and may prepare."""

    kernel: str
    size: str
    inputs: Callable[[torch.device, torch.dtype, int], Inputs]
    call: Callable[[Any, Inputs], Call]
    elements: int
    """Read or written, of the working dtype."""
    flops: int = 0
    extra_bytes: int = 0
    """Read or written in other dtypes."""
    narrow: int = 0
    """Bytes of weights that take the place of `elements` of the working dtype."""
    exact: bool = True
    """The result is that of the reference, but for rounding."""

    def bytes(self, element_size: int) -> int:
        """The fewest bytes that are moved."""
        return self.elements * element_size + self.extra_bytes + self.narrow


def _drawn(**shapes: tuple[int, ...]) -> Callable[[torch.device, torch.dtype, int], Inputs]:
    """Normal numbers in tensors of these shapes; matrices of weights are scaled to keep them."""

    def make(device: torch.device, dtype: torch.dtype, seed: int) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)
        drawn = {}
        for name, shape in shapes.items():
            tensor = torch.randn(shape, generator=generator, device=device, dtype=torch.float32)
            if name == "matrix":
                tensor *= shape[1] ** -0.5
            drawn[name] = tensor.to(dtype)
        return drawn

    return make


def _rows(shape: Shape, tokens: int) -> Iterator[Case]:
    """Norms, rotation, gates: one pass over the hidden states."""
    hidden, inner, heads = shape.hidden, shape.inner, shape.heads + shape.kv_heads
    at = f"{tokens} tokens"
    yield Case(
        kernel="rms_norm",
        size=at,
        inputs=_drawn(x=(tokens, hidden), weight=(hidden,)),
        call=lambda backend, i: lambda: backend.rms_norm(i["x"], i["weight"], 1e-5),
        elements=2 * tokens * hidden + hidden,
    )
    yield Case(
        kernel="add_rms_norm",
        size=at,
        inputs=_drawn(x=(tokens, hidden), residual=(tokens, hidden), weight=(hidden,)),
        call=lambda backend, i: (
            lambda: backend.add_rms_norm(i["x"], i["residual"], i["weight"], 1e-5)
        ),
        elements=4 * tokens * hidden + hidden,
    )
    yield Case(
        kernel="rope",
        size=at,
        inputs=_drawn(
            heads=(tokens, heads, shape.dim),
            cos=(tokens, shape.dim // 2),
            sin=(tokens, shape.dim // 2),
        ),
        call=lambda backend, i: lambda: backend.rope(i["heads"], i["cos"], i["sin"]),
        elements=2 * tokens * heads * shape.dim + tokens * shape.dim,
    )
    yield Case(
        kernel="silu_mul",
        size=at,
        inputs=_drawn(x=(tokens, 2 * inner)),
        call=lambda backend, i: lambda: backend.silu_mul(i["x"]),
        elements=3 * tokens * inner,
    )


def _rounded(shape: Shape, tokens: int) -> Iterator[Case]:
    """Norms and gates that give float8."""
    hidden, inner = shape.hidden, shape.inner
    yield Case(
        kernel="add_rms_norm fp8",
        size=f"{tokens} tokens",
        inputs=_drawn(x=(tokens, hidden), residual=(tokens, hidden), weight=(hidden,)),
        call=lambda backend, i: (
            lambda: backend.add_rms_norm_quantize(i["x"], i["residual"], i["weight"], 1e-5)
        ),
        elements=3 * tokens * hidden + hidden,
        extra_bytes=tokens * (hidden + 4),
        exact=False,
    )
    yield Case(
        kernel="silu_mul fp8",
        size=f"{tokens} tokens",
        inputs=_drawn(x=(tokens, 2 * inner)),
        call=lambda backend, i: lambda: backend.gated_quantize(i["x"], "silu"),
        elements=2 * tokens * inner,
        extra_bytes=tokens * (inner + 4),
        exact=False,
    )


def _linear(name: str, out: int, into: int, tokens: int, kind: str = "") -> Case:
    """x @ W.T; of `kind` "int8" and so on where weights are narrower."""

    def call(backend: Any, i: Inputs) -> Call:
        pack = getattr(backend, f"pack_linear_{kind}") if kind else backend.pack_linear
        linear = pack(i["matrix"], None)
        return lambda: linear(i["x"])

    weights = out * into
    return Case(
        kernel=f"linear {name}" + (f" {kind}" if kind else ""),
        size=f"{tokens} x {into} -> {out}",
        inputs=_drawn(matrix=(out, into), x=(tokens, into)),
        call=call,
        elements=tokens * (out + into) + (0 if kind else weights),
        narrow={"": 0, "int4": weights // 2}.get(kind, weights),
        flops=2 * tokens * weights,
        exact=not kind,
    )


def _attention(
    shape: Shape, kernel: str, queries: list[int], lengths: list[int], **rule: Any
) -> Case:
    """Sequences whose last `queries` tokens attend to all their `lengths`."""
    blocks = [-(-length // BLOCK_SIZE) for length in lengths]
    tokens, total = sum(queries), sum(blocks)
    pool = (shape.kv_heads, total, BLOCK_SIZE, shape.dim)
    spec = AttentionSpec(scale=shape.dim**-0.5, **rule)

    def spans() -> list[SequenceSpan]:
        order = torch.randperm(total, generator=torch.Generator().manual_seed(7)).tolist()
        made, start, used = [], 0, 0
        for count, length, need in zip(queries, lengths, blocks, strict=True):
            made.append(SequenceSpan(start, count, length, order[used : used + need]))
            start, used = start + count, used + need
        return made

    def call(backend: KernelBackend, i: Inputs) -> Call:
        plan = backend.plan_attention(spans(), BLOCK_SIZE)
        device = i["query"].device
        decodes = tokens == len(queries) and device.type != "cpu"
        if decodes and isinstance(backend, CapturableBackend):
            plan = _decode_plan(backend, spans(), device)
        return lambda: backend.paged_attention(i["query"], i["keys"], i["values"], plan, spec)

    pairs = seen = 0
    for count, length in zip(queries, lengths, strict=True):
        pairs += count * (length - count) + count * (count + 1) // 2
        seen += min(length, spec.window + count) if spec.window else length
    return Case(
        kernel=kernel,
        size=f"{len(lengths)} x {max(queries)} of {max(lengths)}",
        inputs=_drawn(query=(tokens, shape.heads, shape.dim), keys=pool, values=pool),
        call=call,
        elements=2 * seen * shape.kv_heads * shape.dim + 2 * tokens * shape.heads * shape.dim,
        flops=4 * pairs * shape.heads * shape.dim,
    )


def _decode_plan(
    backend: CapturableBackend, spans: list[SequenceSpan], device: torch.device
) -> Any:
    width = max(len(span.blocks) for span in spans)
    tables = torch.zeros(len(spans), width, dtype=torch.int32)
    for row, span in enumerate(spans):
        tables[row, : len(span.blocks)] = torch.tensor(span.blocks)
    lengths = torch.tensor([span.length for span in spans])
    return backend.plan_decode(tables.to(device), lengths.to(device), BLOCK_SIZE)


def _store(shape: Shape, tokens: int) -> Case:
    """Keys and values into the pools, one slot each."""
    pool = (shape.kv_heads, -(-tokens // BLOCK_SIZE), BLOCK_SIZE, shape.dim)
    row = (tokens, shape.kv_heads, shape.dim)

    def call(backend: KernelBackend, i: Inputs) -> Call:
        slots = torch.arange(tokens, device=i["key"].device)

        def run() -> tuple[Tensor, Tensor]:
            backend.store_kv(i["key"], i["value"], i["key_pool"], i["value_pool"], slots)
            return i["key_pool"], i["value_pool"]

        return run

    return Case(
        kernel="store_kv",
        size=f"{tokens} tokens",
        inputs=_drawn(key=row, value=row, key_pool=pool, value_pool=pool),
        call=call,
        elements=4 * tokens * shape.kv_heads * shape.dim,
        extra_bytes=8 * tokens,
    )


def _sample(shape: Shape, rows: int) -> Case:
    def call(backend: SamplingBackend, i: Inputs) -> Call:
        device = i["logits"].device
        warmth = torch.full((rows,), 0.7, dtype=torch.float64, device=device)
        keys = torch.arange(rows, device=device)
        return lambda: backend.sample(i["logits"], warmth, keys, keys, 0)

    return Case(
        kernel="sample",
        size=f"{rows} x {shape.vocab}",
        inputs=_drawn(logits=(rows, shape.vocab)),
        call=call,
        elements=rows * shape.vocab,
        exact=False,
    )


def cases(shape: Shape, backend: KernelBackend, *, tokens: int, context: int) -> Iterator[Case]:
    """All that `backend` offers. tokens: of a prefill; context: of a decoding sequence."""
    for count in (1, tokens):
        yield from _rows(shape, count)
        yield _store(shape, count)
        if own(backend, "gated_quantize"):
            yield from _rounded(shape, count)
    kinds = [kind for kind in ("int8", "fp8", "int4") if own(backend, f"pack_linear_{kind}")]
    for count in (1, 16, 64, tokens):
        yield _linear("qkv", shape.qkv, shape.hidden, count)
        yield _linear("output", shape.hidden, shape.heads * shape.dim, count)
        for kind in ("", *kinds):
            yield _linear("gate_up", 2 * shape.inner, shape.hidden, count, kind)
        yield _linear("down", shape.hidden, shape.inner, count)
    yield _linear("head", shape.vocab, shape.hidden, 1)
    for batch in (1, 8, 64):
        yield _attention(shape, "attention decode", [1] * batch, [context] * batch)
    yield _attention(shape, "attention prefill", [tokens], [tokens])
    if isinstance(backend, SamplingBackend):
        yield _sample(shape, 1)
        yield _sample(shape, 64)


def own(backend: KernelBackend, name: str) -> bool:
    """Whether a backend has this itself, and not only by the specification."""
    found = getattr(type(backend), name, None)
    return found is not None and found is not getattr(ReferenceBackend, name, None)


def odd_cases(shape: Shape, device: torch.device) -> Iterator[Case]:
    """Shapes and rules that are not measured, only compared: mixed lengths, windows, caps."""
    slopes = 2.0 ** -torch.arange(1, shape.heads + 1, device=device).float()
    rules: dict[str, dict[str, Any]] = {
        "plain": {},
        "window": {"window": 19},
        "softcap": {"softcap": 15.0},
        "alibi": {"alibi_slopes": slopes},
        "sinks": {"sinks": slopes},
    }
    for name, rule in rules.items():
        yield _attention(shape, f"decode, {name}", [1] * 5, [1, 16, 17, 130, 77], **rule)
        yield _attention(shape, f"mixed, {name}", [1, 33, 5, 1, 64], [40, 33, 70, 1, 100], **rule)
    for count in (2, 3, 5, 17, 33):
        yield from _rows(shape, count)
        yield _linear("odd", shape.hidden + 8, shape.hidden, count)
