"""The driver's parts, where there is a CUDA device."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture(scope="session")
def driver() -> Any:
    """The module `driver.py`, ready to run its parts."""
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    spec = importlib.util.spec_from_file_location("driver", Path(__file__).with_name("driver.py"))
    if spec is None or spec.loader is None:
        raise ImportError("driver.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.make_importable()
    return module
