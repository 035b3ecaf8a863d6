"""The compiled kernels: finding the library, and its C interface as ctypes sees it."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_char_p, c_double, c_float, c_int, c_int32, c_int64, c_uint64, c_void_p
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch

TYPES = {torch.float32: 0, torch.bfloat16: 1}
"""What the library calls the dtypes of activations that it knows."""
INT8 = 2
POOL_TYPES = TYPES | {torch.int8: INT8}
"""And those of KV pools."""
COMPACT = 5
"""What weights of bfloat16 become that are kept in 12 bits (native/compact.h)."""
PANELS, BYTE_PANELS = 3, 4
"""What it calls pools in panels: of bfloat16 (native/panels.inl), of int8 (byte_panels.inl)."""


ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "gelu_quick": 3, "relu": 4, "relu2": 5}
"""`Activation` of native/common.h."""
MOST_ANGLES = 2
"""Paces at which the layers of a stack may rotate."""


MOST_ARRAYS = 7
"""Of a packed weight: `kArrays` of native/stored.h."""


class Part(ctypes.Structure):
    """`Part` of native/stored.h."""

    _fields_ = [("data", c_void_p), ("bytes", c_int64), ("offset", c_int64), ("digest", c_uint64)]


class Stored(ctypes.Structure):
    """`Stored` of native/stored.h."""

    _fields_ = [
        ("out", c_int64),
        ("in_", c_int64),
        ("type", c_int32),
        ("parts", Part * MOST_ARRAYS),
        ("matrix", c_void_p),
    ]


class Spans(ctypes.Structure):
    """`Spans` of native/common.h."""

    _fields_ = [
        ("count", c_int64),
        ("start", c_void_p),
        ("num_query", c_void_p),
        ("length", c_void_p),
        ("first", c_void_p),
        ("blocks", c_void_p),
    ]


class Attention(ctypes.Structure):
    """`Attention` of native/common.h."""

    _fields_ = [
        ("query", c_void_p),
        ("output", c_void_p),
        ("query_stride", c_int64),
        ("output_stride", c_int64),
        ("heads", c_int64),
        ("kv_heads", c_int64),
        ("dim", c_int64),
        ("type", c_int32),
        ("pool_type", c_int32),
        ("keys", c_void_p),
        ("values", c_void_p),
        ("head_stride", c_int64),
        ("block_size", c_int64),
        ("row", c_int64),
        ("scale", c_float),
        ("softcap", c_float),
        ("window", c_int64),
        ("slopes", c_void_p),
        ("sinks", c_void_p),
    ]


class NormWeights(ctypes.Structure):
    """`Norm` of native/decoder.h."""

    _fields_ = [("weight", c_void_p), ("bias", c_void_p)]


class Layer(ctypes.Structure):
    """`Layer` of native/decoder.h."""

    _fields_ = [
        ("input", NormWeights),
        ("behind_attention", NormWeights),
        ("post", NormWeights),
        ("behind_mlp", NormWeights),
        ("query", NormWeights),
        ("key", NormWeights),
        ("qkv", c_void_p),
        ("output", c_void_p),
        ("up", c_void_p),
        ("down", c_void_p),
        ("keys", c_void_p),
        ("values", c_void_p),
        ("window", c_int64),
        ("slopes", c_void_p),
        ("sinks", c_void_p),
        ("turning", c_int32),
    ]


class Stack(ctypes.Structure):
    """`Stack` of native/decoder.h."""

    _fields_ = [
        ("count", c_int64),
        ("hidden", c_int64),
        ("heads", c_int64),
        ("kv_heads", c_int64),
        ("dim", c_int64),
        ("inner", c_int64),
        ("type", c_int32),
        ("pool_type", c_int32),
        ("head_stride", c_int64),
        ("block_size", c_int64),
        ("row", c_int64),
        ("scale", c_float),
        ("softcap", c_float),
        ("eps", c_float),
        ("residual_scale", c_float),
        ("clip", c_float),
        ("layer_norm", c_int32),
        ("parallel", c_int32),
        ("gated", c_int32),
        ("activation", c_int32),
        ("head_norm_stride", c_int64),
        ("over_width", c_int32),
        ("counts_keys", c_int32),
        ("query_width", c_int64),
        ("key_width", c_int64),
        ("layers", c_void_p),
        ("final_norm", NormWeights),
    ]


class Segment(ctypes.Structure):
    """`Segment` of native/decoder.h."""

    _fields_ = [
        ("base", c_void_p),
        ("rank", c_int64),
        ("size", c_int64),
        ("slot_bytes", c_int64),
        ("patience", c_double),
    ]


class Angles(ctypes.Structure):
    """`Angles` of native/decoder.h."""

    _fields_ = [("cos", c_void_p), ("sin", c_void_p), ("half", c_int64)]


class Step(ctypes.Structure):
    """`Step` of native/decoder.h."""

    _fields_ = [
        ("tokens", c_int64),
        ("x", c_void_p),
        ("x_type", c_int32),
        ("angles", Angles * MOST_ANGLES),
        ("slots", c_void_p),
        ("spans", c_void_p),
        ("rows", c_void_p),
        ("num_rows", c_int64),
        ("hidden", c_void_p),
        ("delta", c_void_p),
        ("squares", c_void_p),
        ("memory", c_void_p),
    ]


INTERFACE = 5
"""Counts changes of what crosses the interface; the library has the same number (native/api.cpp)."""
MOST_GROUP, MOST_DIM, MOST_RANKS = 256, 1024, 64
"""Query heads that share a kv head, head dimension, ranks: kMostGroup, kMostDim, kMostRanks."""

_P, _L, _T = c_void_p, c_int64, c_int32
_SIGNATURES: dict[str, tuple[object, list[object]]] = {
    "phx_open": (_P, [c_char_p, c_int]),
    "phx_close": (None, [_P]),
    "phx_isa": (c_char_p, [_P]),
    "phx_pack": (_P, [_P, _P, _T, _L, _L, _P, _T]),
    "phx_packed_bytes": (_L, [_P]),
    "phx_describe": (None, [POINTER(Stored)]),
    "phx_digest": (c_uint64, [_P, _L]),
    "phx_read": (_T, [_P, _T, POINTER(Part), _L]),
    "phx_restore": (_T, [_P, _T, POINTER(Stored), _L]),
    "phx_unpack_rows": (None, [_P, _P, _L, _P]),
    "phx_matmul": (None, [_P, _P, _P, _T, _L, _P, _T]),
    "phx_best": (None, [_P, _P, _P, _T, _L, _P, _P]),
    "phx_rms_norm": (None, [_P, _P, _P, _P, _T, c_float, c_float, _L, _L, _P]),
    "phx_activate": (None, [_P, _P, _T, _T, _T, _L, _L, _P]),
    "phx_rope": (None, [_P, _P, _L, _P, _P, _T, _L, _L, _L, _L, _P]),
    "phx_store": (None, [_P, _P, _L, _T, _P, _T, _L, _L, _T, _P, _L, _L, _L]),
    "phx_attention": (None, [_P, POINTER(Attention), POINTER(Spans)]),
    "phx_stack_bytes": (_L, [POINTER(Stack), _L]),
    "phx_run_stack": (_L, [_P, POINTER(Stack), POINTER(Step), POINTER(Segment), _L, _L]),
    "phx_argmax": (None, [_P, _P, _L, _L, _P]),
}


def library_path() -> Path | None:
    """Where the library is that was compiled when the package was installed; None = nowhere."""
    folder = Path(__file__).parent
    paths = (folder / f"_native{suffix}" for suffix in EXTENSION_SUFFIXES)
    return next((path for path in paths if path.exists()), None)


def _interface(library: ctypes.CDLL) -> int:
    try:
        return int(library.phx_interface())
    except AttributeError:
        return 0


def load_library() -> ctypes.CDLL:
    """The library with its signatures declared. Raises `OSError` where there is none."""
    path = library_path()
    if path is None:
        raise OSError("they were not compiled when the package was installed")
    library = ctypes.CDLL(str(path))
    if _interface(library) != INTERFACE:
        raise OSError(f"{path.name} was compiled from other sources: install the package again")
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library
