"""The EAGLE-3 draft network, its tensors named as in the checkpoint that vLLM loads.

One decoder layer over the target's fused states (EAGLE-3, arXiv 2503.01840, section 3.1):

    h   = fc(low, mid, high)                         3H -> H, the first draft step only
    x   = [input_layernorm(embed(token)), hidden_norm(h)]        2H, embedding first
    h'  = h + o_proj(attention(q(x), k(x), v(x)))
    out = h' + mlp(post_attention_layernorm(h'))     what the next draft step takes as h
    logits = lm_head(norm(out))                      over the draft vocabulary

EAGLE-3.1 (arXiv 2605.09992) changes two lines, each by a switch of its own:

    fc_norm:      h = fc(norm_low(low), norm_mid(mid), norm_high(high))
    norm_output:  the next draft step takes norm(out) as h

Shape suffixes: B sequences, T slots, H hidden size, F captured features (3H, or as many H
as there are captured states), V draft vocabulary.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from vllm_eagle3.train.head_config import HeadConfig, captured_layers
from vllm_eagle3.train.layers import (
    MLP,
    Attend,
    Matrices,
    RMSNorm,
    SelfAttention,
    rotary_angles,
    rotated_heads,
)

__all__ = ["DraftHead", "Eagle3Head", "HeadConfig", "captured_layers"]


class Prepared(NamedTuple):
    """The weights of a head's layer in one type, as several draft steps take them.

    So each is rounded once, and the sum of its gradients is.
    """

    attention: Matrices
    mlp: Matrices
    norms: tuple[Callable[[torch.Tensor], torch.Tensor], ...]
    fc: torch.Tensor | None = None  # [in, H], where each step has it


class DraftHead(nn.Module):
    """What heads of every kind have: a draft vocabulary, the target's embedding, a scale.

    And the four functions of a drafting round, with states of shape [..., H]:

        fuse(features) -> state       of what the target captured, before the first step
        step(tokens, state, positions, attend) -> out; attend takes q, k, v as BNTD, rotated,
                                      keys and values repeated to the query heads
        feedback(out) -> state        of the next step
        logits(out)                   over the draft vocabulary

    The embedding is the target's, frozen and not saved: vLLM shares it as well.
    ``feature_scale_F`` divides every input channel of ``fc`` by its typical size, because a
    few channels of a residual stream are hundreds of times larger than the rest and Adam
    moves all weights alike; the export folds it into ``fc``.
    """

    fc: nn.Linear
    feature_scale_F: torch.Tensor
    embedding: torch.Tensor
    d2t: torch.Tensor
    t2d: torch.Tensor

    def __init__(
        self,
        config: HeadConfig,
        embedding: torch.Tensor,
        draft_token_ids: torch.Tensor,
        fc_inputs: int,
    ) -> None:
        """``embedding``: [vocab, H]; ``draft_token_ids``: int64 [V], rising, the target ids."""
        super().__init__()
        self.config = config
        self.fc = nn.Linear(fc_inputs, config.hidden_size, bias=False)
        t2d = torch.zeros(config.vocab_size, dtype=torch.bool)
        t2d[draft_token_ids.cpu()] = True
        self.register_buffer("d2t", draft_token_ids.cpu() - torch.arange(len(draft_token_ids)))
        self.register_buffer("t2d", t2d)
        self.register_buffer("feature_scale_F", torch.ones(fc_inputs), False)
        self.register_buffer("embedding", embedding.detach(), False)

    def prepared(self, dtype: torch.dtype) -> Prepared:
        """The weights that a step takes, in the type of its states: once for several steps."""
        raise NotImplementedError

    def run(
        self, embeds: torch.Tensor, state: torch.Tensor, prepared: Prepared, attend: Attend
    ) -> torch.Tensor:
        """:meth:`step` on embeddings of the tokens; see ``SelfAttention`` about ``attend``."""
        raise NotImplementedError

    def embed(self, tokens: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """[..., H]."""
        return F.embedding(tokens, self.embedding).to(dtype)

    def step(
        self,
        tokens_BT: torch.Tensor,
        state_BTH: torch.Tensor,
        positions_BT: torch.Tensor,
        attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
        prepared: Prepared | None = None,
    ) -> torch.Tensor:
        """One draft step: the layer's output, before the final norm, if there is one.

        Args:
            prepared: of :meth:`prepared`, where it has been made for several steps.
        """
        dtype = state_BTH.dtype
        prepared = prepared or self.prepared(dtype)
        angles = rotary_angles(positions_BT, self.config, self.fc.weight.dtype)

        def attend_to_heads(qkv_BTX: torch.Tensor) -> torch.Tensor:
            out_BNTD = attend(*rotated_heads(qkv_BTX, angles, self.config))
            return out_BNTD.transpose(1, 2).flatten(2)

        embeds_BTH = self.embed(tokens_BT, dtype)
        return self.run(embeds_BTH, state_BTH, prepared, attend_to_heads)

    @property
    def draft_token_ids(self) -> torch.Tensor:
        """Target ids of the draft vocabulary, int64 [V]."""
        return self.d2t + torch.arange(len(self.d2t), device=self.d2t.device)


class DraftLayer(nn.Module):
    """The decoder layer; the embedding never enters the residual stream."""

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        norm = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(*norm)
        self.hidden_norm = RMSNorm(*norm)
        self.post_attention_layernorm = RMSNorm(*norm)
        self.self_attn = SelfAttention(config, 2 * config.hidden_size)
        self.mlp = MLP(config)

    def prepared(self, dtype: torch.dtype) -> Prepared:
        """Of one type, for several steps."""
        norms = self.input_layernorm, self.hidden_norm, self.post_attention_layernorm
        return Prepared(
            self.self_attn.matrices(dtype),
            self.mlp.matrices(dtype),
            tuple(norm.in_type(dtype) for norm in norms),
        )

    def forward(
        self, embeds: torch.Tensor, hidden: torch.Tensor, prepared: Prepared, attend: Attend
    ) -> torch.Tensor:
        norm_embeds, norm_hidden, norm_attended = prepared.norms
        x = torch.cat((norm_embeds(embeds), norm_hidden(hidden)), -1)
        hidden = hidden + self.self_attn(x, prepared.attention, attend)
        return hidden + self.mlp(norm_attended(hidden), prepared.mlp)


class Eagle3Head(DraftHead):
    """The trainable head. Its ``state_dict`` has the checkpoint's names."""

    def __init__(
        self, config: HeadConfig, embedding: torch.Tensor, draft_token_ids: torch.Tensor
    ) -> None:
        num_captured = len(config.aux_layer_ids)
        super().__init__(config, embedding, draft_token_ids, num_captured * config.hidden_size)
        norm = config.hidden_size, config.rms_norm_eps
        if config.fc_norm:
            self.fc_norm = nn.ModuleList(RMSNorm(*norm) for _ in range(num_captured))
        self.midlayer = DraftLayer(config)
        self.norm = RMSNorm(*norm)
        self.lm_head = nn.Linear(config.hidden_size, config.draft_vocab_size, bias=False)

    def fc_inputs(self, features_BTF: torch.Tensor) -> torch.Tensor:
        """The captured states as ``fc`` takes them, but for the scale: normed, or as they are."""
        if not self.config.fc_norm:
            return features_BTF
        states = features_BTF.chunk(len(self.fc_norm), -1)
        return torch.cat([norm(x) for norm, x in zip(self.fc_norm, states, strict=True)], -1)

    def fuse(self, features_BTF: torch.Tensor) -> torch.Tensor:
        """``fc`` over the captured states, concatenated low, mid, high."""
        dtype = features_BTF.dtype
        inputs = (self.fc_inputs(features_BTF) * self.feature_scale_F).to(dtype)
        return inputs @ self.fc.weight.to(dtype).T

    def prepared(self, dtype: torch.dtype) -> Prepared:
        return self.midlayer.prepared(dtype)

    def run(
        self, embeds: torch.Tensor, state: torch.Tensor, prepared: Prepared, attend: Attend
    ) -> torch.Tensor:
        return self.midlayer(embeds, state, prepared, attend)

    def feedback(self, out: torch.Tensor) -> torch.Tensor:
        """What the next draft step takes as ``hidden_BTH``, of this one's output."""
        return self.norm(out) if self.config.norm_output else out

    def logits(self, out: torch.Tensor) -> torch.Tensor:
        """Over the draft vocabulary, [..., V]."""
        return self.norm(out) @ self.lm_head.weight.to(out.dtype).T
