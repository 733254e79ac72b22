"""From the pool of candidates to the trees of the request slots: :mod:`vllm_eagle3.tree.rerank`."""

import torch

from vllm_eagle3.ops.dispatch import (
    Impl,
    check,
    check_same_device,
    check_vector,
)
from vllm_eagle3.ops.expand_tree import expansion_of, pool_size, use_extension
from vllm_eagle3.tree import mask
from vllm_eagle3.tree.chain import best_chain
from vllm_eagle3.tree.rerank import rerank
from vllm_eagle3.tree.types import DraftTree, GrowthBuffers, TreeBuffers


def build_tree(
    growth: GrowthBuffers,
    level: int,
    num_reqs: int,
    slots_B: torch.Tensor,
    chain_only_R: torch.Tensor,
    buffers: TreeBuffers,
    draft_tokens_BM: torch.Tensor,
    *,
    impl: Impl = "auto",
) -> None:
    """Keep the best N - 1 candidates of each request as its tree.

    Source: EAGLE-2 (arXiv 2406.16858), section 4.2; exactly
    :func:`~vllm_eagle3.tree.rerank.rerank` of the candidates offered up to ``level``. Nodes
    that no candidate fills are detached (token 0), and node 0 has token 0. Of a static tree
    (``growth.static``) its nodes are kept, the first N - 1 of them.

    Args:
        growth: the candidates, in the first ``num_reqs`` rows.
        level: the last level that was offered, from 1.
        num_reqs: requests of the batch, padding included (B).
        slots_B: int32 or int64 request slot. The tree of a request without one (negative, or
            not below R) is stored nowhere; no two requests share a slot.
        chain_only_R: bool by slot; such a request gets
            :func:`~vllm_eagle3.tree.chain.best_chain` of its tree instead.
        buffers: ``tokens``, ``parents``, ``depths``, ``ancestor_bits`` and ``scores`` are
            written in the rows of the slots.
        draft_tokens_BM: int64, contiguous in its last dimension; row b gets the tokens of
            nodes 1 to N - 1, whether the request has a slot or not.

    Raises:
        ValueError: a tensor of another type, layout, size or device; a level that the pool
            cannot hold.
    """
    num_slots, num_nodes = buffers.tokens_RN.shape
    capacity, num_candidates = growth.tokens_BC.shape
    num_offered = pool_size(level, growth.frontier_bits_BK.shape[1])
    check(
        0 <= num_reqs <= capacity,
        f"num_reqs must be between 0 and {capacity}, for which growth has rows, got {num_reqs}",
    )
    check(
        level >= 1 and num_offered <= num_candidates,
        f"level={level} is none of which growth holds the candidates ({num_candidates})",
    )
    check_vector("slots_B", slots_B, num_reqs, torch.int32, torch.int64)
    check_vector("chain_only_R", chain_only_R, num_slots, torch.bool)
    check(
        draft_tokens_BM.dim() == 2
        and draft_tokens_BM.dtype == torch.int64
        and draft_tokens_BM.stride(1) == 1
        and draft_tokens_BM.shape[0] >= num_reqs
        and draft_tokens_BM.shape[1] >= num_nodes - 1,
        f"draft_tokens_BM must be int64 with contiguous rows, at least "
        f"[{num_reqs}, {num_nodes - 1}], got {draft_tokens_BM.dtype} "
        f"{tuple(draft_tokens_BM.shape)} with strides {draft_tokens_BM.stride()}",
    )
    check_same_device(
        growth=growth.tokens_BC,
        slots_B=slots_B,
        chain_only_R=chain_only_R,
        buffers=buffers.tokens_RN,
        draft_tokens_BM=draft_tokens_BM,
    )
    if num_reqs == 0:
        return
    if use_extension(impl, growth):
        torch.ops.vllm_eagle3.build_tree(
            growth.tokens_BC,
            growth.scores_BC,
            growth.parents_BC,
            growth.static and growth.static.kept(level),
            num_offered,
            level,
            num_reqs,
            slots_B,
            chain_only_R,
            buffers.tokens_RN,
            buffers.parents_RN,
            buffers.depths_RN,
            buffers.ancestor_bits_RN,
            buffers.scores_RN,
            draft_tokens_BM,
        )
        return
    slots_B = slots_B[:num_reqs].long()
    has_slot_B = (slots_B >= 0) & (slots_B < num_slots)
    tree = _tree_torch(
        growth, level, num_nodes, chain_only_R[slots_B.where(has_slot_B, 0)] & has_slot_B
    )
    draft_tokens_BM[:num_reqs, : num_nodes - 1] = tree.tokens_BN[:, 1:]
    _store_torch(tree, slots_B, has_slot_B, buffers)


def _tree_torch(
    growth: GrowthBuffers, level: int, num_nodes: int, is_chain_B: torch.Tensor
) -> DraftTree:
    expansion = expansion_of(growth, level, is_chain_B.shape[0])
    kept_M = growth.static and growth.static.kept(level)[: num_nodes - 1]
    num_kept = expansion.scores_BC.shape[1] if kept_M is None else len(kept_M)
    num_filled = min(num_nodes, num_kept + 1)
    tree = rerank(expansion, num_filled, kept_M=kept_M)
    chain = best_chain(tree, level)
    is_chain_B1 = is_chain_B.unsqueeze(1)
    detached_N = mask.chain_parents(num_nodes, 0, is_chain_B.device)
    fill = {
        "tokens_BN": torch.zeros_like(detached_N, dtype=torch.int64),
        "parents_BN": detached_N,
        "depths_BN": mask.depths(detached_N, max_depth=1),
        "ancestor_bits_BN": mask.ancestor_bits(detached_N, max_depth=1),
        "scores_BN": torch.zeros_like(detached_N, dtype=torch.float32),
    }
    for name, fill_N in fill.items():
        chosen_BN = torch.where(is_chain_B1, getattr(chain, name), getattr(tree, name))
        rest_BN = fill_N[num_filled:].expand(chosen_BN.shape[0], -1)
        fill[name] = torch.cat([chosen_BN, rest_BN], dim=1)
    return DraftTree(**fill)


def _store_torch(
    tree: DraftTree, slots_B: torch.Tensor, has_slot_B: torch.Tensor, buffers: TreeBuffers
) -> None:
    # A request without a slot repeats the write of one that has a slot: the same values
    # twice. Where no request has one, slot 0 keeps what it holds.
    stand_in_1 = has_slot_B.byte().argmax(keepdim=True)
    any_slot_1 = has_slot_B[stand_in_1]
    source_B = torch.arange(slots_B.shape[0], device=slots_B.device).where(has_slot_B, stand_in_1)
    slots_B = slots_B[source_B].where(any_slot_1, 0)
    for name in ("tokens", "parents", "depths", "ancestor_bits", "scores"):
        rows_RN = getattr(buffers, f"{name}_RN")
        values_BN = getattr(tree, f"{name}_BN")[source_B]
        rows_RN[slots_B] = values_BN.where(any_slot_1.unsqueeze(1), rows_RN[slots_B])
