"""The attention of one draft step, from its projections to what leaves it.

Before and behind the attention lie a dozen small operations: documents are taken apart, queries
and keys rotated, keys and values repeated, and all of it undone. As two functions with gradients
of their own they cost the host half of what autograd makes of them.

Shape suffixes: B rows, T slots, P = B T, C documents, L slots of the longest, N query heads,
G key heads, D head dimension, X = (N + 2 G) D.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.autograd.function import FunctionCtx, once_differentiable

from vllm_eagle3.train.attention import diagonal_attention
from vllm_eagle3.train.documents import Layout
from vllm_eagle3.train.head_config import HeadConfig
from vllm_eagle3.train.layers import Angles, rotated_heads, rotated_heads_gradient

KeysAndValues = tuple[torch.Tensor, torch.Tensor]


class Geometry(NamedTuple):
    """Where the slots of a draft step are: in memory, and in their documents.

    It holds nothing that has a gradient: nodes of autograd's graph keep it.

    Attributes:
        angles: of a document's slots in this step, [1, L, D].
    """

    config: HeadConfig
    layout: Layout
    angles: Angles

    def heads(self, qkv_PX: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k, v of each document, CNLD: see :func:`rotated_heads`."""
        return rotated_heads(self.layout.apart(qkv_PX), self.angles, self.config)

    def heads_gradient(self, grads_CNLD: Sequence[torch.Tensor]) -> torch.Tensor:
        """Of :meth:`heads`, [P, X]; none flows into the documents' padding."""
        grad_CLX = rotated_heads_gradient(grads_CNLD, self.angles, self.config)
        return self.layout.together(grad_CLX)

    def joined(self, out_CNLD: torch.Tensor) -> torch.Tensor:
        """[P, N D]."""
        return self.layout.together(out_CNLD.transpose(1, 2).flatten(2))

    def joined_gradient(self, grad_PE: torch.Tensor) -> torch.Tensor:
        """Of :meth:`joined`, CNLD: zeros in the padding, which so gives no gradient on."""
        grad_CLE = self.layout.spread(grad_PE)
        return grad_CLE.unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)


class DraftAttention:
    """Attention of draft step k within the documents of packed or padded rows.

    Args:
        earlier: keys and values of the steps before, from step 0, each as a pair.
        impl: as of ``diagonal_attention``.

    Attributes:
        newest: the pair of this step, CNLD, once it has been called.
    """

    def __init__(
        self, geometry: Geometry, earlier: Sequence[KeysAndValues] = (), impl: str = "flash"
    ) -> None:
        self._geometry, self._earlier, self._impl = geometry, earlier, impl
        self.newest: KeysAndValues | None = None

    def __call__(self, qkv_PX: torch.Tensor) -> torch.Tensor:
        """[P, X] -> [P, N D]."""
        q, *newest = _Heads.apply(qkv_PX, self._geometry)
        self.newest = tuple(newest)
        keys, values = zip(*self._earlier, self.newest, strict=True)
        out = diagonal_attention(q, keys[0], values[0], keys[1:], values[1:], self._impl)
        return _Joined.apply(out, self._geometry)


class _Heads(torch.autograd.Function):
    """[P, X] -> q, k, v of each document, CNLD."""

    @staticmethod
    def forward(ctx: FunctionCtx, qkv_PX, geometry: Geometry):
        ctx.geometry = geometry
        return geometry.heads(qkv_PX)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads_CNLD):
        return ctx.geometry.heads_gradient(grads_CNLD), None


class _Joined(torch.autograd.Function):
    """CNLD -> [P, N D]."""

    @staticmethod
    def forward(ctx: FunctionCtx, out_CNLD, geometry: Geometry):
        ctx.geometry = geometry
        return geometry.joined(out_CNLD)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_PE):
        return ctx.geometry.joined_gradient(grad_PE), None
