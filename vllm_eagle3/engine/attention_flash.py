"""Tree attention on vLLM's FlashAttention backend.

On Hopper FlashAttention 3 attends to the prefix and returns its log-sum-exp; one kernel
adds the tree's nodes and finishes the softmax in place. Elsewhere, and for layers with a
sliding window, whose edge would follow row indices instead of tree positions, the portable
kernel does both.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from vllm_eagle3 import ops
from vllm_eagle3.engine.attention import TreeImpl, TreeMetadata, TreeMetadataBuilder
from vllm_eagle3.engine.compat import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
    canonicalize_singleton_dim_strides,
    flash_attn_varlen_func,
    get_scheduler_metadata,
)
from vllm_eagle3.engine.tree_rows import TreeRows
from vllm_eagle3.ops.device import num_sms

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_TILE_ROWS = 128  # rows (query heads of one key head packed) of FlashAttention 3's usual tile
_SPLIT_BYTES = 1 << 26


@dataclass
class PrefixSchedule:
    """FlashAttention 3's plan for the prefixes of one step, the same for all layers.

    Attributes:
        metadata: int32, at a fixed address where a graph replays it.
        num_splits: most parts of one prefix that are read side by side. The plan chooses on the
            device how many; this many are allocated for.
    """

    metadata: torch.Tensor
    num_splits: int


class FlashTreeBuilder(TreeMetadataBuilder):
    stock_builder = FlashAttentionMetadataBuilder

    def __init__(
        self,
        kv_cache_spec: Any,
        layer_names: list[str],
        vllm_config: "VllmConfig",
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        layers = vllm_config.compilation_config.static_forward_context
        # Layers with a window may share their cache's group with layers without.
        impls = [layers[name].impl for name in layer_names]
        self.impl = next((impl for impl in impls if impl.splits_prefix), None)
        self.max_num_splits = vllm_config.attention_config.flash_attn_max_num_splits_for_cuda_graph
        # At most four words for each request, padded to four requests, and a counter.
        max_num_reqs = vllm_config.scheduler_config.max_num_seqs
        size = 1 + 4 * (max_num_reqs + 3)
        self._schedule = torch.zeros(size, dtype=torch.int32, device=device)

    def build_tree_rows(self, tree: TreeRows, block_table: torch.Tensor) -> TreeMetadata:
        metadata = TreeMetadata(tree, block_table)
        impl, spec = self.impl, self.kv_cache_spec
        if impl is None:
            return metadata
        num_splits = self._num_splits(tree)
        # What decides on the kernel must be what the kernel is called with.
        planned = get_scheduler_metadata(
            batch_size=tree.num_reqs,
            max_seqlen_q=tree.max_query_len,
            max_seqlen_k=tree.max_prefix_len,
            num_heads_q=impl.num_heads,
            num_heads_kv=impl.num_kv_heads,
            headdim=impl.head_size,
            cache_seqlens=tree.prefix_lens,
            qkv_dtype=torch.float8_e4m3fn if impl.is_cache_e4m3 else spec.dtype,
            cu_seqlens_q=tree.query_start_loc,
            page_size=spec.block_size,
            causal=False,
            has_softcap=impl.logits_softcap > 0,
            num_splits=num_splits,
        )
        if tree.scratch is None:
            # The target's graphs replay what is planned between them; the draft's plan is
            # part of its graph. What the kernel finds past its plan it would take for work.
            size = planned.shape[0]
            self._schedule[:size] = planned
            self._schedule[size:] = 0
            planned = self._schedule[:size]
        metadata.schedule = PrefixSchedule(planned, num_splits)
        return metadata

    def _num_splits(self, tree: TreeRows) -> int:
        """Parts of a prefix that fill the GPU twice; more, for lengths that differ, while their
        float32 outputs are small.

        Of the batch's shape alone, so that a graph's plans are for the kernel that it holds.
        """
        impl = self.impl
        rows = tree.max_query_len * (impl.num_heads // impl.num_kv_heads)
        tiles = tree.num_reqs * impl.num_kv_heads * -(-rows // _TILE_ROWS)
        part_bytes = 4 * tree.num_tokens * impl.num_heads * impl.head_size
        num_splits = max(-(-2 * num_sms(self.device) // tiles), _SPLIT_BYTES // part_bytes)
        return max(1, min(self.max_num_splits, num_splits))


class FlashTreeImpl(TreeImpl, FlashAttentionImpl):
    @property
    def splits_prefix(self) -> bool:
        """Whether FlashAttention 3 attends to the prefix; the portable kernel if not."""
        return self.vllm_flash_attn_version == 3 and self.window is None

    def attend(
        self,
        layer: torch.nn.Module,
        query: torch.Tensor,
        tree_key: torch.Tensor,
        tree_value: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: TreeMetadata,
        output: torch.Tensor,
    ) -> None:
        if not self.splits_prefix:
            super().attend(layer, query, tree_key, tree_value, kv_cache, metadata, output)
            return
        tree = metadata.tree
        scales = self.scales(layer, query)
        descales = {
            name.replace("scale", "descale"): scale.expand(tree.num_reqs, self.num_kv_heads)
            for name, scale in scales.items()
        }
        # FlashAttention 3 copies by TMA, which wants the strides of size-1 axes in order.
        key_cache, value_cache = map(canonicalize_singleton_dim_strides, self.split_cache(kv_cache))
        if scales:
            key_cache = key_cache.view(torch.float8_e4m3fn)
            value_cache = value_cache.view(torch.float8_e4m3fn)
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
            scheduler_metadata=metadata.schedule.metadata,
            num_splits=metadata.schedule.num_splits,
            fa_version=3,
            **descales,
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
            scratch=tree.scratch,
            **scales,
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
