"""The best children that the draft offers for each node."""

import torch

from vllm_eagle3.ops.dispatch import check


def draft_topk(logits_MV: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest log-probabilities of each row, falling, and their token ids.

    The log-softmax at temperature 1 is taken in float32 and of the k chosen logits only.
    Equal inputs give equal outputs on one device, ties included.

    Args:
        logits_MV: float, over the draft vocabulary.
        k: children for each row, at most V.

    Returns:
        log-probabilities ``[M, k]`` float32; ids in the draft vocabulary ``[M, k]`` int64.

    Raises:
        ValueError: logits that are not a float matrix, or k out of range.
    """
    check(
        logits_MV.dim() == 2 and logits_MV.is_floating_point(),
        f"logits_MV must be a float matrix, got {logits_MV.dtype} {tuple(logits_MV.shape)}",
    )
    check(
        1 <= k <= logits_MV.shape[1],
        f"k must be between 1 and the vocabulary of {logits_MV.shape[1]}, got {k}",
    )
    best_MK, ids_MK = logits_MV.topk(k, dim=1)
    total_M1 = logits_MV.float().logsumexp(dim=1, keepdim=True)
    return best_MK.float() - total_M1, ids_MK
