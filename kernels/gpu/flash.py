"""flash-attn for prompts, where it is installed: version 3 (`flash_attn_interface`), else 2.

Single queries stay with the project's own kernel, whose splits do not depend on the batch. The
pool's [K, blocks, block size, D] is passed as the view [blocks, block size, K, D], of which
flash-attn asks a contiguous last dimension only. Both versions read lengths and tables on the
device. What they cannot weigh (sinks; with version 3, ALiBi), or cannot read (with version 2, blocks
that are not multiples of 256 tokens), goes to the project's own kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

import torch
from torch import Tensor

from phalanx.kernels.interface import AttentionSpec

from .plan import GpuPlan

PAGES_OF_VERSION_2 = 256
MOST_ELEMENTS = 256


@dataclass(frozen=True, slots=True)
class FlashAttention:
    """One installed version: which sequences it takes, and how it is called."""

    version: int
    function: Callable[..., Tensor]

    @classmethod
    def find(cls) -> FlashAttention | None:
        """The newest version that can be imported."""
        for version, module, name in (
            (3, "flash_attn_interface", "flash_attn_with_kvcache"),
            (2, "flash_attn", "flash_attn_varlen_func"),
        ):
            try:
                return cls(version, getattr(import_module(module), name))
            except (ImportError, AttributeError, OSError):
                continue
        return None

    def takes(self, query: Tensor, key_pool: Tensor, spec: AttentionSpec) -> bool:
        """Whether prompts of these shapes and scores can be handed over."""
        if query.dtype not in (torch.float16, torch.bfloat16) or key_pool.dtype != query.dtype:
            return False
        if query.shape[-1] > MOST_ELEMENTS or query.shape[-1] % 8 or spec.sinks is not None:
            return False
        if self.version == 3:
            return spec.alibi_slopes is None
        return key_pool.shape[2] % PAGES_OF_VERSION_2 == 0

    def prompts(
        self,
        query: Tensor,
        key_pool: Tensor,
        value_pool: Tensor,
        plan: GpuPlan,
        spec: AttentionSpec,
    ) -> Tensor:
        """Attention of sequences with several queries -> [T, H, D]; other rows mean nothing."""
        keys, values = key_pool.permute(1, 2, 0, 3), value_pool.permute(1, 2, 0, 3)
        window = (spec.window - 1, 0) if spec.window else (-1, -1)
        scores = {"softmax_scale": spec.scale, "causal": True, "window_size": window}
        lengths = plan.prompt_lengths
        if self.version == 3:
            return self.function(
                query,
                keys,
                values,
                cache_seqlens=lengths[1:],
                page_table=plan.tables,
                cu_seqlens_q=plan.starts,
                max_seqlen_q=plan.longest_query,
                softcap=spec.softcap,
                num_splits=1,
                **scores,
            )
        return self.function(
            query,
            keys,
            values,
            cu_seqlens_q=plan.starts,
            cu_seqlens_k=lengths.cumsum(0, dtype=torch.int32),
            max_seqlen_q=plan.longest_query,
            max_seqlen_k=plan.max_length,
            softcap=spec.softcap,
            alibi_slopes=spec.alibi_slopes,
            block_table=plan.tables,
            **scores,
        )
