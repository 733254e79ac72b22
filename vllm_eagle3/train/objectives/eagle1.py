"""Feature regression and token cross-entropy (EAGLE, arXiv 2401.15077, section 3.2).

Slot t takes the feature f_t and token t+1 and predicts the feature f_(t+1); with the target's
output matrix W, p = softmax(W f_(t+1)) and q = softmax(W f^_(t+1)) are about token t+2:

    L_reg = smooth-L1(f^_(t+1), f_(t+1))             mean over the H channels
    L_cls = - sum_v p(v) log q(v)
    L     = mean over counted slots of L_reg + w_cls L_cls,          w_cls = 0.1

While training, noise uniform in [-0.1, 0.1] is added to the features taken, not to those
predicted (section 4, "Training"): drafting works on features that are only nearly right.

EAGLE-2 has the same head and loss. It is HASS's first step alone; that this module's own
loss also has steps is for the measures: with ``decay`` 0 only the first is trained.

Shape suffixes: B sequences, T slots, M counted slots, H hidden, V vocabulary.
"""

import torch
import torch.nn.functional as F

from vllm_eagle3.train.eagle1 import Eagle1Head
from vllm_eagle3.train.objectives.cross_entropy import SharedHeadCrossEntropy
from vllm_eagle3.train.objectives.result import LossSettings


def feature_terms(
    head: Eagle1Head,
    predicted_MH: torch.Tensor,
    features_MH: torch.Tensor,
    settings: LossSettings,
) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """The loss on predicted features, with HASS's top-K term if ``settings`` give it a weight.

    Args:
        predicted_MH, features_MH: f^ and f of the same positions.

    Returns:
        the loss; what it consists of, unweighted and without gradient: ``feature`` = L_reg,
        ``tokens`` = L_cls and ``top_k``, each a mean over the M rows; the most likely token of
        each row, int64 [M]; whether it is the target's, bool [M].
    """
    accurate = torch.promote_types(predicted_MH.dtype, torch.float32)
    distance_MH = F.smooth_l1_loss(
        predicted_MH.to(accurate), features_MH.to(accurate), reduction="none"
    )
    # Not mean(): no slot may count, and no NaN may come of it.
    feature = distance_MH.mean(-1).sum() / max(1, len(features_MH))
    weighted, tokens, top_k, drafted_M, agree_M = SharedHeadCrossEntropy.apply(
        predicted_MH,
        features_MH,
        head.output_matrix,
        settings.token_weight,
        settings.top_k_weight,
        settings.top_k if settings.top_k_weight else 0,
    )
    parts = {"feature": feature.detach(), "tokens": tokens, "top_k": top_k}
    return feature + weighted, parts, drafted_M, agree_M


def noisy(features_BTH: torch.Tensor, half_width: float) -> torch.Tensor:
    """Features with noise uniform in [-half_width, half_width], of torch's global generator."""
    if not half_width:
        return features_BTH
    return features_BTH + half_width * (2 * torch.rand_like(features_BTH) - 1)
