"""The example configurations load, and say what their names promise."""

from __future__ import annotations

from pathlib import Path

import pytest

from phalanx.controller.config import ClusterConfig
from phalanx.controller.settings import load_config
from phalanx.controller.units import is_loopback

NAMES = ("compose", "cpu-node", "gpu-node", "laptop", "two-nodes")


@pytest.fixture
def configs(deploy: Path) -> dict[str, ClusterConfig]:
    return {file.stem: load_config(file, {}) for file in sorted(deploy.glob("configs/*.toml"))}


def test_all_load(configs: dict[str, ClusterConfig]) -> None:
    assert tuple(configs) == NAMES


def test_only_compose_is_insecure(configs: dict[str, ClusterConfig]) -> None:
    """And its port is published on loopback, as another test sees to."""
    assert [name for name, config in configs.items() if config.insecure] == ["compose"]
    assert [name for name, config in configs.items() if is_loopback(config.host)] == ["laptop"]


def test_shapes(configs: dict[str, ClusterConfig]) -> None:
    assert configs["gpu-node"].tp == 4
    assert configs["gpu-node"].device == configs["two-nodes"].device == "cuda"
    assert configs["two-nodes"].ray_address == "auto"
    assert configs["two-nodes"].placement == "PACK"
    assert configs["two-nodes"].tp > configs["gpu-node"].tp
    assert configs["cpu-node"].memory_per_rank == 24 * 2**30
