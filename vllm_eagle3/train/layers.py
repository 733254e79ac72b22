"""The parts of a Llama decoder layer; the attention itself is the caller's.

What several draft steps have in common is made once, by the caller: the matrices of a layer, in
the type of its inputs and those of one input side by side, and the angles of rotary embedding.

Shape suffixes: B sequences, T slots, N query heads, G key heads, M = N + G, D head dimension,
X = (N + 2 G) D, H hidden size, I intermediate size.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import FunctionCtx, once_differentiable

from vllm_eagle3.ops import rotate_halves
from vllm_eagle3.train.head_config import HeadConfig
from vllm_eagle3.train.norms import rms_norm

Attend = Callable[[torch.Tensor], torch.Tensor]
Angles = tuple[torch.Tensor, torch.Tensor]
Matrices = tuple[torch.Tensor, torch.Tensor]


class RMSNorm(nn.Module):
    """x / rms(x) * weight, in the dtype of x; sums are float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps)

    def in_type(self, dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
        """The norm of inputs of one type, which rounds its weight to that once."""
        weight_H = self.weight.to(dtype)
        return partial(rms_norm, weight_H=weight_H, eps=self.eps)


class SelfAttention(nn.Module):
    """The projections before and after the attention."""

    def __init__(self, config: HeadConfig, input_size: int) -> None:
        super().__init__()
        q_size = config.num_heads * config.head_dim
        kv_size = config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(input_size, q_size, bias=False)
        self.k_proj = nn.Linear(input_size, kv_size, bias=False)
        self.v_proj = nn.Linear(input_size, kv_size, bias=False)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=False)

    def matrices(self, dtype: torch.dtype) -> Matrices:
        """[in, (N + 2 G) D] of queries, keys and values; [N D, H]."""
        qkv = side_by_side(dtype, self.q_proj, self.k_proj, self.v_proj)
        return qkv, side_by_side(dtype, self.o_proj)

    def forward(self, x: torch.Tensor, matrices: Matrices, attend: Attend) -> torch.Tensor:
        """``attend`` takes queries, keys and values, [..., (N + 2 G) D], and gives [..., N D]."""
        qkv, out = matrices
        return attend(x @ qkv) @ out


def rotary_angles(
    positions_BT: torch.Tensor, config: HeadConfig, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines, [B, T, D], float32 at least."""
    accurate = torch.promote_types(dtype, torch.float32)
    even = torch.arange(0, config.head_dim, 2, device=positions_BT.device, dtype=accurate)
    frequencies = config.rope_theta ** (-even / config.head_dim)
    angles = (positions_BT.unsqueeze(-1).to(accurate) * frequencies).repeat(1, 1, 2)
    return angles.cos(), angles.sin()


def rotated_heads(
    qkv_BTX: torch.Tensor, angles: Angles, config: HeadConfig
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v as BNTD, views of BTND: q and k rotated, k and v repeated to the query heads."""
    N, G = config.num_heads, config.num_kv_heads
    qk_BTMD, v_BTGD = qkv_BTX.unflatten(-1, (-1, config.head_dim)).split((N + G, G), 2)
    q_BTND, k_BTGD = _Rotate.apply(qk_BTMD, *angles).split((N, G), 2)
    repeated = (x_BTGD.repeat_interleave(N // G, 2) for x_BTGD in (k_BTGD, v_BTGD))
    q_BNTD, k_BNTD, v_BNTD = (x.transpose(1, 2) for x in (q_BTND, *repeated))
    return q_BNTD, k_BNTD, v_BNTD


def rotated_heads_gradient(
    grads_BNTD: Sequence[torch.Tensor], angles: Angles, config: HeadConfig
) -> torch.Tensor:
    """Of :func:`rotated_heads`, by its results' gradients, with respect to ``qkv_BTX``."""
    groups = config.num_kv_heads, config.num_heads // config.num_kv_heads
    q_BTND, *repeated = (grad_BNTD.transpose(1, 2) for grad_BNTD in grads_BNTD)
    k_BTGD, v_BTGD = (x_BTND.unflatten(2, groups).sum(3) for x_BTND in repeated)
    qk_BTMD = rotate_halves(torch.cat((q_BTND, k_BTGD), 2), *angles, inverse=True)
    return torch.cat((qk_BTMD, v_BTGD), 2).flatten(2)


class _Rotate(torch.autograd.Function):
    """Rotary embedding with the halves of a head as the pair; nothing is kept of x."""

    @staticmethod
    def forward(ctx: FunctionCtx, x_BTND, cos_BTD, sin_BTD):
        ctx.save_for_backward(cos_BTD, sin_BTD)
        return rotate_halves(x_BTND, cos_BTD, sin_BTD)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_BTND):
        return rotate_halves(grad_BTND, *ctx.saved_tensors, inverse=True), None, None


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def matrices(self, dtype: torch.dtype) -> Matrices:
        """[H, 2 I] of gate and up, [I, H]."""
        gate_up = side_by_side(dtype, self.gate_proj, self.up_proj)
        return gate_up, side_by_side(dtype, self.down_proj)

    def forward(self, x: torch.Tensor, matrices: Matrices) -> torch.Tensor:
        gate_up, down = matrices
        gate, up = (x @ gate_up).chunk(2, -1)
        return (F.silu(gate) * up) @ down


def side_by_side(dtype: torch.dtype, *modules: nn.Linear) -> torch.Tensor:
    """Several products of one input as one: [in, out], in the type of the input."""
    weights = [module.weight for module in modules]
    joint = (weights[0] if len(weights) == 1 else torch.cat(weights)).to(dtype)
    # A view of a parameter says that it needs a gradient, even where none is computed.
    return joint.T if torch.is_grad_enabled() else joint.detach().T
