"""See :func:`vllm_eagle3.ops.soft_cross_entropy`.

One program reads its row twice: for maxima, sums and the loss, then for the gradient. The second
time the row comes out of a cache.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

_LONG_ROW = 16384  # columns; more warps share a longer one, so that fewer rows crowd the caches
_LOWEST = tl.constexpr(-3.4028234663852886e38)  # finite: of two infinities there is no difference


@triton.jit
def _soft_cross_entropy_kernel(
    logits_ptr,  # [M, V], read; with WITH_GRADIENT written
    target_ptr,  # [P, V]
    rows_ptr,  # [M]
    weights_ptr,  # [M]
    top_ptr,  # [M, K]
    top_weights_ptr,  # [M]
    losses_ptr,  # [M]
    top_losses_ptr,  # [M]
    drafted_ptr,  # [M]
    agree_ptr,  # [M]
    logits_stride,
    target_stride,
    vocab_size,
    num_top,
    WITH_GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,  # 0 without a top-K term
):
    slot = tl.program_id(0).to(tl.int64)
    logits_ptr += slot * logits_stride
    target_ptr += tl.load(rows_ptr + slot).to(tl.int64) * target_stride
    lane = tl.arange(0, BLOCK)

    # Of each lane, every BLOCK-th column: the largest logit and its first column, the sum of
    # exp(logit - largest), and with the target's exponentials the sum of e_t (x - largest x).
    x_peak = tl.full([BLOCK], _LOWEST, tl.float32)
    t_peak = tl.full([BLOCK], _LOWEST, tl.float32)
    x_first = tl.zeros([BLOCK], tl.int32)
    t_first = tl.zeros([BLOCK], tl.int32)
    x_sum = tl.zeros([BLOCK], tl.float32)
    t_sum = tl.zeros([BLOCK], tl.float32)
    cross = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocab_size, BLOCK):
        column = start + lane
        inside = column < vocab_size
        x = tl.load(logits_ptr + column, mask=inside, other=float("-inf")).to(tl.float32)
        t = tl.load(target_ptr + column, mask=inside, other=float("-inf")).to(tl.float32)
        # One exponential is either the new term or what the old ones shrink by.
        x_rises = x > x_peak
        x_exp = tl.exp(-tl.abs(x - x_peak))
        x_sum = tl.where(x_rises, x_sum * x_exp + 1.0, x_sum + x_exp)
        x_first = tl.where(x_rises, column, x_first)
        higher = tl.where(x_rises, x, x_peak)
        cross += t_sum * (x_peak - higher)
        x_peak = higher
        t_rises = t > t_peak
        t_exp = tl.exp(-tl.abs(t - t_peak))
        shrink = tl.where(t_rises, t_exp, 1.0)
        term = tl.where(t_rises, 1.0, t_exp)
        t_sum = t_sum * shrink + term
        # No share of a token that the target rules out, however impossible to the draft.
        cross = cross * shrink + term * tl.where(term != 0.0, x - x_peak, 0.0)
        t_first = tl.where(t_rises, column, t_first)
        t_peak = tl.where(t_rises, t, t_peak)

    x_max = tl.max(x_peak, 0)
    t_max = tl.max(t_peak, 0)
    # Lanes past a short row stay at the lowest, and at 0 of everything else.
    x_total = tl.sum(x_sum * tl.exp(x_peak - x_max), 0)
    t_share = tl.exp(t_peak - t_max)
    t_total = tl.sum(t_sum * t_share, 0)
    cross_total = tl.sum((cross + t_sum * (x_peak - x_max)) * t_share, 0)
    drafted = tl.min(tl.where(x_peak == x_max, x_first, vocab_size), 0)
    expected = tl.min(tl.where(t_peak == t_max, t_first, vocab_size), 0)
    log_total = tl.log(x_total)
    tl.store(losses_ptr + slot, log_total - cross_total / t_total)
    tl.store(drafted_ptr + slot, drafted.to(tl.int64))
    tl.store(agree_ptr + slot, drafted == expected)

    # The gradient is x_scale exp(x - x_max) - t_scale exp(t - t_max).
    weight = tl.load(weights_ptr + slot)
    x_scale = weight / x_total
    t_scale = weight / t_total
    if BLOCK_K > 0:
        k = tl.arange(0, BLOCK_K)
        in_top = k < num_top
        top = tl.load(top_ptr + slot * num_top + k, mask=in_top, other=0)
        x_top = tl.load(logits_ptr + top, mask=in_top, other=0.0).to(tl.float32) - x_max
        t_top = tl.load(target_ptr + top, mask=in_top, other=0.0).to(tl.float32) - t_max
        p_top = tl.where(in_top, tl.exp(t_top) / t_total, 0.0)
        terms = p_top * tl.where(p_top != 0.0, log_total - x_top, 0.0)
        tl.store(top_losses_ptr + slot, tl.sum(terms, 0))
        top_weight = tl.load(top_weights_ptr + slot)
        x_scale += top_weight * tl.sum(p_top, 0) / x_total
    if WITH_GRADIENT:
        # Every warp has read the logits of the top before any writes over them.
        tl.debug_barrier()
        for start in range(0, vocab_size, BLOCK):
            column = start + lane
            inside = column < vocab_size
            x = tl.load(logits_ptr + column, mask=inside, other=0.0).to(tl.float32)
            t = tl.load(target_ptr + column, mask=inside, other=0.0).to(tl.float32)
            gradient = x_scale * tl.exp(x - x_max) - t_scale * tl.exp(t - t_max)
            tl.store(logits_ptr + column, gradient.to(logits_ptr.dtype.element_ty), mask=inside)
        if BLOCK_K > 0:
            tl.debug_barrier()
            gradient = x_scale * tl.exp(x_top) - t_scale * tl.exp(t_top) - top_weight * p_top
            tl.store(logits_ptr + top, gradient.to(logits_ptr.dtype.element_ty), mask=in_top)


class Sizes(NamedTuple):
    """Columns of a step, and the warps that share them."""

    block: int
    num_warps: int


def sizes(vocab_size: int) -> Sizes:
    """Four columns for each thread: with eight, registers leave room for half as many warps."""
    longest = 2048 if vocab_size > _LONG_ROW else 1024
    block = min(longest, max(128, triton.next_power_of_2(vocab_size)))
    return Sizes(block, block // 128)


def launch(
    logits_MV: torch.Tensor,
    target_PV: torch.Tensor,
    rows_M: torch.Tensor,
    weights_M: torch.Tensor,
    top_MK: torch.Tensor | None,
    top_weights_M: torch.Tensor | None,
    losses_M: torch.Tensor,
    top_losses_M: torch.Tensor | None,
    drafted_M: torch.Tensor,
    agree_M: torch.Tensor,
    with_gradient: bool,
) -> None:
    """One program for each row."""
    num_rows, vocab_size = logits_MV.shape
    if num_rows == 0:
        return
    num_top = 0 if top_MK is None else top_MK.shape[1]
    block, num_warps = sizes(vocab_size)
    _soft_cross_entropy_kernel[(num_rows,)](
        logits_MV,
        target_PV,
        rows_M,
        weights_M,
        top_MK,
        top_weights_M,
        losses_M,
        top_losses_M,
        drafted_M,
        agree_M,
        logits_MV.stride(0),
        target_PV.stride(0),
        vocab_size,
        num_top,
        WITH_GRADIENT=with_gradient,
        BLOCK=block,
        BLOCK_K=triton.next_power_of_2(num_top) if num_top else 0,
        num_warps=num_warps,
    )
