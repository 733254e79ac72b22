"""The forward of a frozen Llama in few, large operations.

The decoder of Transformers, computed from its own weights. On a small target a step of training
is bound by the host, which has each operation to start: here a layer has some thirty, a third of
what the modules of Transformers have. Queries, keys and values are one product, and so are the
two inputs of the MLP; rotary embedding and norms are one kernel each, where there is one.

Shape suffixes: B rows, T slots, P = B T, C documents, L slots of the longest, N query heads,
G key heads, D head dimension, H hidden size.
"""

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from vllm_eagle3.ops import rotate_halves
from vllm_eagle3.train.documents import DocumentLayout, Layout, RowLayout


class _Linear(NamedTuple):
    """x W + b of 2-d x; ``matrix`` is [in, out]."""

    matrix: torch.Tensor
    bias: torch.Tensor | None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.bias is None:
            return x @ self.matrix
        return torch.addmm(self.bias, x, self.matrix)


def _side_by_side(*modules: nn.Linear) -> _Linear:
    """Several products of one input as one.

    The modules' weights become parts of the joint one: nothing is held twice, and the modules
    compute what they did.
    """
    sizes = [module.out_features for module in modules]
    with torch.no_grad():
        weight = torch.cat([module.weight for module in modules])
        for module, part in zip(modules, weight.split(sizes), strict=True):
            module.weight = nn.Parameter(part, requires_grad=False)
        biases = [module.bias for module in modules if module.bias is not None]
        return _Linear(weight.T, torch.cat(biases) if biases else None)


class _Norm(NamedTuple):
    weight_H: torch.Tensor
    eps: float

    @classmethod
    def of(cls, module: nn.Module) -> "_Norm":
        return cls(module.weight.detach(), module.variance_epsilon)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.weight_H.shape, self.weight_H, self.eps)


class _Layer:
    """One decoder layer: attention and MLP, each before a norm and beside a residual."""

    def __init__(self, layer: nn.Module) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        D = attention.head_dim
        self.before_attention = _Norm.of(layer.input_layernorm)
        self.qkv = _side_by_side(attention.q_proj, attention.k_proj, attention.v_proj)
        self.out = _side_by_side(attention.o_proj)
        self.num_heads = attention.q_proj.out_features // D
        self.num_kv_heads = attention.k_proj.out_features // D
        self.head_dim, self.scale = D, attention.scaling
        self.before_mlp = _Norm.of(layer.post_attention_layernorm)
        self.gate_up = _side_by_side(mlp.gate_proj, mlp.up_proj)
        self.down, self.activation = _side_by_side(mlp.down_proj), mlp.act_fn

    def __call__(
        self, hidden_PH: torch.Tensor, angles: Sequence[torch.Tensor], layout: Layout
    ) -> torch.Tensor:
        qkv_CLX = layout.apart(self.qkv(self.before_attention(hidden_PH)))
        attended_CLX = self._attend(qkv_CLX.unflatten(-1, (-1, self.head_dim)), angles)
        hidden_PH = hidden_PH + self.out(layout.together(attended_CLX))
        gate, up = self.gate_up(self.before_mlp(hidden_PH)).chunk(2, -1)
        return hidden_PH + self.down(self.activation(gate) * up)

    def _attend(self, qkv_CLMD: torch.Tensor, angles: Sequence[torch.Tensor]) -> torch.Tensor:
        N, G = self.num_heads, self.num_kv_heads
        qk_CLMD, v_CLGD = qkv_CLMD.split((N + G, G), 2)
        q_CLND, k_CLGD = rotate_halves(qk_CLMD, *angles).split((N, G), 2)
        out_CNLD = F.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q_CLND, k_CLGD, v_CLGD)),
            is_causal=True,
            scale=self.scale,
            enable_gqa=N != G,
        )
        return out_CNLD.transpose(1, 2).flatten(2)


class LlamaDecoder:
    """The layers of a ``LlamaForCausalLM`` that this process holds whole.

    Making it lays weights side by side: move the model to its device before.
    """

    def __init__(self, model: nn.Module) -> None:
        self._body = model.model
        self._layers = [_Layer(layer) for layer in self._body.layers]
        self._norm = _Norm.of(self._body.norm)

    @torch.no_grad()
    def __call__(
        self, tokens_BT: torch.Tensor, layout: DocumentLayout | None, entered: Collection[int]
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """Run the decoder over right-padded or packed rows.

        Args:
            layout: of packed rows; None for one document a row.
            entered: layers before which the states are wanted; the number of layers is the last
                one's output, before the final norm.

        Returns:
            The last hidden states, after the final norm, [P, H]; by layer those before it, [P, H].
        """
        layout = layout or RowLayout(*tokens_BT.shape)
        # All is in the weights' type: autocast would only look at each operation.
        with torch.autocast(tokens_BT.device.type, enabled=False):
            hidden_PH = F.embedding(tokens_BT.flatten(), self._body.embed_tokens.weight)
            angles = self._angles(hidden_PH, layout)
            states = {}
            for number, layer in enumerate(self._layers):
                if number in entered:
                    states[number] = hidden_PH
                hidden_PH = layer(hidden_PH, angles, layout)
            if len(self._layers) in entered:
                states[len(self._layers)] = hidden_PH
            return self._norm(hidden_PH), states

    def _angles(self, like: torch.Tensor, layout: Layout) -> list[torch.Tensor]:
        """Cosines and sines of the slots of a document, [1, L, D], float32 at least."""
        positions_1L = torch.arange(layout.longest, device=like.device).unsqueeze(0)
        accurate = torch.promote_types(like.dtype, torch.float32)
        return [x.to(accurate) for x in self._body.rotary_emb(like, positions_1L)]
