"""Compaction: the accepted path's rows move to where plain decoding would have put them.

The forward writes node i of a tree at place i of its request. After acceptance, place i
must hold node ``path[i]``. ``path[i] >= i``, and a node may be both a source and a
destination (path 0, 5, 6 with node 5 accepted too), so all rows are read before any is
written. Places past the path keep what they have: later tokens overwrite them.
"""

import torch


def compact_rows(
    rows_BN: torch.Tensor, path_BN: torch.Tensor, path_len_B: torch.Tensor
) -> torch.Tensor:
    """The rows of each request with those of the accepted path first.

    Args:
        rows_BN: ``[B, N, ...]``, any dtype.
        path_BN, path_len_B: as in :class:`~vllm_eagle3.tree.types.Acceptance`.

    Returns:
        a new tensor, ``[B, N, ...]``: row i is row ``path[i]`` for ``i < path_len``, and
        row i after that.
    """
    source_BN = _sources(path_BN, path_len_B)
    requests_B1 = torch.arange(rows_BN.shape[0], device=rows_BN.device).unsqueeze(1)
    return rows_BN[requests_B1, source_BN]


def compact_slots(
    cache: torch.Tensor,
    slots_BN: torch.Tensor,
    path_BN: torch.Tensor,
    path_len_B: torch.Tensor,
) -> None:
    """Move the accepted nodes' cache entries to consecutive slots, in place.

    Shapes do not depend on data and nothing waits for the device.

    Args:
        cache: ``[num_slots, ...]``, any dtype; modified.
        slots_BN: integer slot of each node, no slot twice; negative where there is none,
            and then nothing is read or written for that node.
        path_BN, path_len_B: as in :class:`~vllm_eagle3.tree.types.Acceptance`.
    """
    slots_BN = slots_BN.long()
    source_BN = slots_BN.gather(1, _sources(path_BN, path_len_B))
    target_M, source_M = slots_BN.flatten(), source_BN.flatten()
    valid_M = (target_M >= 0) & (source_M >= 0)
    # A node without a slot repeats the move of one that has a slot: the same value twice.
    # Where no node has one, slot 0 is copied onto itself.
    stand_in_1 = valid_M.byte().argmax(keepdim=True)
    any_valid_1 = valid_M[stand_in_1]
    target_M = target_M.where(valid_M, target_M[stand_in_1].where(any_valid_1, 0))
    source_M = source_M.where(valid_M, source_M[stand_in_1].where(any_valid_1, 0))
    cache[target_M] = cache[source_M]


def _sources(path_BN: torch.Tensor, path_len_B: torch.Tensor) -> torch.Tensor:
    """The node that place i takes its row from: ``path[i]``, or i past the path."""
    nodes_N = torch.arange(path_BN.shape[1], device=path_BN.device)
    return path_BN.long().where(nodes_N < path_len_B.unsqueeze(1), nodes_N)
