"""Every private name of vLLM that the engine uses, imported once.

Supported: 0.32 and 0.33 (`contract.py` compares their signatures with stored ones).
Platform-specific names resolve lazily: FlashAttention's module does not import on a CPU,
and the CPU backend needs a CPU build.
"""

import importlib
from typing import Any

from vllm.config import CUDAGraphMode, get_layers_from_vllm_config
from vllm.forward_context import BatchDescriptor, set_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.utils.torch_utils import async_tensor_h2d, canonicalize_singleton_dim_strides
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.spec_decode.dynamic.utils import build_dynamic_sd_schedule_lookup
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor
from vllm.v1.worker.gpu.model_states import resolve_model_state_cls
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

# As plain sampling sees it, so that both draw alike; `interpreter.py` may have replaced it.
from vllm.v1.worker.gpu.sample.sampler import gumbel_sample
from vllm.v1.worker.gpu.sample.states import NO_LOGPROBS
from vllm.v1.worker.gpu.spec_decode.eagle.speculator import EagleSpeculator
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import (
    RejectionSampler,
    get_max_chunk_logits,
)
from vllm.v1.worker.gpu.spec_decode.target_dependent_ar.cudagraph_utils import (
    SpeculatorBatchDescriptor,
    SpeculatorCudaGraphManager,
)

_LAZY = {
    "CPUAttentionBackend": "vllm.v1.attention.backends.cpu_attn",
    "CPUAttentionBackendImpl": "vllm.v1.attention.backends.cpu_attn",
    "Eagle3LlamaForCausalLM": "vllm.model_executor.models.llama_eagle3",
    "FlashAttentionBackend": "vllm.v1.attention.backends.flash_attn",
    "FlashAttentionImpl": "vllm.v1.attention.backends.flash_attn",
    "FlashAttentionMetadataBuilder": "vllm.v1.attention.backends.flash_attn",
    "TritonAttentionBackend": "vllm.v1.attention.backends.triton_attn",
    "TritonAttentionImpl": "vllm.v1.attention.backends.triton_attn",
    "TritonAttentionMetadataBuilder": "vllm.v1.attention.backends.triton_attn",
    "flash_attn_varlen_func": "vllm.v1.attention.backends.fa_utils",
    "get_scheduler_metadata": "vllm.v1.attention.backends.fa_utils",
}


__all__ = [
    "NO_LOGPROBS",
    "Attention",
    "AttentionCGSupport",
    "AttentionMetadataBuilder",
    "BatchDescriptor",
    "BatchExecutionDescriptor",
    "CUDAGraphMode",
    "CommonAttentionMetadata",
    "DefaultModelState",
    "EagleSpeculator",
    "RejectionSampler",
    "SpeculatorBatchDescriptor",
    "SpeculatorCudaGraphManager",
    "async_tensor_h2d",
    "build_dynamic_sd_schedule_lookup",
    "get_layers_from_vllm_config",
    "get_max_chunk_logits",
    "gumbel_sample",
    "resolve_model_state_cls",
    "set_forward_context",
    "canonicalize_singleton_dim_strides",
    *_LAZY,
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
