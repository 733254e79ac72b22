"""Rotary embedding with the halves of a head as the pairs, as in Hugging Face's Llama."""

import torch

from vllm_eagle3.ops.dispatch import Impl, check, check_same_device, runs_triton


def rotate_halves(
    x_BTND: torch.Tensor,
    cos_BTD: torch.Tensor,
    sin_BTD: torch.Tensor,
    *,
    inverse: bool = False,
    impl: Impl = "auto",
) -> torch.Tensor:
    """x cos + (-second half, first half) sin, in the type of the angles, rounded to that of x.

    Args:
        x_BTND: float; B sequences, T slots, N heads, D (even) channels of a head. Some of the
            heads of a larger contiguous tensor are not copied.
        cos_BTD, sin_BTD: float32 (float64 of float64 x), the second half as the first; B is 1
            where all sequences have the same.
        inverse: rotate back, which is also the gradient.

    Returns:
        contiguous, in the type of x.

    Raises:
        ValueError: a tensor of another type, size or device.
    """
    B, T, _, D = x_BTND.shape
    accurate = torch.promote_types(x_BTND.dtype, torch.float32)
    for name, angles in (("cos_BTD", cos_BTD), ("sin_BTD", sin_BTD)):
        if angles.shape not in ((B, T, D), (1, T, D)) or angles.dtype != accurate or D % 2:
            raise ValueError(
                f"{name} must be {accurate} {(B, T, D)} or {(1, T, D)}, D even, got "
                f"{angles.dtype} {tuple(angles.shape)}"
            )
    check(cos_BTD.shape == sin_BTD.shape, "cos_BTD and sin_BTD must have one shape")
    check_same_device(x_BTND=x_BTND, cos_BTD=cos_BTD, sin_BTD=sin_BTD)
    if not runs_triton(impl, x_BTND.device, x_BTND.dtype):
        return _rotate_halves_torch(x_BTND, cos_BTD, sin_BTD, inverse)
    from vllm_eagle3.ops.kernels.rotary import launch

    if not _has_whole_slots(x_BTND):
        x_BTND = x_BTND.contiguous()
    out_BTND = x_BTND.new_empty(x_BTND.shape)
    launch(x_BTND, cos_BTD.contiguous(), sin_BTD.contiguous(), out_BTND, inverse)
    return out_BTND


def _has_whole_slots(x_BTND: torch.Tensor) -> bool:
    """Whether the heads of a slot lie together, and all slots at equal distances."""
    sequence, slot, head, channel = x_BTND.stride()
    return (channel, head, sequence) == (1, x_BTND.shape[3], x_BTND.shape[1] * slot)


def _rotate_halves_torch(
    x: torch.Tensor, cos_BTD: torch.Tensor, sin_BTD: torch.Tensor, inverse: bool
) -> torch.Tensor:
    cos, sin = cos_BTD.unsqueeze(2), sin_BTD.unsqueeze(2)
    first, second = x.chunk(2, -1)
    out = torch.cat((second, -first) if inverse else (-second, first), -1) * sin
    out += x * cos
    return out.to(x.dtype).contiguous()
