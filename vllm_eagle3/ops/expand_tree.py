"""One level of the drafting round: :mod:`vllm_eagle3.tree.expand`, in place."""

import torch

from vllm_eagle3.config import MAX_EXPANDED
from vllm_eagle3.ops.dispatch import (
    Impl,
    check,
    check_matrix,
    check_same_device,
    check_vector,
    resolve,
)
from vllm_eagle3.tree.expand import Expansion, grow, start
from vllm_eagle3.tree.types import GrowthBuffers


def expand_tree(
    growth: GrowthBuffers,
    log_probs_MK: torch.Tensor,
    tokens_MK: torch.Tensor,
    level: int,
    num_reqs: int,
    root_positions_B: torch.Tensor,
    max_position: int,
    input_ids_M: torch.Tensor,
    positions_M: torch.Tensor,
    *,
    impl: Impl = "auto",
) -> None:
    """Offer the candidates of one level and make the best K of them the next frontier.

    Source: EAGLE-2 (arXiv 2406.16858), section 4.1; exactly :func:`~vllm_eagle3.tree.expand.start`
    at level 1 and :func:`~vllm_eagle3.tree.expand.grow` below: NaN counts as -inf, ties go to
    the candidate that was offered first. Of a static tree (``growth.static``) the candidates
    with children are the next frontier.

    The frontier becomes the draft's next rows, K for each request: row ``b * K + k`` is its
    token at position ``min(root position + level - 1, max_position)``.

    Args:
        growth: modified, in the first ``num_reqs`` rows. Must hold the levels above.
        log_probs_MK, tokens_MK: float32 and int64, the K best children of each row of the last
            draft forward: of the roots at level 1 (row b), of the frontier below
            (row ``b * K + k``). Rows past the batch's are not read.
        level: depth of the candidates below the root, from 1.
        num_reqs: requests of the batch, padding included (B).
        root_positions_B: int64 draft position at which a root's children are expanded. Must
            not share memory with ``positions_M``.
        max_position: the last position that the draft can embed.
        input_ids_M, positions_M: int32 or int64, and int64; the draft's inputs, of which the
            first ``B * K`` are written.

    Raises:
        ValueError: a tensor of another type, layout, size or device; a level whose candidates
            have no place in the pool.
    """
    num_rows = check_level(growth, level, num_reqs, root_positions_B, input_ids_M, positions_M)
    K = growth.frontier_bits_BK.shape[1]
    check_matrix("log_probs_MK", log_probs_MK, torch.float32)
    check_matrix("tokens_MK", tokens_MK, torch.int64)
    for name, children_MK in (("log_probs_MK", log_probs_MK), ("tokens_MK", tokens_MK)):
        check(
            children_MK.shape[0] >= num_rows and children_MK.shape[1] == K,
            f"{name} must be at least [{num_rows}, {K}], got {tuple(children_MK.shape)}",
        )
    check_same_device(growth=growth.tokens_BC, log_probs_MK=log_probs_MK, tokens_MK=tokens_MK)
    if num_reqs == 0:
        return
    if use_extension(impl, growth):
        torch.ops.vllm_eagle3.expand_tree(
            *tensors_of(growth, level),
            log_probs_MK,
            tokens_MK,
            level,
            num_reqs,
            root_positions_B,
            max_position,
            input_ids_M,
            positions_M,
        )
        return
    _offer_torch(growth, log_probs_MK[:num_rows], tokens_MK[:num_rows], level, num_reqs)
    best_BK = growth.frontier_index_BK[:num_reqs].long()
    input_ids_M[: num_reqs * K] = growth.tokens_BC[:num_reqs].gather(1, best_BK).flatten()
    positions_B = (root_positions_B[:num_reqs] + level - 1).clamp(max=max_position)
    positions_M[: num_reqs * K] = positions_B.repeat_interleave(K)


def pool_size(level: int, top_k: int) -> int:
    """Candidates offered up to a level: ``K + (level - 1) * K * K``."""
    return top_k + (level - 1) * top_k**2


def check_level(
    growth: GrowthBuffers,
    level: int,
    num_reqs: int,
    root_positions_B: torch.Tensor,
    input_ids_M: torch.Tensor,
    positions_M: torch.Tensor,
) -> int:
    """Check what all ways to offer a level share; returns the rows of the last draft forward."""
    check(level >= 1, f"level must be at least 1, got {level}")
    K = growth.frontier_bits_BK.shape[1]
    capacity, num_candidates = growth.tokens_BC.shape
    check(
        0 <= num_reqs <= capacity,
        f"num_reqs must be between 0 and {capacity}, for which growth has rows, got {num_reqs}",
    )
    check(
        pool_size(level, K) <= num_candidates,
        f"level={level} offers candidates up to {pool_size(level, K)}, growth holds "
        f"{num_candidates}",
    )
    check_vector("root_positions_B", root_positions_B, num_reqs, torch.int64)
    check_vector("input_ids_M", input_ids_M, num_reqs * K, torch.int32, torch.int64)
    check_vector("positions_M", positions_M, num_reqs * K, torch.int64)
    check_same_device(
        growth=growth.tokens_BC,
        root_positions_B=root_positions_B,
        input_ids_M=input_ids_M,
        positions_M=positions_M,
    )
    return num_reqs if level == 1 else num_reqs * K


def tensors_of(growth: GrowthBuffers, level: int) -> tuple[torch.Tensor | None, ...]:
    """In the order in which the compiled operations take them; last, who goes on if fixed."""
    return (
        growth.tokens_BC,
        growth.scores_BC,
        growth.parents_BC,
        growth.frontier_scores_BK,
        growth.frontier_index_BK,
        growth.frontier_bits_BK,
        growth.frontier_row_BK,
        growth.static and growth.static.frontier(level),
    )


def use_extension(impl: Impl, growth: GrowthBuffers) -> bool:
    """Whether the compiled kernel runs: for a frontier of at most 64."""
    K = growth.frontier_bits_BK.shape[1]
    if resolve(impl, growth.tokens_BC.device, ("extension",)) != "extension":
        return False
    can_run = K <= MAX_EXPANDED
    check(
        can_run or impl == "auto",
        f'impl="extension" takes a top_k of at most {MAX_EXPANDED}, got {K}: use impl="auto"',
    )
    return can_run


def expansion_of(growth: GrowthBuffers, level: int, num_reqs: int) -> Expansion:
    """The candidates up to a level as the reference has them; the pool's tensors are views."""
    K = growth.frontier_bits_BK.shape[1]
    pool = (slice(0, num_reqs), slice(0, pool_size(level, K)))
    index_BK = growth.frontier_index_BK[:num_reqs].long()
    return Expansion(
        tokens_BC=growth.tokens_BC[pool],
        scores_BC=growth.scores_BC[pool],
        parents_BC=growth.parents_BC[pool],
        frontier_tokens_BK=growth.tokens_BC[:num_reqs].gather(1, index_BK),
        frontier_scores_BK=growth.frontier_scores_BK[:num_reqs],
        frontier_index_BK=index_BK,
        frontier_parent_BK=growth.frontier_row_BK[:num_reqs] % K,
        frontier_bits_BK=growth.frontier_bits_BK[:num_reqs],
        level=level,
    )


def _offer_torch(
    growth: GrowthBuffers,
    log_probs_MK: torch.Tensor,
    tokens_MK: torch.Tensor,
    level: int,
    num_reqs: int,
) -> None:
    K = tokens_MK.shape[1]
    requests_B1 = torch.arange(num_reqs, device=tokens_MK.device).unsqueeze(1)
    frontier_K = growth.static and growth.static.frontier(level)
    if level == 1:
        expansion = start(log_probs_MK, tokens_MK, frontier_K)
        offered, row_BK = 0, requests_B1.expand(-1, K)
    else:
        before, offered = expansion_of(growth, level - 1, num_reqs), pool_size(level - 1, K)
        children = log_probs_MK.view(-1, K, K), tokens_MK.view(-1, K, K)
        expansion = grow(before, *children, frontier_K)
        row_BK = requests_B1 * K + expansion.frontier_parent_BK
    for name in ("tokens_BC", "scores_BC", "parents_BC"):
        pool_BC = getattr(expansion, name)
        getattr(growth, name)[:num_reqs, offered : pool_BC.shape[1]] = pool_BC[:, offered:]
    growth.frontier_scores_BK[:num_reqs] = expansion.frontier_scores_BK
    growth.frontier_index_BK[:num_reqs] = expansion.frontier_index_BK
    growth.frontier_bits_BK[:num_reqs] = expansion.frontier_bits_BK
    growth.frontier_row_BK[:num_reqs] = row_BK
