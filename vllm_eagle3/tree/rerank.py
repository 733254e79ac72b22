"""Reranking: from the pool of candidates to the tree that the target verifies.

Source: EAGLE-2 (arXiv 2406.16858), section 4.2: the best candidates of all levels, not those
of the last frontier. A score never rises along a path and a parent enters the pool before
its children, so with ties decided by pool index a kept node's parent is kept too and stands
before it: ``parent[i] < i``, and every prefix of the tree is the best tree of its size.
"""

import torch

from vllm_eagle3.tree import mask
from vllm_eagle3.tree.expand import Expansion
from vllm_eagle3.tree.types import NO_PARENT, DraftTree


def rerank(
    expansion: Expansion,
    num_nodes: int,
    root_tokens_B: torch.Tensor | None = None,
    kept_M: torch.Tensor | None = None,
) -> DraftTree:
    """Keep the ``num_nodes - 1`` best candidates, best first, below a root.

    Args:
        expansion: the candidates.
        num_nodes: nodes of the tree, the root included; 2 to 64.
        root_tokens_B: integer tokens of the roots; zeros where not given.
        kept_M: int64 [num_nodes - 1] pool indices of the nodes to keep instead, whatever their
            scores, a parent before its children.

    Raises:
        ValueError: fewer candidates than nodes, or more nodes than a 64-bit mask holds.
    """
    batch, num_candidates = expansion.scores_BC.shape
    if not 1 < num_nodes <= min(num_candidates + 1, 64):
        raise ValueError(
            f"num_nodes={num_nodes} must be between 2 and {min(num_candidates + 1, 64)}: the "
            f"expansion offers {num_candidates} candidates, and a mask holds 64 nodes"
        )
    if kept_M is None:
        order_BC = expansion.scores_BC.sort(dim=1, descending=True, stable=True).indices
        kept_BM = order_BC[:, : num_nodes - 1]  # M = N - 1, the nodes below the root
    else:
        kept_BM = kept_M.expand(batch, -1)

    # Pool index -> node, shifted by one column: NO_PARENT looks up the root.
    node_BC1 = torch.zeros(batch, num_candidates + 1, dtype=torch.int32, device=kept_BM.device)
    nodes_M = torch.arange(1, num_nodes, dtype=torch.int32, device=kept_BM.device)
    node_BC1.scatter_(1, kept_BM + 1, nodes_M.expand_as(kept_BM))
    parents_BM = node_BC1.gather(1, expansion.parents_BC.gather(1, kept_BM).long() + 1)

    parents_BN = _below_root(parents_BM, NO_PARENT)
    tokens_BN = _below_root(expansion.tokens_BC.gather(1, kept_BM), 0)
    if root_tokens_B is not None:
        tokens_BN[:, 0] = root_tokens_B
    return DraftTree(
        tokens_BN=tokens_BN,
        parents_BN=parents_BN,
        depths_BN=mask.depths(parents_BN, max_depth=expansion.level),
        ancestor_bits_BN=mask.ancestor_bits(parents_BN, max_depth=expansion.level),
        scores_BN=_below_root(expansion.scores_BC.gather(1, kept_BM), 0.0),
    )


def _below_root(values_BM: torch.Tensor, root: float) -> torch.Tensor:
    """Prepend a root's value to those of the nodes below it."""
    return torch.nn.functional.pad(values_BM, (1, 0), value=root)
