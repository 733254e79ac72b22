"""The parts of a Llama decoder layer; the attention itself is the caller's.

Shape suffixes: B sequences, T slots, N query heads, D head dimension.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import FunctionCtx, once_differentiable

from vllm_eagle3.ops import rotate_halves
from vllm_eagle3.train.head_config import HeadConfig
from vllm_eagle3.train.norms import rms_norm

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class RMSNorm(nn.Module):
    """x / rms(x) * weight, in the dtype of x; sums are float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps)


class SelfAttention(nn.Module):
    """Projections and rotary embedding."""

    def __init__(self, config: HeadConfig, input_size: int) -> None:
        super().__init__()
        q_size = config.num_heads * config.head_dim
        kv_size = config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(input_size, q_size, bias=False)
        self.k_proj = nn.Linear(input_size, kv_size, bias=False)
        self.v_proj = nn.Linear(input_size, kv_size, bias=False)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=False)
        self.head_dim = config.head_dim
        self.group = config.num_heads // config.num_kv_heads
        self.rope_theta = config.rope_theta

    def forward(self, x: torch.Tensor, positions_BT: torch.Tensor, attend: Attend) -> torch.Tensor:
        """``attend`` takes q, k, v as BNTD, keys and values repeated to the query heads.

        They are views of BTND, the layout that attention computes in.
        """

        def heads(projected: torch.Tensor) -> torch.Tensor:
            return projected.unflatten(-1, (-1, self.head_dim))

        cos, sin = self._rotary(positions_BT)
        q = _Rotate.apply(heads(self.q_proj(x)), cos, sin)
        k = _Rotate.apply(heads(self.k_proj(x)), cos, sin).repeat_interleave(self.group, 2)
        v = heads(self.v_proj(x)).repeat_interleave(self.group, 2)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return self.o_proj(attend(q, k, v).transpose(1, 2).flatten(-2))

    def _rotary(self, positions_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        accurate = torch.promote_types(self.o_proj.weight.dtype, torch.float32)
        even = torch.arange(0, self.head_dim, 2, device=positions_BT.device, dtype=accurate)
        frequencies = self.rope_theta ** (-even / self.head_dim)
        angles = (positions_BT.unsqueeze(-1).to(accurate) * frequencies).repeat(1, 1, 2)
        return angles.cos(), angles.sin()


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

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
