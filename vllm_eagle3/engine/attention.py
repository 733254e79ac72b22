"""Tree attention inside vLLM's attention layers.

A layer keeps its stock implementation for prompts and plain decoding (the *tail* of the
batch); the rows of draft trees, which lead the batch, attend by ancestor bits. A backend
module (`attention_flash`, `attention_triton`, `attention_cpu`) names the stock classes it
extends and how tree rows are computed.
"""

import importlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from vllm_eagle3 import ops
from vllm_eagle3.engine.compat import (
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm_eagle3.engine.support import E4M3_CACHES, check_layer
from vllm_eagle3.engine.tree_batch import TreeBatch
from vllm_eagle3.engine.tree_rows import TreeRows

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.model_executor.layers.attention import Attention

_BACKENDS = {
    "FLASH_ATTN": "attention_flash",
    "TRITON_ATTN": "attention_triton",
    "CPU_ATTN": "attention_cpu",
}


@dataclass
class TreeMetadata:
    """Attention metadata of one step for the layers of one group.

    Attributes:
        tree: the leading rows, which attend by ancestor bits; None if there are none.
        block_table: int32 [B, pages] of the tree rows' requests.
        tail: the stock backend's metadata of all other rows; None if there are none.
        schedule: how the backend spreads the tree rows' prefixes over the GPU; None where it
            needs no plan.
    """

    tree: TreeRows | None
    block_table: torch.Tensor
    tail: Any | None = None
    schedule: Any | None = None


class TreeMetadataBuilder(AttentionMetadataBuilder[TreeMetadata]):
    """Splits a batch into tree rows and the stock builder's tail."""

    stock_builder: ClassVar[type[AttentionMetadataBuilder]]

    def __init__(
        self,
        kv_cache_spec: Any,
        layer_names: list[str],
        vllm_config: "VllmConfig",
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.stock = self.stock_builder(kv_cache_spec, layer_names, vllm_config, device)
        layers = vllm_config.compilation_config.static_forward_context
        self.tree_batch: TreeBatch | None = layers[layer_names[0]].impl.tree_batch

    @classmethod
    def get_cudagraph_support(cls, vllm_config: "VllmConfig", kv_cache_spec: Any) -> Any:
        """Whole steps in which every request has a tree of one size; other steps piecewise."""
        return AttentionCGSupport.UNIFORM_BATCH

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> TreeMetadata:
        common = common_attn_metadata
        tree = self.tree_batch.rows if self.tree_batch is not None else None
        if tree is None:
            tail = self.stock.build(common_prefix_len, common, fast_build)
            return TreeMetadata(None, common.block_table_tensor, tail)
        metadata = self.build_tree_rows(tree, common.block_table_tensor)
        if tree.num_reqs < common.num_reqs:
            metadata.tail = self.stock.build(0, _tail(common, tree), fast_build)
        return metadata

    def build_for_cudagraph_capture(
        self, common_attn_metadata: CommonAttentionMetadata
    ) -> TreeMetadata:
        common = common_attn_metadata
        tree = self.tree_batch.rows if self.tree_batch is not None else None
        if tree is None:
            tail = self.stock.build_for_cudagraph_capture(common)
            return TreeMetadata(None, common.block_table_tensor, tail)
        # The graph must hold whatever prefix is replayed on it.
        tree = replace(tree, max_prefix_len=common.max_seq_len)
        return self.build_tree_rows(tree, common.block_table_tensor)

    def build_tree_rows(self, tree: TreeRows, block_table: torch.Tensor) -> TreeMetadata:
        """Metadata of rows that all attend by ancestor bits."""
        return TreeMetadata(tree, block_table)


def _tail(common: CommonAttentionMetadata, tree: TreeRows) -> CommonAttentionMetadata:
    """The batch without its leading tree rows."""
    first, row = tree.num_reqs, tree.num_tokens
    starts_cpu = common.query_start_loc_cpu[first:] - row

    def rest(values: torch.Tensor | None, start: int = first) -> torch.Tensor | None:
        return None if values is None else values[start:]

    # Spans of images, which see each other in both directions, by place in the batch.
    spans = common.mm_req_doc_ranges
    if spans is not None:
        spans = {req - first: span for req, span in spans.items() if req >= first}
    return common.replace(
        query_start_loc=common.query_start_loc[first:] - row,
        query_start_loc_cpu=starts_cpu,
        seq_lens=common.seq_lens[first:],
        seq_lens_cpu_upper_bound=rest(common.seq_lens_cpu_upper_bound),
        num_reqs=common.num_reqs - first,
        num_actual_tokens=common.num_actual_tokens - row,
        max_query_len=int((starts_cpu[1:] - starts_cpu[:-1]).max()),
        block_table_tensor=common.block_table_tensor[first:],
        slot_mapping=common.slot_mapping[row:],
        positions=rest(common.positions, row),
        is_prefilling=rest(common.is_prefilling),
        req_idx=rest(common.req_idx),
        mm_req_doc_ranges=spans,
        _num_computed_tokens_cache=None,
        _token_to_req_indices_cache=None,
    )


class TreeImpl:
    """Mixed into a stock implementation: tree rows first, then the stock tail.

    ``tree_batch`` is set when a layer adopts the backend: the shared batch for the
    target's layers, None for the draft's, whose trees come in their own metadata.
    """

    tree_batch: TreeBatch | None

    def fused_output_quant_supported(self, quant_key: Any) -> bool:
        """Keeps vLLM's fusion pass away from this layer: tree rows write no quantised output."""
        return False

    def forward(
        self,
        layer: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: TreeMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        stock = super().forward  # type: ignore[misc]
        if attn_metadata is None:  # vLLM's profiling run
            return stock(layer, query, key, value, kv_cache, None, output)
        assert output_scale is None
        assert output_block_scale is None
        tree, tail = attn_metadata.tree, attn_metadata.tail
        row = 0
        if tree is not None:
            row = tree.num_tokens
            self.attend(
                layer, query[:row], key[:row], value[:row], kv_cache, attn_metadata, output[:row]
            )
        if tail is not None:
            stock(layer, query[row:], key[row:], value[row:], kv_cache, tail, output[row:])
        return output

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
        """Tree rows by the portable kernel: paged prefix and nodes in one pass."""
        tree = metadata.tree
        key_cache, value_cache = self.split_cache(kv_cache)
        ops.tree_attention(
            query,
            tree_key,
            tree_value,
            key_cache,
            value_cache,
            metadata.block_table[: tree.num_reqs],
            tree.prefix_lens,
            tree.query_start_loc,
            tree.tree_start,
            tree.tree_lens,
            tree.ancestor_bits[: tree.num_tokens],
            output,
            scale=self.scale,
            max_query_len=tree.max_query_len,
            max_tree_len=tree.max_tree_len,
            max_prefix_len=tree.max_prefix_len,
            softcap=self.logits_softcap,
            sliding_window=self.window,
            scratch=tree.scratch,
            **self.scales(layer, query),
        )

    @property
    def is_cache_e4m3(self) -> bool:
        return self.kv_cache_dtype in E4M3_CACHES

    def scales(self, layer: torch.nn.Module, query: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the values of an e4m3 cache are multiples of, by name; empty for other caches.

        vLLM's layer has rounded the query, too, where the stock implementation takes it so. Keys
        and values come as the model computed them, whatever the cache holds.
        """
        if not self.is_cache_e4m3:
            return {}
        scales = {"k_scale": layer._k_scale, "v_scale": layer._v_scale}
        if query.dtype == torch.float8_e4m3fn:
            scales["q_scale"] = layer._q_scale
        return scales

    def split_cache(self, kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[blocks, kv heads, block size, 2 * head size] to keys and values
        [blocks, block size, kv heads, head size], as views."""
        return kv_cache.transpose(1, 2).split(self.head_size, dim=-1)

    @property
    def window(self) -> int | None:
        """Positions that a row sees back from itself, itself included; None for all."""
        window = self.sliding_window
        if isinstance(window, tuple):  # (left, right), right 0 for causal attention
            return window[0] + 1 if window[0] >= 0 else None
        return window if window is not None and window > 0 else None

    @property
    def logits_softcap(self) -> float:
        return float(getattr(self, "logits_soft_cap", 0.0) or 0.0)


def adopt(layers: dict[str, "Attention"], tree_batch: TreeBatch | None) -> None:
    """Give loaded attention layers a tree backend; nothing outside them changes.

    Args:
        layers: name to layer; all of one model.
        tree_batch: the target's trees, or None for the layers of a draft.

    Raises:
        ValueError: a layer's backend has no tree version, or the layer has a feature that
            tree attention lacks.
    """
    for name, layer in layers.items():
        stock = layer.attn_backend.get_name()
        if stock not in _BACKENDS:
            raise ValueError(
                f"draft trees do not support the attention backend {stock} of {name}: choose"
                " --attention-backend FLASH_ATTN or TRITON_ATTN"
            )
        module = importlib.import_module(f"vllm_eagle3.engine.{_BACKENDS[stock]}")
        if layer.attn_backend is not module.TargetBackend.__base__:
            # Chunked-local attention, static sinks: the name of their base, but other metadata.
            raise ValueError(
                f"draft trees do not support {layer.attn_backend.__name__} ({name}): serve this"
                " model with a chain (leave tree out)"
            )
        check_layer(name, layer)
        # Target and draft need different backend classes: vLLM shares one metadata object
        # between layers of one class, and the draft's prefill must stay causal.
        backend = module.TargetBackend if tree_batch is not None else module.DraftBackend
        layer.attn_backend = backend
        layer.impl = _extend(layer.impl, backend.get_impl_cls())
        layer.impl.tree_batch = tree_batch


def _extend(impl: Any, cls: type[TreeImpl]) -> TreeImpl:
    """An instance of ``cls``, a subclass of ``impl``'s class, with the state of ``impl``."""
    assert issubclass(cls, type(impl))
    extended = object.__new__(cls)
    vars(extended).update(vars(impl))
    return extended
