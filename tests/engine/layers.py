"""Attention layers as the backends see them, over the cache and the rows of a case."""

from types import SimpleNamespace
from typing import Any, Literal

import torch

from tests.ops.setups import DEVICE, NAN, Attention
from tests.ops.test_tree_attention_fp8 import K_SCALE, Q_SCALE, V_SCALE, cached, quantised
from vllm_eagle3.engine import attention
from vllm_eagle3.engine.tree_rows import TreeRows

MAX_MODEL_LEN = 512
GPU = SimpleNamespace(is_cuda=lambda: True, has_device_capability=lambda capability: True)


class Layer:
    """One that has been adopted. The module ``support`` must take the machine for a ``GPU``.

    With ``is_e4m3`` the case is rounded: what is right is attention to what such a cache holds.
    """

    def __init__(
        self,
        case: Attention,
        is_e4m3: bool = False,
        *,
        backend: Literal["flash", "triton"] = "flash",
        version: int = 3,
        is_query_e4m3: bool | None = None,
    ) -> None:
        self.case, self.is_e4m3 = case, is_e4m3
        if is_query_e4m3 is None:
            is_query_e4m3 = is_e4m3
        self.inputs = cached(case, is_query_e4m3)[1] if is_e4m3 else case.inputs
        caches = [self.inputs[f"{name}_cache"] for name in ("key", "value")]
        self.cache = torch.cat(
            [cache.view(torch.uint8) if is_e4m3 else cache for cache in caches], dim=-1
        )
        self.cache = self.cache.transpose(1, 2).contiguous()
        self.kv_cache_dtype = "fp8" if is_e4m3 else "auto"
        # One of the shapes that vLLM gives them for each.
        self._q_scale = torch.tensor(Q_SCALE, device=DEVICE)
        self._k_scale = torch.tensor(K_SCALE, device=DEVICE)
        self._v_scale = torch.tensor([V_SCALE], device=DEVICE)
        self.attn_backend = _stock(backend)
        self.impl = self.attn_backend.get_impl_cls()(
            case.heads,
            case.head_dim,
            case.settings["scale"],
            case.kv_heads,
            None,
            case.window,
            self.kv_cache_dtype,
            case.softcap or None,
        )
        if backend == "flash":
            self.impl.vllm_flash_attn_version = version
        self.batch = SimpleNamespace(rows=None)
        attention.adopt({"layer": self}, self.batch)

    def builder(self, vllm_config: Any, *others: "Layer") -> Any:
        """The metadata builder of a group of layers, this one the last."""
        from vllm.v1.kv_cache_interface import FullAttentionSpec, get_kv_quant_mode

        layers = {f"layer.{i}": layer for i, layer in enumerate((*others, self))}
        vllm_config.compilation_config.static_forward_context = layers
        vllm_config.cache_config.cache_dtype = self.kv_cache_dtype
        spec = FullAttentionSpec(
            block_size=self.case.page,
            num_kv_heads=self.case.kv_heads,
            head_size=self.case.head_dim,
            dtype=self.cache.dtype,
            kv_quant_mode=get_kv_quant_mode(self.kv_cache_dtype),
        )
        builder = self.attn_backend.get_builder_cls()(spec, list(layers), vllm_config, DEVICE)
        builder.tree_batch = self.batch
        return builder

    def rows(self, **changes: Any) -> TreeRows:
        """The tree rows of the case; the longest prefix known to the token."""
        inputs = self.inputs
        rows = TreeRows(
            num_reqs=len(self.case.seen),
            num_tokens=len(inputs["query_THD"]),
            query_start_loc=inputs["query_start_loc_B1"],
            prefix_lens=inputs["prefix_lens_B"],
            tree_start=inputs["tree_start_B"],
            tree_lens=inputs["tree_lens_B"],
            ancestor_bits=inputs["ancestor_bits_T"],
            max_query_len=self.case.settings["max_query_len"],
            max_tree_len=self.case.settings["max_tree_len"],
            max_prefix_len=max(self.case.prefix_lens),
        )
        vars(rows).update(changes)
        return rows

    def write(self, request: int) -> None:
        """The keys and values of a request's rows to the cache, as vLLM does before attention."""
        first, length = self.inputs["query_start_loc_B1"][request], self.case.prefix_lens[request]
        for i in range(len(self.case.seen[request])):
            page, slot = divmod(length + i, self.case.page)
            content = []
            for name, scale in (("key", self._k_scale), ("value", self._v_scale)):
                head = self.inputs[f"tree_{name}_SHD"][first + i]
                if self.is_e4m3:
                    head = quantised(head, float(scale)).view(torch.uint8)
                content.append(head)
            block = self.inputs["block_table_BP"][request, page]
            self.cache[block, :, slot] = torch.cat(content, dim=-1)

    def forward(self, metadata: Any, **changes: torch.Tensor) -> torch.Tensor:
        inputs = {**self.inputs, **changes}
        query = inputs["query_THD"]
        out = torch.full(query.shape, NAN, dtype=self.case.dtype, device=DEVICE)
        key, value = inputs["tree_key_SHD"], inputs["tree_value_SHD"]
        return self.impl.forward(self, query, key, value, self.cache, metadata, out)


def _stock(backend: str) -> Any:
    if backend == "triton":
        from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend

        return TritonAttentionBackend
    from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend

    return FlashAttentionBackend


def common(layer: Layer, rows: TreeRows) -> Any:
    """vLLM's own metadata of the same batch."""
    from vllm.v1.attention.backend import CommonAttentionMetadata

    starts = rows.query_start_loc
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts.cpu(),
        seq_lens=rows.prefix_lens + starts.diff(),
        num_reqs=rows.num_reqs,
        num_actual_tokens=rows.num_tokens,
        max_query_len=rows.max_query_len,
        max_seq_len=MAX_MODEL_LEN,
        block_table_tensor=layer.inputs["block_table_BP"],
        slot_mapping=torch.zeros(rows.num_tokens, dtype=torch.int64, device=DEVICE),
    )
