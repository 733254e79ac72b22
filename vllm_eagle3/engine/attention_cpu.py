"""Tree attention on the CPU, in torch.

vLLM's own CPU kernels pack the cache in a layout of the processor's instruction set, where
single slots cannot be moved. These layers keep it plain: keys and values side by side in
each slot, as on a GPU.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from vllm_eagle3.engine.attention import TreeImpl, TreeMetadataBuilder
from vllm_eagle3.engine.compat import (
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
)


@dataclass
class CausalMetadata:
    """Rows that attend causally: query starts [B + 1], lengths [B], pages [B, P]."""

    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor


class CausalBuilder(AttentionMetadataBuilder[CausalMetadata]):
    def __init__(self, *args: Any) -> None:  # abstract in vLLM
        super().__init__(*args)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> CausalMetadata:
        common = common_attn_metadata
        return CausalMetadata(common.query_start_loc, common.seq_lens, common.block_table_tensor)


class CpuTreeBuilder(TreeMetadataBuilder):
    stock_builder = CausalBuilder


class PagedCausalImpl(CPUAttentionBackendImpl):
    """Causal attention over plain pages: [blocks, kv heads, block size, 2 * head size]."""

    def do_kv_cache_update(
        self,
        layer: torch.nn.Module,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        slots = slot_mapping[: key.shape[0]]
        written = slots >= 0
        slots = slots[written]
        block, offset = slots // kv_cache.shape[2], slots % kv_cache.shape[2]
        kv_cache[block, :, offset, : self.head_size] = key[: len(written)][written]
        kv_cache[block, :, offset, self.head_size :] = value[: len(written)][written]

    def forward(
        self,
        layer: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: CausalMetadata | None,
        output: torch.Tensor,
    ) -> torch.Tensor:
        if attn_metadata is None:
            return output.zero_()
        starts = attn_metadata.query_start_loc.tolist()
        for req, seq_len in enumerate(attn_metadata.seq_lens.tolist()):
            rows = slice(starts[req], starts[req + 1])
            if rows.start == rows.stop:
                continue
            pages = -(-seq_len // kv_cache.shape[2])
            cache = kv_cache[attn_metadata.block_table[req, :pages].long()]
            cache = cache.transpose(1, 2).flatten(0, 1)[:seq_len].transpose(0, 1)
            keys, values = cache.split(self.head_size, dim=-1)
            output[rows] = self._attend(query[rows].transpose(0, 1), keys, values).transpose(0, 1)
        return output

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Queries [heads, q, d] are the last q of the keys' [kv heads, s, d] positions."""
        q, s = query.shape[1], key.shape[1]
        mask = torch.ones(q, s, dtype=torch.bool).tril(s - q)
        if self.window is not None:
            mask = mask.triu(s - q - self.window + 1)
        return F.scaled_dot_product_attention(
            query[None], key[None], value[None], mask, scale=self.scale, enable_gqa=True
        )[0]


class CpuTreeImpl(TreeImpl, PagedCausalImpl):
    pass


class TargetBackend(CPUAttentionBackend):
    @staticmethod
    def get_impl_cls() -> type[CpuTreeImpl]:
        return CpuTreeImpl

    @staticmethod
    def get_builder_cls() -> type[CpuTreeBuilder]:
        return CpuTreeBuilder


class DraftBackend(TargetBackend):
    pass
