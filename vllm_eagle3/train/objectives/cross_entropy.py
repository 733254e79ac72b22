"""Cross-entropy against the target's distribution, without an M x V tensor that lasts.

The gradient of a chunk of rows is turned at once into gradients of its inputs, in the
forward pass: no tensor of all rows times the vocabulary is ever held.

Shape suffixes: M counted slots, P rows of the target, H hidden, V vocabulary.
"""

from collections.abc import Iterator

import torch
from torch.autograd.function import FunctionCtx, once_differentiable

_CHUNK_ELEMENTS = 1 << 25  # of one chunk's float32 logits, of which some four copies exist


def chunks(num_rows: int, vocab_size: int) -> Iterator[slice]:
    """The rows in parts that bound their logits."""
    rows = max(1, _CHUNK_ELEMENTS // vocab_size)
    return (slice(start, start + rows) for start in range(0, num_rows, rows))


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
        matrix_VH = weight_VH.to(x_MH.dtype)
        loss = torch.zeros((), dtype=accurate, device=x_MH.device)
        of_x, of_w = ctx.needs_input_grad[:2]
        grad_x_MH = torch.empty_like(x_MH) if of_x else None
        grad_w_VH = torch.zeros_like(weight_VH, dtype=accurate) if of_w else None
        losses_M = torch.empty(len(rows_M), dtype=accurate, device=x_MH.device)
        drafted_M = torch.empty_like(rows_M)
        agree_M = torch.empty_like(rows_M, dtype=torch.bool)
        for part in chunks(len(rows_M), len(weight_VH)):
            x, target = x_MH[part], target_PV[rows_M[part]]
            weights = weights_M[part].to(accurate)
            logits = x @ matrix_VH.T
            drafted_M[part] = logits.argmax(-1)
            agree_M[part] = drafted_M[part] == target.argmax(-1)
            p = target.to(accurate).softmax(-1)
            log_q = logits.to(accurate).log_softmax(-1)
            # Not a dot product, which autocast would round to bfloat16.
            losses_M[part] = -(p * log_q).sum(-1)
            loss += (weights * losses_M[part]).sum()
            if not (of_x or of_w):
                continue
            # Rounded as it is written; the weights go to the side that is H wide.
            grad = torch.sub(log_q.exp_(), p, out=torch.empty_like(logits))
            if of_x:
                grad_x_MH[part] = (grad @ matrix_VH) * weights.unsqueeze(-1)
            if of_w:
                grad_w_VH += grad.T @ (x * weights.unsqueeze(-1)).to(x.dtype)
        ctx.save_for_backward(grad_x_MH, grad_w_VH.to(weight_VH.dtype) if of_w else None)
        ctx.mark_non_differentiable(losses_M, drafted_M, agree_M)
        return loss, losses_M, drafted_M, agree_M

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
    """Means over rows m of two cross-entropies of p = softmax(f_m W^T), q = softmax(x_m W^T).

        tokens = -sum_v p_v log q_v                      gradient of the logits: q - p
        top_k  = -sum_(v among the K likeliest of p) p_v log q_v     (sum p) q - p, p as masked

    The matrix W is the target's, frozen: only x gets a gradient. ``num_top`` = 0 leaves the
    second out (it is then 0). Also returns the argmax of q, and whether it is that of p.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x_MH, features_MH, weight_VH, num_top: int):
        accurate = torch.promote_types(x_MH.dtype, torch.float32)
        matrix_VH, num_rows = weight_VH.to(x_MH.dtype), len(x_MH)
        losses = torch.zeros(2, dtype=accurate, device=x_MH.device)
        of_x = ctx.needs_input_grad[0]
        num_terms = (2 if num_top else 1) if of_x else 0
        grads = torch.zeros((num_terms, *x_MH.shape), dtype=x_MH.dtype, device=x_MH.device)
        drafted_M = x_MH.new_empty(num_rows, dtype=torch.int64)
        agree_M = x_MH.new_empty(num_rows, dtype=torch.bool)
        for part in chunks(num_rows, len(weight_VH)):
            logits = x_MH[part] @ matrix_VH.T
            target = features_MH[part].to(x_MH.dtype) @ matrix_VH.T
            drafted_M[part] = logits.argmax(-1)
            agree_M[part] = drafted_M[part] == target.argmax(-1)
            p = target.to(accurate).softmax(-1)
            log_q = logits.to(accurate).log_softmax(-1)
            losses[0] -= (p * log_q).sum()
            if of_x:
                q = log_q.exp()
                grads[0, part] = (q - p).to(x_MH.dtype) @ matrix_VH
            if num_top:
                best = p.topk(min(num_top, p.shape[-1]), -1)
                losses[1] -= (best.values * log_q.gather(-1, best.indices)).sum()
            if num_top and of_x:
                grad = q * best.values.sum(-1, keepdim=True)
                grad.scatter_add_(-1, best.indices, -best.values)
                grads[1, part] = grad.to(x_MH.dtype) @ matrix_VH
        ctx.save_for_backward(*grads.div_(max(1, num_rows)))
        ctx.mark_non_differentiable(drafted_M, agree_M)
        losses /= max(1, num_rows)
        return losses[0], losses[1], drafted_M, agree_M

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_tokens, grad_top, _drafted, _agree):
        of_tokens, *of_top = ctx.saved_tensors
        grad = of_tokens * grad_tokens
        for of_top_k in of_top:
            grad = grad + of_top_k * grad_top
        return grad.to(of_tokens.dtype), None, None, None
