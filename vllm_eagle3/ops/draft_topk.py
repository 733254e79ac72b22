"""The best children that the draft offers for each node."""

import torch

from vllm_eagle3.ops.device import num_sms
from vllm_eagle3.ops.dispatch import Impl, check, check_same_device, check_vector, resolve

MAX_K = 16  # of the compiled kernel; "auto" runs torch beyond
_LOGITS = (torch.bfloat16, torch.float16, torch.float32)
_BLOCK_BYTES = 256 * 16  # one vector for each thread of a block
_MAX_SPLITS = 64  # one warp merges the splits of a row


def draft_topk(
    logits_MV: torch.Tensor,
    k: int,
    offsets_V: torch.Tensor | None = None,
    *,
    impl: Impl = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest log-probabilities of each row, falling, and the tokens they belong to.

    The log-softmax at temperature 1 is taken in float32. Equal inputs give equal outputs on
    one device. Among equal logits, the compiled kernel takes the lower id first; torch takes
    any.

    A row that holds NaN or +inf, or -inf only, has NaN for all its log-probabilities, and some
    k different tokens.

    Args:
        logits_MV: float, over the draft vocabulary; its rows may be further apart than V.
        k: children for each row, at most V; at most 16 with ``impl="extension"``.
        offsets_V: int64 target token minus draft id of each draft id, EAGLE-3's ``d2t``;
            the ids themselves are the tokens where not given.

    Returns:
        log-probabilities ``[M, k]`` float32; tokens ``[M, k]`` int64.

    Raises:
        ValueError: logits that are not a float matrix, k out of range, or offsets of another
            type, length or device.
    """
    check_logits(logits_MV, k, offsets_V)
    if not use_extension(impl, logits_MV, k):
        return _draft_topk_torch(logits_MV, k, offsets_V)
    log_probs_MK = logits_MV.new_empty(logits_MV.shape[0], k, dtype=torch.float32)
    tokens_MK = logits_MV.new_empty(logits_MV.shape[0], k, dtype=torch.int64)
    scratch = split_scratch(logits_MV, k)
    torch.ops.vllm_eagle3.draft_topk(logits_MV, offsets_V, *scratch, log_probs_MK, tokens_MK)
    return log_probs_MK, tokens_MK


def check_logits(logits_MV: torch.Tensor, k: int, offsets_V: torch.Tensor | None) -> None:
    """Raise ``ValueError`` as :func:`draft_topk` says."""
    check(
        logits_MV.dim() == 2 and logits_MV.is_floating_point(),
        f"logits_MV must be a float matrix, got {logits_MV.dtype} {tuple(logits_MV.shape)}",
    )
    vocabulary = logits_MV.shape[1]
    check(
        1 <= k <= vocabulary,
        f"k must be between 1 and the vocabulary of {vocabulary}, got {k}",
    )
    if offsets_V is not None:
        check_vector("offsets_V", offsets_V, vocabulary, torch.int64)
        check_same_device(logits_MV=logits_MV, offsets_V=offsets_V)


def use_extension(impl: Impl, logits_MV: torch.Tensor, k: int) -> bool:
    """Whether the compiled kernel runs; ``ValueError`` where only torch can and may not."""
    if resolve(impl, logits_MV.device, ("extension",)) != "extension":
        return False
    can_run = k <= MAX_K and logits_MV.dtype in _LOGITS and logits_MV.stride(1) == 1
    check(
        can_run or impl == "auto",
        f'impl="extension" takes at most {MAX_K} children of bfloat16, float16 or float32 '
        f"logits with contiguous rows, got k={k}, {logits_MV.dtype} and strides "
        f'{logits_MV.stride()}: use impl="auto"',
    )
    return can_run


def split_scratch(logits_MV: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Memory for the best k of each split of a row [M, S, k], and its sum [M, S, 2]."""
    num_rows, vocabulary = logits_MV.shape
    splits = _num_splits(num_rows, vocabulary * logits_MV.element_size(), logits_MV.device)
    return (
        logits_MV.new_empty(num_rows, splits, k, dtype=torch.int64),
        logits_MV.new_empty(num_rows, splits, 2, dtype=torch.float32),
    )


def _num_splits(num_rows: int, row_bytes: int, device: torch.device) -> int:
    """Blocks that share a row: two for each multiprocessor, if each thread then has work."""
    if device.type != "cuda" or num_rows == 0:
        return 1
    return max(1, min(2 * num_sms(device) // num_rows, -(-row_bytes // _BLOCK_BYTES), _MAX_SPLITS))


def _draft_topk_torch(
    logits_MV: torch.Tensor, k: int, offsets_V: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    ids_MK = logits_MV.topk(k, dim=1).indices
    log_probs_MK = logits_MV.log_softmax(dim=1, dtype=torch.float32).gather(1, ids_MK)
    return log_probs_MK, ids_MK if offsets_V is None else ids_MK + offsets_V[ids_MK]
