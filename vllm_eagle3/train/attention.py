"""Attention of the training-time test: causal over step 0, plus the own slot's later steps.

At TTT step k the query of slot t sees the step-0 keys of slots 0..t and one key of each
step 1..k at slot t itself (EAGLE-3, arXiv 2503.01840, section 3.2). Nothing of size
(kT)^2 is needed: the causal part runs through a flash kernel and the k diagonal scores join
it through the log-sum-exp.

Shape suffixes: B sequences, T slots, N query heads, J diagonal steps, D head dimension.
"""

import math
from collections.abc import Sequence

import torch
from torch.autograd.function import FunctionCtx, once_differentiable

from vllm_eagle3.ops import add_diagonal, diagonal_gradients

Tensors = Sequence[torch.Tensor]


def diagonal_attention(
    q_BNTD: torch.Tensor,
    k_BNTD: torch.Tensor,
    v_BNTD: torch.Tensor,
    diagonal_k: Tensors,
    diagonal_v: Tensors,
    impl: str = "flash",
) -> torch.Tensor:
    """Attend to keys 0..t of step 0 and to the same slot's keys of the later steps.

    Args:
        q_BNTD: queries of the current step, rotated.
        k_BNTD, v_BNTD: keys and values of step 0, repeated to the query heads.
        diagonal_k, diagonal_v: those of steps 1..k, each BNTD; empty at step 0.
        impl: ``"flash"`` (memory linear in T) or ``"math"`` (explicit scores, the reference).

    Returns:
        BNTD, in the dtype of the queries.
    """
    if impl == "math":
        return _explicit(q_BNTD, k_BNTD, v_BNTD, diagonal_k, diagonal_v)
    if impl != "flash":
        raise ValueError(f"attention impl={impl!r}: use 'flash' or 'math'")
    return _FlashPlusDiagonal.apply(q_BNTD, k_BNTD, v_BNTD, *diagonal_k, *diagonal_v)


def avoid_plans() -> None:
    """Switch cuDNN's attention off, for the whole process.

    torch prefers it on Hopper and later, but it plans anew, on the host, for every shape it has
    not seen, and packed batches hardly repeat one. The flash kernel plans nothing.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


def check_flash(head_dim: int, capability: tuple[int, int]) -> None:
    """Refuse what CUDA's flash kernel, called without SDPA's checks and padding, cannot take.

    Args:
        head_dim: of the head to be trained, in float16 or bfloat16.
        capability: CUDA compute capability, as of ``torch.cuda.get_device_capability``.

    Raises:
        ValueError: another ``--attention`` is needed.
    """
    # Its backward needs more shared memory than these have.
    small = capability in ((8, 6), (8, 9)) or capability >= (12, 0)
    longest = 192 if small else 256
    has = f"{capability[0]}.{capability[1]}"
    if capability < (8, 0):
        problem = f"needs compute capability 8.0, this GPU has {has}"
    elif head_dim % 8 or head_dim > longest:
        problem = f"takes head_dim in multiples of 8 up to {longest} on this GPU, not {head_dim}"
    else:
        return
    raise ValueError(f"attention='flash' {problem}: give --attention math")


def _explicit(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, diagonal_k: Tensors, diagonal_v: Tensors
) -> torch.Tensor:
    scale = 1.0 / math.sqrt(q.shape[-1])
    future = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool, device=q.device).triu(1)
    scores = [(q @ k.transpose(-1, -2) * scale).masked_fill(future, -math.inf)]
    accurate = torch.promote_types(q.dtype, torch.float32)
    scores += [(q * key).sum(-1, True, dtype=accurate) * scale for key in diagonal_k]
    weights = torch.cat(scores, -1).to(accurate).softmax(-1).to(q.dtype)
    causal, *diagonal = weights.split([q.shape[-2]] + [1] * len(diagonal_k), -1)
    out = causal @ v
    for weight, value in zip(diagonal, diagonal_v, strict=True):
        out = out + weight * value
    return out


class _FlashPlusDiagonal(torch.autograd.Function):
    """Flash attention and J diagonal scores under one softmax.

    Forward: with L0 the flash kernel's log-sum-exp and s_j the diagonal scores,
    L = log(e^L0 + sum_j e^s_j) and O = e^(L0-L) O0 + sum_j e^(s_j-L) v_j.

    Backward: a flash kernel rebuilds its probabilities as e^(S-L) and subtracts
    rowsum(dO * O). Given the *joint* L and O in place of its own, it therefore returns the
    exact gradients of the joint softmax with respect to q (causal part), k and v.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, q, k, v, *diagonal):
        num_steps = len(diagonal) // 2
        q, k, v = map(_in_layout, (q, k, v))
        out, lse, extra = _flash(q, k, v)
        out, lse = add_diagonal(q, out, lse, diagonal[:num_steps], diagonal[num_steps:])
        ctx.save_for_backward(q, k, v, out, lse, *diagonal)
        ctx.extra, ctx.num_steps = extra, num_steps
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        q, k, v, out, lse, *diagonal = ctx.saved_tensors
        keys, values = diagonal[: ctx.num_steps], diagonal[ctx.num_steps :]
        grad = _in_layout(grad)
        grad_q, grad_k, grad_v = _flash_backward(grad, q, k, v, out, lse, ctx.extra)
        grad_q, grad_keys, grad_values = diagonal_gradients(grad, q, out, lse, keys, values, grad_q)
        return grad_q, grad_k, grad_v, *grad_keys, *grad_values


def _in_layout(x_BNTD: torch.Tensor) -> torch.Tensor:
    """A view of BTND, the flash kernels' own layout; copied only where it is none."""
    return x_BNTD.transpose(1, 2).contiguous().transpose(1, 2)


def _flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple:
    """Causal attention: output BNTD, log-sum-exp BNT, what the backward needs besides."""
    if q.device.type == "cuda":
        out, lse, *extra = torch.ops.aten._scaled_dot_product_flash_attention(
            q, k, v, dropout_p=0.0, is_causal=True
        )
        return out, lse, tuple(extra[:-1])
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, dropout_p=0.0, is_causal=True
    )
    return out, lse, ()


def _flash_backward(grad, q, k, v, out, lse, extra) -> tuple:
    lse = lse.contiguous()
    if q.device.type == "cuda":
        cum_seq_q, cum_seq_k, max_q, max_k, seed, offset = extra
        return torch.ops.aten._scaled_dot_product_flash_attention_backward(
            grad, q, k, v, out, lse, cum_seq_q, cum_seq_k, max_q, max_k, 0.0, True, seed, offset
        )
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, q, k, v, out, lse, 0.0, True
    )
