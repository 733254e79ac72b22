"""Training-time test: the draft is trained on its own outputs (EAGLE-3, section 3.2).

With T slots and steps k = 0..K-1, slot t of step k

    takes      token t+1+k and, as hidden state, the fused target features of t (k = 0) or its
               own output of step k-1 at slot t, gradient included,
    at         rotary position t+k,
    attends to the step-0 keys of slots 0..t and its own keys of steps 1..k,
    predicts   token t+2+k: the target's distribution at position t+1+k, restricted to the
               draft vocabulary and renormalised.

    loss_k = - mean over counted slots of sum_v p(v) log q(v),   loss = sum_k decay^k loss_k.

A slot counts where the tokens t+1 (the root a server would draft from) and t+2+k are the
assistant's and the target's most likely token is in the draft vocabulary.

Shape suffixes: B sequences, T slots, K steps, M counted slots, H hidden, F captured
features, V draft vocabulary.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.autograd.function import FunctionCtx, once_differentiable

from vllm_eagle3.train.attention import diagonal_attention
from vllm_eagle3.train.model import Eagle3Head

_CHUNK_ROWS = 4096  # bounds the float32 logits of one chunk: 4096 x V x 4 bytes


@dataclass
class TTTBatch:
    """Documents, right-padded, with what the target says about them.

    Attributes:
        tokens_BT: int64 token ids.
        assistant_BT: bool, tokens that the assistant wrote; False on padding.
        features_BTF: captured states, low, mid, high.
        target_logits_BTV: row p holds the target's logits of token p+1 over the draft
            vocabulary.
        covered_BT: bool, the target's most likely token p+1 is in the draft vocabulary.
    """

    tokens_BT: torch.Tensor
    assistant_BT: torch.Tensor
    features_BTF: torch.Tensor
    target_logits_BTV: torch.Tensor
    covered_BT: torch.Tensor


@dataclass
class TTTResult:
    """Loss with its gradient, and measures without.

    Attributes:
        loss: scalar, sum of decay^k loss_k.
        losses_K: float32, detached.
        accuracy_K: float32, how often the draft's and the target's most likely tokens
            agree, over counted slots.
        accepted_K: float32, how often the drafts of steps 0..k all equal the document:
            1 + sum = tokens for each target forward of a greedy chain of K.
    """

    loss: torch.Tensor
    losses_K: torch.Tensor
    accuracy_K: torch.Tensor
    accepted_K: torch.Tensor


def ttt_loss(
    head: Eagle3Head,
    batch: TTTBatch,
    num_steps: int = 7,
    decay: float = 0.8,
    attention: str = "flash",
) -> TTTResult:
    """The loss of this module's docstring on one batch."""
    num_slots = batch.tokens_BT.shape[1]
    positions_BT = torch.arange(num_slots, device=batch.tokens_BT.device).unsqueeze(0)
    slots = [_counted_slots(batch.assistant_BT, step) for step in range(num_steps)]
    target_logits_PV = batch.target_logits_BTV.flatten(0, 1)
    covered_P, tokens_P = batch.covered_BT.flatten(), batch.tokens_BT.flatten()
    on_track_P = torch.ones_like(covered_P)
    keys: list[torch.Tensor] = []
    values: list[torch.Tensor] = []

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        keys.append(k)
        values.append(v)
        return diagonal_attention(q, keys[0], values[0], keys[1:], values[1:], attention)

    hidden_BTH = head.fuse(batch.features_BTF)
    losses, accuracies, accepted = [], [], []
    for step, slots_M in enumerate(slots):
        tokens_BT = _shift_left(batch.tokens_BT, 1 + step)
        hidden_BTH = head.step(tokens_BT, hidden_BTH, positions_BT + step, attend)
        rows_M = slots_M + 1 + step  # the target's rows, in the same flat order
        covered_M = covered_P[rows_M]
        loss, drafted_M, agree_M = _LinearSoftCrossEntropy.apply(
            # index_select: its backward adds rows, that of [] sorts them first.
            head.norm(hidden_BTH.flatten(0, 1).index_select(0, slots_M)),
            head.lm_head.weight,
            target_logits_PV,
            rows_M,
            covered_M.to(head.lm_head.weight.dtype) / covered_M.sum().clamp(min=1),
        )
        losses.append(loss)
        with torch.no_grad():
            accuracies.append((agree_M & covered_M).sum() / covered_M.sum().clamp(min=1))
            right_P = torch.zeros_like(on_track_P)
            right_P[slots_M] = head.draft_token_ids[drafted_M] == tokens_P[rows_M + 1]
            on_track_P &= right_P
            accepted.append(on_track_P.sum() / max(1, len(slots[0])))
    losses_K = torch.stack(losses)
    weights_K = decay ** torch.arange(num_steps, device=losses_K.device, dtype=losses_K.dtype)
    return TTTResult(
        loss=(losses_K * weights_K).sum(),
        losses_K=losses_K.detach().float(),
        accuracy_K=torch.stack(accuracies).float(),
        accepted_K=torch.stack(accepted).float(),
    )


def _counted_slots(assistant_BT: torch.Tensor, step: int) -> torch.Tensor:
    """Flat indices of the slots whose root and whose predicted token are the assistant's."""
    root_BT = _shift_left(assistant_BT, 1)
    return (root_BT & _shift_left(assistant_BT, 2 + step)).flatten().nonzero().squeeze(1)


def _shift_left(x_BT: torch.Tensor, by: int) -> torch.Tensor:
    """x[:, t] <- x[:, t + by]; zeros (False) where a document ends."""
    return F.pad(x_BT[:, by:], (0, min(by, x_BT.shape[1])))


class _LinearSoftCrossEntropy(torch.autograd.Function):
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
        for start in range(0, len(rows_M), _CHUNK_ROWS):
            part = slice(start, start + _CHUNK_ROWS)
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
