"""Tree attention on vLLM's FlashAttention backend.

On Hopper FlashAttention 3 attends to the prefix and returns its log-sum-exp; one kernel
adds the tree's nodes and finishes the softmax in place. Elsewhere, and for layers with a
sliding window, whose edge would follow row indices instead of tree positions, the portable
kernel does both.
"""

import torch

from vllm_eagle3 import ops
from vllm_eagle3.engine.attention import TreeImpl, TreeMetadata, TreeMetadataBuilder
from vllm_eagle3.engine.compat import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
    canonicalize_singleton_dim_strides,
    flash_attn_varlen_func,
)


class FlashTreeBuilder(TreeMetadataBuilder):
    stock_builder = FlashAttentionMetadataBuilder


class FlashTreeImpl(TreeImpl, FlashAttentionImpl):
    def attend(
        self,
        query: torch.Tensor,
        tree_key: torch.Tensor,
        tree_value: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: TreeMetadata,
        output: torch.Tensor,
    ) -> None:
        if self.vllm_flash_attn_version != 3 or self.window is not None:
            super().attend(query, tree_key, tree_value, kv_cache, metadata, output)
            return
        tree = metadata.tree
        # FlashAttention 3 copies by TMA, which wants the strides of size-1 axes in order.
        key_cache, value_cache = map(canonicalize_singleton_dim_strides, self.split_cache(kv_cache))
        _, lse = flash_attn_varlen_func(
            q=query,
            k=key_cache,
            v=value_cache,
            out=output,
            cu_seqlens_q=tree.query_start_loc,
            max_seqlen_q=tree.max_query_len,
            seqused_k=tree.prefix_lens,
            max_seqlen_k=tree.max_prefix_len,
            softmax_scale=self.scale,
            causal=False,
            block_table=metadata.block_table[: tree.num_reqs],
            softcap=self.logits_softcap,
            return_softmax_lse=True,
            fa_version=3,
        )
        ops.finish_tree_attention(
            query,
            tree_key,
            tree_value,
            output,
            lse,
            tree.query_start_loc,
            tree.tree_start,
            tree.tree_lens,
            tree.ancestor_bits[: tree.num_tokens],
            scale=self.scale,
            max_query_len=tree.max_query_len,
            max_tree_len=tree.max_tree_len,
            softcap=self.logits_softcap,
        )


class TargetBackend(FlashAttentionBackend):
    # A layer may otherwise write its own cache and pass no keys.
    supports_kv_cache_update_bypass = False

    @staticmethod
    def get_impl_cls() -> type[FlashTreeImpl]:
        return FlashTreeImpl

    @staticmethod
    def get_builder_cls() -> type[FlashTreeBuilder]:
        return FlashTreeBuilder


class DraftBackend(TargetBackend):
    pass
