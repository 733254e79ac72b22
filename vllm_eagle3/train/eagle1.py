"""The EAGLE-1 draft network, which EAGLE-2 and HASS share, as vLLM's ``eagle`` loads it.

One decoder layer that extrapolates the target's features (EAGLE, arXiv 2401.15077, section
3.1); a feature f is the target's last hidden state, after its final norm:

    h   = fc(embed(token t+1), f_t)                  2H -> H, embedding first, every step
    h'  = h + o_proj(attention(q(h), k(h), v(h)))    no norm before the attention
    out = h' + mlp(post_attention_layernorm(h'))     predicts f_(t+1): the next step's feature
    logits = target's output matrix x out            over the target's vocabulary, no norm

``fc`` has no bias, other than in the EAGLE repository: vLLM's layer has none.

Shape suffixes: B sequences, T slots, M rows, H hidden size, V the target's vocabulary.
"""

import torch
from torch import nn

from vllm_eagle3.train.head_config import HeadConfig
from vllm_eagle3.train.layers import MLP, Attend, RMSNorm, SelfAttention, side_by_side
from vllm_eagle3.train.model import DraftHead, Prepared


class Eagle1Layer(nn.Module):
    """A Llama layer without the norm before its attention."""

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.self_attn = SelfAttention(config, config.hidden_size)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, hidden: torch.Tensor, prepared: Prepared, attend: Attend) -> torch.Tensor:
        (norm_attended,) = prepared.norms
        hidden = hidden + self.self_attn(hidden, prepared.attention, attend)
        return hidden + self.mlp(norm_attended(hidden), prepared.mlp)


class Eagle1Head(DraftHead):
    """The trainable head; its draft vocabulary is the target's.

    ``output_matrix`` is the target's, frozen and not saved: vLLM shares it as well.
    """

    output_matrix: torch.Tensor

    def __init__(
        self, config: HeadConfig, embedding: torch.Tensor, output_matrix: torch.Tensor
    ) -> None:
        """``embedding``, ``output_matrix``: [vocab, H]."""
        ids = torch.arange(config.vocab_size)
        super().__init__(config, embedding, ids, 2 * config.hidden_size)
        self.layers = nn.ModuleList([Eagle1Layer(config)])
        self.register_buffer("output_matrix", output_matrix.detach(), False)

    def fc_inputs(self, tokens: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """[..., 2H]: embeddings and features as ``fc`` takes them, but for the scale."""
        return torch.cat((self.embed(tokens, features.dtype), features), -1)

    def fuse(self, features: torch.Tensor) -> torch.Tensor:
        """The target's features as they are."""
        return features

    def prepared(self, dtype: torch.dtype) -> Prepared:
        layer = self.layers[0]
        return Prepared(
            layer.self_attn.matrices(dtype),
            layer.mlp.matrices(dtype),
            (layer.post_attention_layernorm.in_type(dtype),),
            side_by_side(dtype, self.fc),
        )

    def run(
        self, embeds: torch.Tensor, state: torch.Tensor, prepared: Prepared, attend: Attend
    ) -> torch.Tensor:
        """The predicted features, which the next step takes."""
        inputs = torch.cat((embeds, state), -1) * self.feature_scale_F
        return self.layers[0](inputs.to(state.dtype) @ prepared.fc, prepared, attend)

    def feedback(self, out: torch.Tensor) -> torch.Tensor:
        """What the next draft step takes: the predicted features as they are."""
        return out

    def logits(self, out: torch.Tensor) -> torch.Tensor:
        """The target's, of predicted features (or of its own), [..., V]."""
        return out @ self.output_matrix.T.to(out.dtype)
