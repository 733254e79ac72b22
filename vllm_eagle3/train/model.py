"""The EAGLE-3 draft network, its tensors named as in the checkpoint that vLLM loads.

One decoder layer over the target's fused states (EAGLE-3, arXiv 2503.01840, section 3.1):

    h   = fc(low, mid, high)                         3H -> H, the first draft step only
    x   = [input_layernorm(embed(token)), hidden_norm(h)]        2H, embedding first
    h'  = h + o_proj(attention(q(x), k(x), v(x)))
    out = h' + mlp(post_attention_layernorm(h'))     what the next draft step takes as h
    logits = lm_head(norm(out))                      over the draft vocabulary

Shape suffixes: B sequences, T slots, N query heads, D head dimension, H hidden size,
F = 3H captured features, V draft vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import nn

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class HeadConfig:
    """Sizes of a head; those of the attention and the MLP follow the target's."""

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    draft_vocab_size: int
    rope_theta: float
    rms_norm_eps: float
    max_position_embeddings: int
    aux_layer_ids: tuple[int, int, int]

    @classmethod
    def from_target(cls, target: Any, draft_vocab_size: int) -> Self:
        """Read a Transformers ``LlamaConfig``.

        Raises:
            ValueError: the target is too shallow for three captures, its rotary embedding
                is scaled, or the draft vocabulary does not fit into its vocabulary.
        """
        rope = getattr(target, "rope_parameters", None) or {}
        if rope.get("rope_type", "default") != "default":
            raise ValueError(
                f"the target's rotary embedding is of type {rope['rope_type']!r}: only heads "
                "for targets with plain rotary embeddings can be trained"
            )
        if not 1 <= draft_vocab_size <= target.vocab_size:
            raise ValueError(
                f"draft_vocab_size={draft_vocab_size} must be between 1 and the target's "
                f"vocabulary of {target.vocab_size}"
            )
        heads = target.num_attention_heads
        return cls(
            hidden_size=target.hidden_size,
            intermediate_size=target.intermediate_size,
            num_heads=heads,
            num_kv_heads=target.num_key_value_heads,
            head_dim=getattr(target, "head_dim", None) or target.hidden_size // heads,
            vocab_size=target.vocab_size,
            draft_vocab_size=draft_vocab_size,
            rope_theta=float(rope.get("rope_theta") or target.rope_theta),
            rms_norm_eps=target.rms_norm_eps,
            max_position_embeddings=target.max_position_embeddings,
            aux_layer_ids=captured_layers(target.num_hidden_layers),
        )


def captured_layers(num_layers: int) -> tuple[int, int, int]:
    """Ids of the captured states, counted as the layer *entered*: 2, L//2, L-3.

    State i is the residual stream before layer i, hence ``hidden_states[i]`` of a
    Transformers model and ``aux_hidden_state_layers`` of a vLLM model.
    """
    layers = 2, num_layers // 2, num_layers - 3
    if not 0 < layers[0] < layers[1] < layers[2]:
        raise ValueError(
            f"a target of {num_layers} layers has no three different states to capture at "
            "2, L//2 and L-3: it needs at least 8 layers"
        )
    return layers


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in float32 and returned in the dtype of x."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        accurate = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = accurate * torch.rsqrt(accurate.square().mean(-1, keepdim=True) + self.eps)
        return (normed * self.weight).to(x.dtype)


class SelfAttention(nn.Module):
    """Projections and rotary embedding; the attention itself is the caller's."""

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        q_size = config.num_heads * config.head_dim
        kv_size = config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(2 * config.hidden_size, q_size, bias=False)
        self.k_proj = nn.Linear(2 * config.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(2 * config.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=False)
        self.head_dim = config.head_dim
        self.group = config.num_heads // config.num_kv_heads
        self.rope_theta = config.rope_theta

    def forward(self, x: torch.Tensor, positions_BT: torch.Tensor, attend: Attend) -> torch.Tensor:
        """``attend`` takes q, k, v as BNTD, keys and values repeated to the query heads."""

        def heads(projected: torch.Tensor) -> torch.Tensor:
            return projected.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

        q = heads(self.q_proj(x))
        k = heads(self.k_proj(x))
        v = heads(self.v_proj(x)).repeat_interleave(self.group, 1)
        cos, sin = self._rotary(positions_BT)
        q = _rotate(q, cos, sin)
        k = _rotate(k, cos, sin).repeat_interleave(self.group, 1)
        return self.o_proj(attend(q, k, v).transpose(1, 2).flatten(-2))

    def _rotary(self, positions_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        accurate = torch.promote_types(self.o_proj.weight.dtype, torch.float32)
        even = torch.arange(0, self.head_dim, 2, device=positions_BT.device, dtype=accurate)
        frequencies = self.rope_theta ** (-even / self.head_dim)
        angles = (positions_BT.unsqueeze(-1).to(accurate) * frequencies).repeat(1, 1, 2)
        return angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding with the halves of a head as the pair, as in Hugging Face's Llama."""
    first, second = x.chunk(2, -1)
    return (x * cos + torch.cat((-second, first), -1) * sin).to(x.dtype)


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DraftLayer(nn.Module):
    """The decoder layer; the embedding never enters the residual stream."""

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        norm = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(*norm)
        self.hidden_norm = RMSNorm(*norm)
        self.post_attention_layernorm = RMSNorm(*norm)
        self.self_attn = SelfAttention(config)
        self.mlp = MLP(config)

    def forward(
        self,
        embeds_BTH: torch.Tensor,
        hidden_BTH: torch.Tensor,
        positions_BT: torch.Tensor,
        attend: Attend,
    ) -> torch.Tensor:
        x = torch.cat((self.input_layernorm(embeds_BTH), self.hidden_norm(hidden_BTH)), -1)
        hidden_BTH = hidden_BTH + self.self_attn(x, positions_BT, attend)
        return hidden_BTH + self.mlp(self.post_attention_layernorm(hidden_BTH))


class Eagle3Head(nn.Module):
    """The trainable head. Its ``state_dict`` has the checkpoint's names.

    The embedding is the target's, frozen and not saved: vLLM shares it as well.
    ``feature_scale_F`` divides every captured channel by its typical size, because a few
    channels of a residual stream are hundreds of times larger than the rest and Adam moves
    all weights alike; the export folds it into ``fc``.
    """

    feature_scale_F: torch.Tensor
    embedding: torch.Tensor
    d2t: torch.Tensor
    t2d: torch.Tensor

    def __init__(
        self, config: HeadConfig, embedding: torch.Tensor, draft_token_ids: torch.Tensor
    ) -> None:
        """``embedding``: [vocab, H]; ``draft_token_ids``: int64 [V], rising, the target ids."""
        super().__init__()
        self.config = config
        self.fc = nn.Linear(3 * config.hidden_size, config.hidden_size, bias=False)
        self.midlayer = DraftLayer(config)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.draft_vocab_size, bias=False)
        t2d = torch.zeros(config.vocab_size, dtype=torch.bool)
        t2d[draft_token_ids.cpu()] = True
        self.register_buffer("d2t", draft_token_ids.cpu() - torch.arange(len(draft_token_ids)))
        self.register_buffer("t2d", t2d)
        self.register_buffer("feature_scale_F", torch.ones(3 * config.hidden_size), False)
        self.register_buffer("embedding", embedding.detach(), False)

    @property
    def draft_token_ids(self) -> torch.Tensor:
        """Target ids of the draft vocabulary, int64 [V]."""
        return self.d2t + torch.arange(len(self.d2t), device=self.d2t.device)

    def fuse(self, features_BTF: torch.Tensor) -> torch.Tensor:
        """``fc`` over the three captured states, concatenated low, mid, high."""
        dtype = features_BTF.dtype
        return self.fc((features_BTF * self.feature_scale_F).to(dtype))

    def step(
        self,
        tokens_BT: torch.Tensor,
        hidden_BTH: torch.Tensor,
        positions_BT: torch.Tensor,
        attend: Attend,
    ) -> torch.Tensor:
        """One draft step: the layer's output, which the next step takes as ``hidden_BTH``."""
        embeds_BTH = F.embedding(tokens_BT, self.embedding).to(hidden_BTH.dtype)
        return self.midlayer(embeds_BTH, hidden_BTH, positions_BT, attend)
