"""See :mod:`vllm_eagle3.ops.diagonal_attention`.

A row is one head of one slot; it meets one key of each later draft step, so nothing is shared
between rows, and every tensor is read once.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

_ELEMENTS = 2048  # of a program's tile, 16 for each thread of four warps
# Sizes of packed batches hardly repeat: no variant of a kernel for those that 16 divides.
_VARYING = ("num_rows", "num_slots", "num_heads")


@triton.jit
def _lse_index(row, num_slots, num_heads):
    """Of row (b T + t) N + n in a matrix [B, N, T]."""
    slot = row // num_heads
    return ((slot // num_slots) * num_heads + row % num_heads) * num_slots + slot % num_slots


@triton.jit(do_not_specialize=_VARYING)
def _add_diagonal_kernel(
    query_ptr,  # [R, D], R = B T N
    out_ptr,  # [R, D], overwritten
    lse_ptr,  # [B, N, T], overwritten
    key_ptrs,  # of each step [R, D]
    value_ptrs,
    scale,
    num_rows,
    num_slots,
    num_heads,
    HEAD_DIM: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    dim = tl.arange(0, BLOCK_D)
    at = row[:, None] * HEAD_DIM + dim[None, :]
    in_rows = row < num_rows
    inside = in_rows[:, None] & (dim < HEAD_DIM)[None, :]
    query = tl.load(query_ptr + at, mask=inside, other=0.0).to(tl.float32)
    out = tl.load(out_ptr + at, mask=inside, other=0.0).to(tl.float32)
    lse_at = lse_ptr + _lse_index(row, num_slots, num_heads)
    lse = tl.load(lse_at, mask=in_rows, other=0.0)
    for j in tl.static_range(len(key_ptrs)):
        key = tl.load(key_ptrs[j] + at, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(value_ptrs[j] + at, mask=inside, other=0.0).to(tl.float32)
        score = tl.sum(query * key, 1) * scale
        joint = tl.maximum(lse, score) + tl.log(1.0 + tl.exp(-tl.abs(lse - score)))
        out = out * tl.exp(lse - joint)[:, None] + value * tl.exp(score - joint)[:, None]
        lse = joint
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(lse_at, lse, mask=in_rows)


@triton.jit(do_not_specialize=_VARYING)
def _diagonal_gradients_kernel(
    grad_ptr,  # [R, D]
    query_ptr,  # [R, D]
    out_ptr,  # [R, D]
    lse_ptr,  # [B, N, T]
    key_ptrs,  # of each step [R, D]
    value_ptrs,
    query_grad_ptr,  # [R, D], added to
    key_grad_ptrs,  # of each step [R, D], written
    value_grad_ptrs,
    scale,
    num_rows,
    num_slots,
    num_heads,
    HEAD_DIM: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    dim = tl.arange(0, BLOCK_D)
    at = row[:, None] * HEAD_DIM + dim[None, :]
    in_rows = row < num_rows
    inside = in_rows[:, None] & (dim < HEAD_DIM)[None, :]
    grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
    query = tl.load(query_ptr + at, mask=inside, other=0.0).to(tl.float32)
    out = tl.load(out_ptr + at, mask=inside, other=0.0).to(tl.float32)
    query_grad = tl.load(query_grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
    lse = tl.load(lse_ptr + _lse_index(row, num_slots, num_heads), mask=in_rows, other=0.0)
    delta = tl.sum(grad * out, 1)
    for j in tl.static_range(len(key_ptrs)):
        key = tl.load(key_ptrs[j] + at, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(value_ptrs[j] + at, mask=inside, other=0.0).to(tl.float32)
        weight = tl.exp(tl.sum(query * key, 1) * scale - lse)
        score_grad = (weight * (tl.sum(grad * value, 1) - delta) * scale)[:, None]
        query_grad += score_grad * key
        key_grad = (score_grad * query).to(key_grad_ptrs[j].dtype.element_ty)
        tl.store(key_grad_ptrs[j] + at, key_grad, mask=inside)
        value_grad = (weight[:, None] * grad).to(value_grad_ptrs[j].dtype.element_ty)
        tl.store(value_grad_ptrs[j] + at, value_grad, mask=inside)
    tl.store(query_grad_ptr + at, query_grad.to(query_grad_ptr.dtype.element_ty), mask=inside)


Tensors = Sequence[torch.Tensor]


def launch_forward(
    query_BTND: torch.Tensor,
    out_BTND: torch.Tensor,
    lse_BNT: torch.Tensor,
    keys: Tensors,
    values: Tensors,
    scale: float,
) -> None:
    """All but ``lse_BNT`` contiguous as BTND."""
    grid, sizes = _sizes(query_BTND)
    tensors = query_BTND, out_BTND, lse_BNT, tuple(keys), tuple(values)
    _add_diagonal_kernel[grid](*tensors, scale, **sizes)


def launch_backward(
    grad_BTND: torch.Tensor,
    query_BTND: torch.Tensor,
    out_BTND: torch.Tensor,
    lse_BNT: torch.Tensor,
    keys: Tensors,
    values: Tensors,
    query_grad_BTND: torch.Tensor,
    key_grads: Tensors,
    value_grads: Tensors,
    scale: float,
) -> None:
    """All but ``lse_BNT`` contiguous as BTND."""
    grid, sizes = _sizes(query_BTND)
    inputs = grad_BTND, query_BTND, out_BTND, lse_BNT, tuple(keys), tuple(values)
    outputs = query_grad_BTND, tuple(key_grads), tuple(value_grads)
    _diagonal_gradients_kernel[grid](*inputs, *outputs, scale, **sizes)


def _sizes(query_BTND: torch.Tensor) -> tuple[tuple[int], dict[str, int]]:
    """The grid, and what kernels take behind their tensors."""
    B, T, N, D = query_BTND.shape
    block_d = triton.next_power_of_2(D)
    block_r = max(1, _ELEMENTS // block_d)
    sizes = {"num_rows": B * T * N, "num_slots": T, "num_heads": N, "HEAD_DIM": D}
    sizes |= {"BLOCK_R": block_r, "BLOCK_D": block_d, "num_warps": 4}
    return (triton.cdiv(B * T * N, block_r),), sizes
