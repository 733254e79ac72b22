"""The chain inside a tree, for requests that cannot be verified as a tree."""

import torch

from vllm_eagle3.tree import mask
from vllm_eagle3.tree.types import DraftTree


def best_chain(tree: DraftTree, depth: int) -> DraftTree:
    """Keep each node's best child only: a chain, then detached nodes.

    Args:
        tree: with siblings in order of falling score, so that the first child is the best.
        depth: levels to follow at most.

    Returns:
        A tree of the same size. Detached nodes keep token 0 and are never accepted.
    """
    num_nodes = tree.parents_BN.shape[1]
    device = tree.parents_BN.device
    nodes_N = torch.arange(num_nodes, device=device)
    current_B1 = torch.zeros_like(tree.tokens_BN[:, :1])
    path = [current_B1]
    alive_B1 = torch.ones_like(current_B1, dtype=torch.bool)
    length_B1 = torch.zeros_like(current_B1)
    for _ in range(min(depth, num_nodes - 1)):
        is_child_BN = (tree.parents_BN == current_B1) & (nodes_N > 0)
        alive_B1 = alive_B1 & is_child_BN.any(dim=1, keepdim=True)
        # argmax of a mask is its first true column.
        current_B1 = is_child_BN.int().argmax(dim=1, keepdim=True)
        length_B1 = length_B1 + alive_B1
        path.append(current_B1)
    path_BN = torch.cat(path, dim=1)
    path_BN = torch.nn.functional.pad(path_BN, (0, num_nodes - path_BN.shape[1]))
    on_chain_BN = nodes_N <= length_B1

    parents_BN = (nodes_N - 1).where(on_chain_BN, -1).int()
    return DraftTree(
        tokens_BN=tree.tokens_BN.gather(1, path_BN).where(on_chain_BN, 0),
        parents_BN=parents_BN,
        depths_BN=mask.depths(parents_BN),
        ancestor_bits_BN=mask.ancestor_bits(parents_BN),
        scores_BN=tree.scores_BN.gather(1, path_BN).where(on_chain_BN, 0.0),
    )
