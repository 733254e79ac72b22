"""The weights a head starts from."""

import torch

from vllm_eagle3.train.eagle1 import Eagle1Head
from vllm_eagle3.train.features import FeatureBatch, Target
from vllm_eagle3.train.model import DraftHead, Eagle3Head

_STD = 0.02


@torch.no_grad()
def initialise_eagle3(head: Eagle3Head, target: Target, sample: FeatureBatch) -> None:
    """Random layer; the output matrix and its norm start as the target's.

    The scale of every captured channel is taken from the assistant's tokens of ``sample``.
    The first token of a document is no guide: its state is an attention sink, hundreds of
    times larger than all others.
    """
    initialise_layer(head)
    head.lm_head.weight.copy_(target.output_matrix[head.draft_token_ids])
    head.norm.weight.copy_(target.final_norm)
    features_MF = sample.features_BTF[sample.assistant_BT]
    head.feature_scale_F.copy_(channel_scale(head.fc_inputs(features_MF)))


@torch.no_grad()
def initialise_eagle1(head: Eagle1Head, target: Target, sample: FeatureBatch) -> None:
    """Random layer; ``fc`` sees every channel of embedding and feature at size one.

    The scale is taken from pairs of a feature and the next token, which is the assistant's.
    """
    initialise_layer(head)
    tokens_M = sample.tokens_BT[:, 1:][sample.assistant_BT[:, 1:]]
    features_MH = sample.features_BTF[:, :-1][sample.assistant_BT[:, 1:]]
    head.feature_scale_F.copy_(channel_scale(head.fc_inputs(tokens_M, features_MH)))
    # What fc gives is to be of the features' own size, which the head predicts.
    head.fc.weight.mul_(features_MH.float().square().mean().sqrt())


def initialise_layer(head: DraftHead) -> None:
    """Small random matrices, norms of weight one, and an ``fc`` that keeps the size of inputs."""
    for name, weight in head.named_parameters():
        if weight.dim() == 2:
            torch.nn.init.normal_(weight, std=_STD)
        elif "norm" in name:
            torch.nn.init.ones_(weight)
    # Scaled features have size one in every channel: so has h with this deviation.
    torch.nn.init.normal_(head.fc.weight, std=head.fc.in_features**-0.5)


def channel_scale(inputs_MF: torch.Tensor) -> torch.Tensor:
    """One over the root mean square of each channel, float32 [F]; bounded for dead channels."""
    size_F = inputs_MF.float().square().mean(0).sqrt()
    return 1 / size_F.clamp(min=1e-3 * size_F.mean().clamp(min=1e-6))
