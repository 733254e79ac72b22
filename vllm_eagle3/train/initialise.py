"""The weights a head starts from."""

import torch

from vllm_eagle3.train.features import Target
from vllm_eagle3.train.model import Eagle3Head
from vllm_eagle3.train.ttt import TTTBatch

_STD = 0.02


@torch.no_grad()
def initialise(head: Eagle3Head, target: Target, sample: TTTBatch) -> None:
    """Random layer; the output matrix and its norm start as the target's.

    The scale of every captured channel is taken from the assistant's tokens of ``sample``.
    The first token of a document is no guide: its state is an attention sink, hundreds of
    times larger than all others.
    """
    for name, weight in head.named_parameters():
        if weight.dim() == 2:
            torch.nn.init.normal_(weight, std=_STD)
        elif "norm" in name:
            torch.nn.init.ones_(weight)
    # Scaled features have size one in every channel: so has h with this deviation.
    torch.nn.init.normal_(head.fc.weight, std=head.fc.in_features**-0.5)
    head.lm_head.weight.copy_(target.output_matrix[head.draft_token_ids])
    head.norm.weight.copy_(target.final_norm)
    features_MF = sample.features_BTF[sample.assistant_BT].float()
    size_F = features_MF.square().mean(0).sqrt()
    head.feature_scale_F.copy_(1 / size_F.clamp(min=1e-3 * size_F.mean().clamp(min=1e-6)))
