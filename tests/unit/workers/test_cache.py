"""The paged pool of a rank."""

from __future__ import annotations

import psutil
import torch

from phalanx.protos.specs import CacheSpec
from phalanx.protos.steps import BlockCopy
from phalanx.workers.cache import PagedCache

CPU = torch.device("cpu")


def test_a_host_s_pool_is_zeros_and_takes_memory_as_it_is_written() -> None:
    process = psutil.Process()
    before = process.memory_info().rss
    spec = CacheSpec(block_size=16, num_blocks=65536, dtype="bfloat16")
    cache = PagedCache(spec, 2, 2, 64, CPU)
    assert cache.num_bytes == 2 * 2 * 2 * 65536 * 16 * 64 * 2 == 2**30
    assert process.memory_info().rss - before < 2**27
    assert [layer.key.shape for layer in cache.layers] == [(2, 65536, 16, 64)] * 2
    assert not cache.layers[1].value[:, ::4099].any()


def test_blocks_are_copied_in_every_layer_and_nowhere_else() -> None:
    spec = CacheSpec(block_size=4, num_blocks=8, dtype="float32")
    cache = PagedCache(spec, 3, 2, 5, CPU)
    for number, layer in enumerate(cache.layers, 1):
        layer.key[:, 2], layer.value[:, 2] = number, -number
    cache.copy_blocks([BlockCopy(2, 7), BlockCopy(7, 1)])
    for number, layer in enumerate(cache.layers, 1):
        for block in range(8):
            expected = number if block in (1, 2, 7) else 0
            assert (layer.key[:, block] == expected).all()
            assert (layer.value[:, block] == -expected).all()


def test_a_rank_without_heads_has_an_empty_pool() -> None:
    spec = CacheSpec(block_size=4, num_blocks=8, dtype="bfloat16")
    assert PagedCache(spec, 2, 0, 64, CPU).num_bytes == 0
