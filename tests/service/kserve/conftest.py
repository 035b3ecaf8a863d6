"""Triton's client, as it is on PyPI, and its requests."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest


@pytest.fixture(scope="session")
def triton() -> ModuleType:
    """The client's asyncio module; its messages register under the same names as ours."""
    return pytest.importorskip("tritonclient.grpc.aio")


@pytest.fixture
def tensor(triton: ModuleType) -> Callable[..., Any]:
    """Factory of inputs: texts become BYTES, booleans BOOL, anything else what numpy makes of it."""

    def make(name: str, value: Any, *, datatype: str = "", shape: list[int] | None = None) -> Any:
        if isinstance(value, str | bytes):
            array = np.array([value.encode() if isinstance(value, str) else value], object)
            kind = "BYTES"
        else:
            array = np.array([value])
            kind = "BOOL" if array.dtype == bool else datatype
        made = triton.InferInput(name, shape or [1], kind)
        made.set_data_from_numpy(array.reshape(shape or [1]))
        return made

    return make


@pytest.fixture
def inputs(tensor: Callable[..., Any]) -> Callable[..., list[Any]]:
    """Factory: `inputs(text, stream=True, max_tokens=4)`; flags of the protocol, and parameters."""

    def make(text: str, **given: Any) -> list[Any]:
        flags = ("stream", "exclude_input_in_output")
        names = [name for name in given if name in flags or name.startswith("return_")]
        made = [tensor("text_input", text), *(tensor(name, given.pop(name)) for name in names)]
        if given:
            made.append(tensor("sampling_parameters", json.dumps(given)))
        return made

    return make
