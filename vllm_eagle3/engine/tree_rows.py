"""Query rows of trees, as attention layers take them: the target's and the draft's."""

from dataclasses import dataclass

import torch


@dataclass
class TreeRows:
    """Query rows that attend to a cached prefix and, by ancestor bits, to tree nodes.

    Attributes:
        num_reqs: requests (B) that these rows belong to.
        num_tokens: query rows (T).
        query_start_loc: int32 [B + 1] first query row of each request.
        prefix_lens: int32 [B] cached positions that every row of a request sees.
        tree_start: int32 [B] row of each request's first node in the tree keys.
        tree_lens: int32 [B] nodes of each request, at most 64.
        ancestor_bits: int64 [T] nodes that a row sees.
        max_query_len, max_tree_len, max_prefix_len: host-side upper bounds.
        scratch: keys and values of all nodes, to which the step's own rows are added; None if
            the step's own rows are all nodes.
    """

    num_reqs: int
    num_tokens: int
    query_start_loc: torch.Tensor
    prefix_lens: torch.Tensor
    tree_start: torch.Tensor
    tree_lens: torch.Tensor
    ancestor_bits: torch.Tensor
    max_query_len: int
    max_tree_len: int
    max_prefix_len: int
    scratch: tuple[torch.Tensor, torch.Tensor] | None = None
