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
import torch.nn.functional as F
from torch import nn

from vllm_eagle3.train.head_config import HeadConfig
from vllm_eagle3.train.layers import MLP, Attend, RMSNorm, SelfAttention
from vllm_eagle3.train.model import DraftHead


class Eagle1Layer(nn.Module):
    """A Llama layer without the norm before its attention."""

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.self_attn = SelfAttention(config, config.hidden_size)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self, hidden_BTH: torch.Tensor, positions_BT: torch.Tensor, attend: Attend
    ) -> torch.Tensor:
        hidden_BTH = hidden_BTH + self.self_attn(hidden_BTH, positions_BT, attend)
        return hidden_BTH + self.mlp(self.post_attention_layernorm(hidden_BTH))


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
        return torch.cat((F.embedding(tokens, self.embedding).to(features.dtype), features), -1)

    def fuse(self, features: torch.Tensor) -> torch.Tensor:
        """The target's features as they are."""
        return features

    def step(
        self,
        tokens_BT: torch.Tensor,
        features_BTH: torch.Tensor,
        positions_BT: torch.Tensor,
        attend: Attend,
    ) -> torch.Tensor:
        """One draft step: the predicted features, which the next step takes."""
        inputs = self.fc_inputs(tokens_BT, features_BTH)
        hidden_BTH = self.fc((inputs * self.feature_scale_F).to(features_BTH.dtype))
        return self.layers[0](hidden_BTH, positions_BT, attend)

    def feedback(self, out: torch.Tensor) -> torch.Tensor:
        """What the next draft step takes: the predicted features as they are."""
        return out

    def logits(self, out: torch.Tensor) -> torch.Tensor:
        """The target's, of predicted features (or of its own), [..., V]."""
        return out @ self.output_matrix.T.to(out.dtype)
