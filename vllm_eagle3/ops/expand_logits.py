"""From the logits of a draft forward to the next frontier, in as few launches as it takes."""

import torch

from vllm_eagle3.ops.dispatch import Impl, check, check_same_device
from vllm_eagle3.ops.draft_topk import check_logits, draft_topk, split_scratch, use_extension
from vllm_eagle3.ops.expand_tree import check_level, expand_tree, tensors_of
from vllm_eagle3.tree.types import GrowthBuffers


def expand_logits(
    growth: GrowthBuffers,
    logits_MV: torch.Tensor,
    offsets_V: torch.Tensor | None,
    level: int,
    num_reqs: int,
    root_positions_B: torch.Tensor,
    max_position: int,
    input_ids_M: torch.Tensor,
    positions_M: torch.Tensor,
    *,
    impl: Impl = "auto",
) -> None:
    """:func:`~vllm_eagle3.ops.draft_topk` and :func:`~vllm_eagle3.ops.expand_tree` in one.

    The children of the draft's rows never leave the chip: two kernels instead of three, of
    which the second does the work of two.

    Args:
        logits_MV: float, over the draft vocabulary, of the roots at level 1 (row b), of the
            frontier below (row ``b * K + k``). Rows past the batch's are not read.
        offsets_V: int64 target token minus draft id of each draft id, or None.
        growth, level, num_reqs, root_positions_B, max_position, input_ids_M, positions_M: as
            in :func:`~vllm_eagle3.ops.expand_tree`.

    Raises:
        ValueError: as either of the two.
    """
    num_rows = check_level(growth, level, num_reqs, root_positions_B, input_ids_M, positions_M)
    K = growth.frontier_bits_BK.shape[1]
    check_logits(logits_MV, K, offsets_V)
    check(
        logits_MV.shape[0] >= num_rows,
        f"logits_MV must have at least {num_rows} rows, got {logits_MV.shape[0]}",
    )
    check_same_device(growth=growth.tokens_BC, logits_MV=logits_MV)
    if num_reqs == 0:
        return
    logits_MV = logits_MV[:num_rows]
    where = (level, num_reqs, root_positions_B, max_position, input_ids_M, positions_M)
    if use_extension(impl, logits_MV, K):
        scratch = split_scratch(logits_MV, K)
        torch.ops.vllm_eagle3.expand_logits(
            *tensors_of(growth, level), logits_MV, offsets_V, *scratch, *where
        )
        return
    children = draft_topk(logits_MV, K, offsets_V, impl=impl)
    expand_tree(growth, *children, *where, impl=impl)
