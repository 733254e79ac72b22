"""Cross-entropy against the target's distribution, with its gradient: what heads are trained by."""

from typing import NamedTuple

import torch

from vllm_eagle3.ops.dispatch import (
    Impl,
    check,
    check_matrix,
    check_rows,
    check_same_device,
    check_vector,
    runs_triton,
)

_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class SoftCrossEntropy(NamedTuple):
    """Of each row.

    Attributes:
        losses_M: -sum_v p_v log q_v; float32, or float64 of float64 logits.
        top_losses_M: the same sum over the row's top tokens alone; None where none are given.
        drafted_M: int64 argmax of q; of equal ones the first.
        agree_M: bool, whether that is the argmax of p, the first as well.
    """

    losses_M: torch.Tensor
    top_losses_M: torch.Tensor | None
    drafted_M: torch.Tensor
    agree_M: torch.Tensor


def soft_cross_entropy(
    logits_MV: torch.Tensor,
    target_PV: torch.Tensor,
    rows_M: torch.Tensor,
    weights_M: torch.Tensor,
    top_MK: torch.Tensor | None = None,
    top_weights_M: torch.Tensor | None = None,
    *,
    with_gradient: bool,
    impl: Impl = "auto",
) -> SoftCrossEntropy:
    """Cross-entropies of q = softmax(logits_m) against p = softmax(target_(rows_m)).

    With them the gradient of sum_m (weights_m losses_m + top_weights_m top_losses_m), which
    **takes the place of the logits**, rounded to their type once:

        weight (q - p)  +  top_weight (q sum_(v in top) p_v  -  p, where v is in top)

    Sums are in float32. Equal inputs give equal outputs on one device. A token of target logit
    -inf counts for nothing; a row that holds NaN or +inf has a loss that is not finite.

    Args:
        logits_MV: the draft's; float, contiguous rows. Left alone without ``with_gradient``.
        target_PV: the target's; float, contiguous rows.
        rows_M: int32 or int64, the target's row for each of the draft's.
        weights_M: float32 (float64 of float64 logits); not read without ``with_gradient``.
        top_MK: int64, contiguous: K different tokens of each row; None for no such term.
        top_weights_M: as ``weights_M``; where ``top_MK`` is given.
        with_gradient: whether to write it.

    Raises:
        ValueError: a tensor of another type, layout, size or device.
    """
    num_rows, vocab_size = logits_MV.shape
    accurate = torch.promote_types(logits_MV.dtype, torch.float32)
    check_rows("logits_MV", logits_MV, vocab_size, *_FLOATS)
    check_rows("target_PV", target_PV, vocab_size, *_FLOATS)
    check_vector("rows_M", rows_M, num_rows, torch.int32, torch.int64)
    check_vector("weights_M", weights_M, num_rows, accurate)
    check_same_device(logits_MV=logits_MV, target_PV=target_PV, rows_M=rows_M, weights_M=weights_M)
    check(
        (top_MK is None) == (top_weights_M is None),
        "give top_MK and top_weights_M together, or neither",
    )
    if top_MK is not None:
        check_matrix("top_MK", top_MK, torch.int64)
        check(
            len(top_MK) == num_rows and 1 <= top_MK.shape[1] <= vocab_size,
            f"top_MK must name 1 to {vocab_size} tokens for each of {num_rows} rows, got shape "
            f"{tuple(top_MK.shape)}",
        )
        check_vector("top_weights_M", top_weights_M, num_rows, accurate)
        check_same_device(logits_MV=logits_MV, top_MK=top_MK, top_weights_M=top_weights_M)
    arguments = logits_MV, target_PV, rows_M, weights_M, top_MK, top_weights_M
    if not fuses_cross_entropy(logits_MV.device, logits_MV.dtype, target_PV.dtype, impl=impl):
        return _soft_cross_entropy_torch(*arguments, with_gradient)
    from vllm_eagle3.ops.kernels.soft_cross_entropy import launch

    result = SoftCrossEntropy(
        weights_M.new_empty(num_rows),
        None if top_MK is None else weights_M.new_empty(num_rows),
        rows_M.new_empty(num_rows, dtype=torch.int64),
        rows_M.new_empty(num_rows, dtype=torch.bool),
    )
    launch(*arguments, *result, with_gradient)
    return result


def fuses_cross_entropy(device: torch.device, *dtypes: torch.dtype, impl: Impl = "auto") -> bool:
    """Whether one kernel does it all, without memory of its own.

    The torch version takes some sixteen bytes for each logit beside the two matrices.

    Args:
        dtypes: of the draft's and the target's logits.

    Raises:
        ValueError: ``impl="triton"`` cannot run here, or not on these types.
    """
    return runs_triton(impl, device, *dtypes)


def _soft_cross_entropy_torch(
    logits_MV: torch.Tensor,
    target_PV: torch.Tensor,
    rows_M: torch.Tensor,
    weights_M: torch.Tensor,
    top_MK: torch.Tensor | None,
    top_weights_M: torch.Tensor | None,
    with_gradient: bool,
) -> SoftCrossEntropy:
    accurate = torch.promote_types(logits_MV.dtype, torch.float32)
    target_MV = target_PV[rows_M]
    drafted_M = logits_MV.argmax(-1)
    agree_M = drafted_M == target_MV.argmax(-1)
    p_MV = target_MV.to(accurate).softmax(-1)
    log_q_MV = logits_MV.to(accurate).log_softmax(-1)
    # Not a dot product, which autocast would round to bfloat16.
    losses_M = -(p_MV * log_q_MV).sum(-1)
    top_losses_M, q_weights_M = None, weights_M
    if top_MK is not None:
        p_MK = p_MV.gather(-1, top_MK)
        top_losses_M = -(p_MK * log_q_MV.gather(-1, top_MK)).sum(-1)
        q_weights_M = weights_M + top_weights_M * p_MK.sum(-1)
    if with_gradient:
        grad_MV = log_q_MV.exp_().mul_(q_weights_M.unsqueeze(-1))
        grad_MV.sub_(p_MV.mul_(weights_M.unsqueeze(-1)))
        if top_MK is not None:
            grad_MV.scatter_add_(-1, top_MK, p_MK * -top_weights_M.unsqueeze(-1))
        logits_MV.copy_(grad_MV)
    return SoftCrossEntropy(losses_M, top_losses_M, drafted_M, agree_M)
