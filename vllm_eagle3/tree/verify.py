"""Verification: the walk through the tree that the target's own tokens select.

The target draws one token at each node, from the distribution that plain decoding would use
there. The walk descends to the child that carries the token drawn at the current node; where
no child does, that token is the bonus token and the walk ends.

The children of a node are a deterministic choice, so the proposal is a point mass on each,
and rejection sampling (arXiv 2302.01318) accepts a child of token x with probability p(x)
and otherwise zeroes p(x) and renormalises: in sum, one draw from p. The emitted tokens are
distributed as without drafts, whatever the drafts were.
"""

import torch

from vllm_eagle3.tree.types import Acceptance


def verify(
    target_tokens_BN: torch.Tensor,
    draft_tokens_BN: torch.Tensor,
    parents_BN: torch.Tensor,
    num_nodes_B: torch.Tensor,
    max_depth: int | None = None,
) -> Acceptance:
    """Walk from the root along the target's tokens.

    Among children of one token, which a draft never proposes but a caller may, the lowest
    index is taken. Detached nodes and those from ``num_nodes_B`` on are never accepted.

    Args:
        target_tokens_BN: integer; the token that the target drew at each node.
        draft_tokens_BN: integer; the token of each node. The root's is not read.
        parents_BN: integer; ``NO_PARENT`` for the root and for detached nodes.
        num_nodes_B: integer; the nodes that exist in each tree, the root included: trees
            are trimmed at the end.
        max_depth: bound on the depth, where known; saves steps.
    """
    batch, num_nodes = parents_BN.shape
    device = parents_BN.device
    nodes_N = torch.arange(num_nodes, device=device)
    exists_BN = nodes_N < num_nodes_B.unsqueeze(1)

    node_B = torch.zeros(batch, dtype=torch.int64, device=device)
    walking_B = torch.ones(batch, dtype=torch.bool, device=device)
    path_BN = torch.zeros(batch, num_nodes, dtype=torch.int32, device=device)
    path_len_B = torch.ones(batch, dtype=torch.int32, device=device)
    last_step = num_nodes - 1 if max_depth is None else min(max_depth, num_nodes - 1)
    for step in range(1, last_step + 1):
        node_B1 = node_B.unsqueeze(1)
        is_child_BN = (parents_BN == node_B1) & exists_BN & walking_B.unsqueeze(1)
        is_next_BN = is_child_BN & (draft_tokens_BN == target_tokens_BN.gather(1, node_B1))
        lowest_B = nodes_N.where(is_next_BN, num_nodes).amin(dim=1)
        walking_B = lowest_B < num_nodes
        node_B = lowest_B.where(walking_B, 0)
        path_BN[:, step] = node_B
        path_len_B += walking_B

    emitted_BN = target_tokens_BN.gather(1, path_BN.long()).to(torch.int64)
    return Acceptance(
        path_BN=path_BN,
        path_len_B=path_len_B,
        tokens_BN=emitted_BN.where(nodes_N < path_len_B.unsqueeze(1), 0),
    )


def sample_walk(
    target_probs_BNV: torch.Tensor,
    draft_tokens_BN: torch.Tensor,
    parents_BN: torch.Tensor,
    num_nodes_B: torch.Tensor,
    generator: torch.Generator | None = None,
) -> Acceptance:
    """Draw a token at each node from the target's distribution there, then walk.

    Args:
        target_probs_BNV: float; what plain sampling would draw from after this node's path.
        generator: source of the draws; the global one where not given.
    """
    draws = torch.multinomial(target_probs_BNV.flatten(0, 1), 1, generator=generator)
    target_tokens_BN = draws.view(target_probs_BNV.shape[:2])
    return verify(target_tokens_BN, draft_tokens_BN, parents_BN, num_nodes_B)
