"""Tree attention on vLLM's Triton backend: any GPU, any float type, also over an e4m3 cache."""

from vllm_eagle3.engine.attention import TreeImpl, TreeMetadataBuilder
from vllm_eagle3.engine.compat import (
    TritonAttentionBackend,
    TritonAttentionImpl,
    TritonAttentionMetadataBuilder,
)


class TritonTreeBuilder(TreeMetadataBuilder):
    stock_builder = TritonAttentionMetadataBuilder


class TritonTreeImpl(TreeImpl, TritonAttentionImpl):
    pass


class TargetBackend(TritonAttentionBackend):
    # A layer may otherwise write its own cache and pass no keys.
    supports_kv_cache_update_bypass = False

    @staticmethod
    def get_impl_cls() -> type[TritonTreeImpl]:
        return TritonTreeImpl

    @staticmethod
    def get_builder_cls() -> type[TritonTreeBuilder]:
        return TritonTreeBuilder


class DraftBackend(TargetBackend):
    pass
