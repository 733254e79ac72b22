"""See :func:`vllm_eagle3.ops.rotate_halves`."""

import torch
import triton
import triton.language as tl

_ELEMENTS = 1024  # of each half in a program's tile, 8 for each thread of four warps


# Sizes of packed batches hardly repeat: no variant of the kernel for those that 16 divides. The
# stride is a model's own, and loads are wide where it is known to be divisible.
@triton.jit(do_not_specialize=["num_rows", "num_slots", "num_heads"])
def _rotate_halves_kernel(
    x_ptr,  # [B T, N, D], R = B T N
    cos_ptr,  # [S, D], S = B T, or T for all B
    sin_ptr,  # [S, D]
    out_ptr,  # [R, D]
    num_rows,
    num_slots,  # S
    num_heads,
    x_slot_stride,
    INVERSE: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    dim = tl.arange(0, BLOCK_D)
    inside = (row < num_rows)[:, None] & (dim < HALF)[None, :]
    slot = row // num_heads
    x_row = slot * x_slot_stride + (row % num_heads) * (2 * HALF)
    x_at = x_row[:, None] + dim[None, :]
    at = row[:, None] * (2 * HALF) + dim[None, :]
    angle_at = (slot % num_slots)[:, None] * (2 * HALF) + dim[None, :]
    first = tl.load(x_ptr + x_at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x_ptr + HALF + x_at, mask=inside, other=0.0).to(tl.float32)
    cos = tl.load(cos_ptr + angle_at, mask=inside, other=0.0)
    sin = tl.load(sin_ptr + angle_at, mask=inside, other=0.0)
    if INVERSE:
        sin = -sin
    dtype = out_ptr.dtype.element_ty
    tl.store(out_ptr + at, (first * cos - second * sin).to(dtype), mask=inside)
    tl.store(out_ptr + HALF + at, (second * cos + first * sin).to(dtype), mask=inside)


def launch(
    x_BTND: torch.Tensor,
    cos_BTD: torch.Tensor,
    sin_BTD: torch.Tensor,
    out_BTND: torch.Tensor,
    inverse: bool,
) -> None:
    """All contiguous, but that the slots of x may lie further apart, at equal distances."""
    B, T, N, D = x_BTND.shape
    num_rows = B * T * N
    if num_rows == 0:
        return
    block_d = triton.next_power_of_2(D // 2)
    block_r = max(1, _ELEMENTS // block_d)
    _rotate_halves_kernel[(triton.cdiv(num_rows, block_r),)](
        x_BTND,
        cos_BTD,
        sin_BTD,
        out_BTND,
        num_rows,
        cos_BTD.shape[0] * T,
        N,
        x_BTND.stride(1),
        INVERSE=inverse,
        HALF=D // 2,
        BLOCK_R=block_r,
        BLOCK_D=block_d,
        num_warps=4,
    )
