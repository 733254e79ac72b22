"""Cross-entropy against the target's distribution, without an M x V tensor that lasts.

Shape suffixes: M counted slots, P rows of the target, H hidden, V draft vocabulary.
"""

import torch
from torch.autograd.function import FunctionCtx, once_differentiable

CHUNK_ROWS = 4096  # bounds the float32 logits of one chunk: 4096 x V x 4 bytes


class LinearSoftCrossEntropy(torch.autograd.Function):
    """sum_m weight_m * -sum_v p_mv log softmax(x_m W^T)_v, in chunks of rows.

    p = softmax of the target's row. The gradient of a chunk, (q - p) * weight, is turned at
    once into gradients of x and W, so no M x V tensor outlives its chunk.
    Also returns the argmax of q, and whether it is the argmax of p.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x_MH, weight_VH, target_PV, rows_M, weights_M):
        accurate = torch.promote_types(x_MH.dtype, torch.float32)
        matrix_VH = weight_VH.to(x_MH.dtype)
        loss = torch.zeros((), dtype=accurate, device=x_MH.device)
        grad_x_MH = torch.empty_like(x_MH)
        grad_w_VH = torch.zeros_like(weight_VH, dtype=accurate)
        drafted_M = torch.empty_like(rows_M)
        agree_M = torch.empty_like(rows_M, dtype=torch.bool)
        for start in range(0, len(rows_M), CHUNK_ROWS):
            part = slice(start, start + CHUNK_ROWS)
            x, target = x_MH[part], target_PV[rows_M[part]]
            weights = weights_M[part].to(accurate)
            logits = x @ matrix_VH.T
            drafted_M[part] = logits.argmax(-1)
            agree_M[part] = drafted_M[part] == target.argmax(-1)
            p = target.to(accurate).softmax(-1)
            log_q = logits.to(accurate).log_softmax(-1)
            # Not a dot product, which autocast would round to bfloat16.
            loss -= (weights * (p * log_q).sum(-1)).sum()
            grad = (log_q.exp_().sub_(p) * weights.unsqueeze(-1)).to(x.dtype)
            grad_x_MH[part] = grad @ matrix_VH
            grad_w_VH += grad.T @ x
        ctx.save_for_backward(grad_x_MH, grad_w_VH.to(weight_VH.dtype))
        ctx.mark_non_differentiable(drafted_M, agree_M)
        return loss, drafted_M, agree_M

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, _drafted, _agree):
        grad_x_MH, grad_w_VH = ctx.saved_tensors
        return (grad_x_MH * grad_loss).to(grad_x_MH.dtype), grad_w_VH * grad_loss, None, None, None
