"""RMSNorm in one kernel, in the head and in the frozen target.

On a GPU torch has a kernel for it, forward and backward, that takes input and weight of one type
and is float32 inside. Written out, as in Hugging Face's Llama, a norm of bfloat16 moves some forty
bytes for each element, where four will do.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn


def rms_norm(x: torch.Tensor, weight_H: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in the type of x.

    The weight is rounded to that type, as it is where the head is served, and the result once.
    """
    # Autocast would widen x to float32, and the result with it.
    with torch.autocast(x.device.type, enabled=False):
        return F.rms_norm(x, weight_H.shape, weight_H.to(x.dtype), eps)


def fuse_norms(model: nn.Module) -> None:
    """Let the RMSNorms of a Hugging Face Llama compute :func:`rms_norm`.

    They round twice in half precision, before the weight and after it, so that elements can differ
    in the last bit.
    """
    for module in _llama_norms(model):
        module.forward = partial(_forward, module)


def restore_norms(model: nn.Module) -> None:
    """Undo :func:`fuse_norms`."""
    for module in _llama_norms(model):
        module.__dict__.pop("forward", None)


def _forward(module: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    # The weight at the time of the call: a sharded layer exchanges it.
    return rms_norm(hidden_states, module.weight, module.variance_epsilon)


def _llama_norms(model: nn.Module) -> list[nn.Module]:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    return [module for module in model.modules() if isinstance(module, LlamaRMSNorm)]
