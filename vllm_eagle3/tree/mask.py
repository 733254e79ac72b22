"""Who sees whom: ancestor bits, depths and the attention mask of a tree.

A node sees the prefix, the root, its ancestors and itself:
``bits[i] = bits[parent[i]] | (1 << i)``, and its rotary position is the root's plus its depth.
Source: EAGLE-2 (arXiv 2406.16858), section 4.2.

A detached node (``NO_PARENT``, but not node 0) is masked like a child of the root, which
keeps its row of the forward well defined; only the verification, which never accepts it,
tells the two apart.

    python -m vllm_eagle3.tree.mask        draws a tree and its mask in the terminal
"""

import torch

from vllm_eagle3.tree.types import NO_PARENT


def ancestor_bits(parents_BN: torch.Tensor, max_depth: int | None = None) -> torch.Tensor:
    """Bits of each node and of all its ancestors.

    Args:
        parents_BN: integer ``[..., N]``, N <= 64.
        max_depth: bound on the depth, where known; saves steps.

    Returns:
        int64 ``[..., N]``; bit 63 is the sign of the word.
    """
    num_nodes = parents_BN.shape[-1]
    nodes_N = torch.arange(num_nodes, device=parents_BN.device)
    bits_BN = (torch.ones_like(nodes_N) << nodes_N).expand(parents_BN.shape)
    # Pointer doubling: after s steps, the 2**s nearest are in and `above` is 2**s up.
    above_BN = parents_BN.long().clamp(min=0)
    for _ in range(_num_doublings(num_nodes, max_depth)):
        bits_BN = bits_BN | bits_BN.gather(-1, above_BN)
        above_BN = above_BN.gather(-1, above_BN)
    return bits_BN


def depths(parents_BN: torch.Tensor, max_depth: int | None = None) -> torch.Tensor:
    """Levels below the root of each node.

    Args:
        parents_BN: integer ``[..., N]``.
        max_depth: bound on the depth, where known; saves steps.

    Returns:
        int32 ``[..., N]``; 0 for the root, 1 for detached nodes.
    """
    num_nodes = parents_BN.shape[-1]
    nodes_N = torch.arange(num_nodes, device=parents_BN.device)
    depths_BN = (nodes_N > 0).int().expand(parents_BN.shape)
    above_BN = parents_BN.long().clamp(min=0)
    for _ in range(_num_doublings(num_nodes, max_depth)):
        depths_BN = depths_BN + depths_BN.gather(-1, above_BN)
        above_BN = above_BN.gather(-1, above_BN)
    return depths_BN


def bits_to_mask(bits_BN: torch.Tensor, num_nodes: int) -> torch.Tensor:
    """Spell ancestor bits out.

    Args:
        bits_BN: int64 ``[..., N]``.
        num_nodes: columns of the mask, at most 64.

    Returns:
        bool ``[..., N, num_nodes]``: row i is true where node i sees node j.
    """
    nodes_N = torch.arange(num_nodes, device=bits_BN.device)
    # The shift is arithmetic, which the `& 1` undoes for words with bit 63 set.
    return (bits_BN.unsqueeze(-1) >> nodes_N) & 1 == 1


def chain_parents(
    num_nodes: int, length: int, device: torch.device | str | None = None
) -> torch.Tensor:
    """A chain of ``length`` drafts below the root; the nodes after it are detached.

    ``length=0`` is a root with detached nodes only.

    Returns:
        int32 ``[num_nodes]``.
    """
    nodes_N = torch.arange(num_nodes, device=device, dtype=torch.int32)
    return (nodes_N - 1).where(nodes_N <= length, NO_PARENT)


def _num_doublings(num_nodes: int, max_depth: int | None) -> int:
    """The least s such that 2**s nodes reach from the deepest node to the root."""
    deepest = num_nodes - 1 if max_depth is None else min(max_depth, num_nodes - 1)
    return deepest.bit_length()


if __name__ == "__main__":
    from vllm_eagle3.tree.draw import main

    main()
