"""Cross-entropy against the target's distribution, without an M x V tensor that lasts.

The gradient of a chunk of rows is turned at once into gradients of its inputs, in the
forward pass: no tensor of all rows times the vocabulary is ever held.

Shape suffixes: M counted slots, P rows of the target, H hidden, V vocabulary.
"""

from collections.abc import Iterator

import torch
from torch.autograd.function import FunctionCtx, once_differentiable

from vllm_eagle3.ops import fuses_cross_entropy, soft_cross_entropy

_CHUNK_ELEMENTS = 1 << 25  # of one chunk's logits, of which torch makes some four float32 copies
_FUSED_CHUNK_ELEMENTS = 1 << 27  # where a kernel makes none: fewer chunks, fewer sums into W
_TILE_ROWS = 128  # of a matrix product on a GPU


def chunks(x_MH: torch.Tensor, target_dtype: torch.dtype, vocab_size: int) -> Iterator[slice]:
    """The rows in parts that bound their logits."""
    fused = fuses_cross_entropy(x_MH.device, x_MH.dtype, target_dtype)
    rows = max(1, (_FUSED_CHUNK_ELEMENTS if fused else _CHUNK_ELEMENTS) // vocab_size)
    if rows > _TILE_ROWS:
        rows -= rows % _TILE_ROWS
    return (slice(start, start + rows) for start in range(0, len(x_MH), rows))


class LinearSoftCrossEntropy(torch.autograd.Function):
    """sum_m weight_m * -sum_v p_mv log softmax(x_m W^T)_v, with gradients of x and W.

    p = softmax of the target's row. The gradient of the logits is (q - p) * weight; the work for
    an input that needs none is left out. Without gradients give a W that needs none: torch asks
    the tensor, not the mode.
    Also returns, without gradient, each row's own cross-entropy, the argmax of q, and whether
    it is the argmax of p.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x_MH, weight_VH, target_PV, rows_M, weights_M):
        accurate = torch.promote_types(x_MH.dtype, torch.float32)
        matrix_VH, weights_M = weight_VH.to(x_MH.dtype), weights_M.to(accurate)
        of_x, of_w = ctx.needs_input_grad[:2]
        grad_x_MH = torch.empty_like(x_MH) if of_x else None
        grad_w_VH = torch.zeros_like(weight_VH, dtype=accurate) if of_w else None
        losses_M = torch.empty_like(weights_M)
        drafted_M = torch.empty_like(rows_M)
        agree_M = torch.empty_like(rows_M, dtype=torch.bool)
        for part in chunks(x_MH, target_PV.dtype, len(weight_VH)):
            logits = x_MH[part] @ matrix_VH.T
            rows = soft_cross_entropy(
                logits, target_PV, rows_M[part], weights_M[part], with_gradient=of_x or of_w
            )
            losses_M[part], _, drafted_M[part], agree_M[part] = rows
            # The logits are their own gradient by now.
            if of_x:
                grad_x_MH[part] = logits @ matrix_VH
            if of_w:
                grad_w_VH += logits.T @ x_MH[part]
        ctx.save_for_backward(grad_x_MH, grad_w_VH.to(weight_VH.dtype) if of_w else None)
        ctx.mark_non_differentiable(losses_M, drafted_M, agree_M)
        return (weights_M * losses_M).sum(), losses_M, drafted_M, agree_M

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, _losses, _drafted, _agree):
        grad_x_MH, grad_w_VH = ctx.saved_tensors
        if grad_x_MH is not None:
            grad_x_MH = (grad_x_MH * grad_loss).to(grad_x_MH.dtype)
        if grad_w_VH is not None:
            grad_w_VH = grad_w_VH * grad_loss
        return grad_x_MH, grad_w_VH, None, None, None


class SharedHeadCrossEntropy(torch.autograd.Function):
    """Mean over rows m of two cross-entropies of p = softmax(f_m W^T), q = softmax(x_m W^T).

        tokens = -sum_v p_v log q_v                      gradient of the logits: q - p
        top_k  = -sum_(v among the K likeliest of p) p_v log q_v     (sum p) q - p, p as masked
        loss   = token_weight tokens + top_weight top_k

    The matrix W is the target's, frozen: only x gets a gradient. ``num_top`` = 0 leaves the
    second out (it is then 0). Also returns, without gradient, the means of both terms, the argmax
    of q, and whether it is that of p.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x_MH,
        features_MH,
        weight_VH,
        token_weight: float,
        top_weight: float,
        num_top: int,
    ):
        accurate = torch.promote_types(x_MH.dtype, torch.float32)
        matrix_VH, num_rows = weight_VH.to(x_MH.dtype), len(x_MH)
        of_x, num_top = ctx.needs_input_grad[0], min(num_top, len(weight_VH))
        grad_x_MH = torch.empty_like(x_MH) if of_x else None
        losses_2M = x_MH.new_zeros(2, num_rows, dtype=accurate)
        drafted_M = x_MH.new_empty(num_rows, dtype=torch.int64)
        agree_M = x_MH.new_empty(num_rows, dtype=torch.bool)
        for part in chunks(x_MH, x_MH.dtype, len(weight_VH)):
            logits = x_MH[part] @ matrix_VH.T
            target = features_MH[part].to(x_MH.dtype) @ matrix_VH.T
            each = torch.arange(len(target), device=target.device)
            weights = losses_2M.new_full((len(target),), token_weight)
            top = ()
            if num_top:
                likeliest = target.topk(num_top, -1, sorted=False).indices
                top = likeliest, torch.full_like(weights, top_weight)
            rows = soft_cross_entropy(logits, target, each, weights, *top, with_gradient=of_x)
            losses_2M[0, part], top_losses_M, drafted_M[part], agree_M[part] = rows
            if num_top:
                losses_2M[1, part] = top_losses_M
            if of_x:
                grad_x_MH[part] = logits @ matrix_VH
        ctx.save_for_backward(grad_x_MH)
        ctx.num_rows = max(1, num_rows)
        tokens, top_k = losses_2M.sum(-1) / ctx.num_rows
        ctx.mark_non_differentiable(tokens, top_k, drafted_M, agree_M)
        return token_weight * tokens + top_weight * top_k, tokens, top_k, drafted_M, agree_M

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, *_unused):
        (grad_x_MH,) = ctx.saved_tensors
        grad = (grad_x_MH * (grad_loss / ctx.num_rows)).to(grad_x_MH.dtype)
        return grad, None, None, None, None, None
