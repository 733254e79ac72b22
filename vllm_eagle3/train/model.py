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

import torch
import torch.nn.functional as F
from torch import nn

from vllm_eagle3.train.head_config import HeadConfig, captured_layers
from vllm_eagle3.train.layers import MLP, Attend, RMSNorm, SelfAttention

__all__ = ["DraftHead", "Eagle3Head", "HeadConfig", "captured_layers"]


class DraftHead(nn.Module):
    """What heads of every kind have: a draft vocabulary, the target's embedding, a scale.

    And the four functions of a drafting round, with states of shape [..., H]:

        fuse(features) -> state       of what the target captured, before the first step
        step(tokens, state, positions, attend) -> out
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
        return self.fc((self.fc_inputs(features_BTF) * self.feature_scale_F).to(dtype))

    def step(
        self,
        tokens_BT: torch.Tensor,
        hidden_BTH: torch.Tensor,
        positions_BT: torch.Tensor,
        attend: Attend,
    ) -> torch.Tensor:
        """One draft step: the layer's output, before the final norm."""
        embeds_BTH = F.embedding(tokens_BT, self.embedding).to(hidden_BTH.dtype)
        return self.midlayer(embeds_BTH, hidden_BTH, positions_BT, attend)

    def feedback(self, out: torch.Tensor) -> torch.Tensor:
        """What the next draft step takes as ``hidden_BTH``, of this one's output."""
        return self.norm(out) if self.config.norm_output else out

    def logits(self, out: torch.Tensor) -> torch.Tensor:
        """Over the draft vocabulary, [..., V]."""
        return self.lm_head(self.norm(out))
