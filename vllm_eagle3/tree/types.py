"""The nouns that all packages speak.

Shape suffixes, one letter for each dimension:

    R  request slots of the engine (``max_num_reqs``)
    B  requests of the running batch
    T  token rows of the running batch
    N  nodes of a tree, the root included
    D  depth: levels below the root
    K  top-k: children for each expanded node
    C  candidates offered to the reranking, K + (D - 1) * K * K
    H  hidden size
    V  vocabulary (of the draft where ``log_probs`` come from it)

Node 0 is the root, the last accepted token. ``parent[i] < i`` always, so every prefix of
the node list is a tree: whatever trims the list leaves a valid tree. The ancestor bits of
node i hold the bits of itself and of all its ancestors; bit 63 is the sign of the word.
"""

from dataclasses import dataclass

import torch

from vllm_eagle3.config import TreeConfig
from vllm_eagle3.tree.static import StaticTree

NO_PARENT = -1  # of the root, and of a detached node, which nothing ever accepts


@dataclass
class DraftTree:
    """One tree for each of B requests, parents first.

    The nodes of a dynamic tree stand in order of falling score, those of a static tree in the
    order of its paths; siblings stand in order of falling score in both.

    Attributes:
        tokens_BN: int64 token ids; column 0 is the root's.
        parents_BN: int32 node index of the parent; ``NO_PARENT`` for the root and for
            detached nodes.
        depths_BN: int32 levels below the root; 0 for the root.
        ancestor_bits_BN: int64 bit masks of self and ancestors.
        scores_BN: float32 log-probability of the path from the root; 0 for the root.
    """

    tokens_BN: torch.Tensor
    parents_BN: torch.Tensor
    depths_BN: torch.Tensor
    ancestor_bits_BN: torch.Tensor
    scores_BN: torch.Tensor


@dataclass
class Acceptance:
    """What the verification accepted.

    Attributes:
        path_BN: int32 node indices of the accepted path, the root first; columns past
            ``path_len`` hold 0.
        path_len_B: int32 nodes on the path, the root included: accepted drafts + 1, which
            is also the number of emitted tokens.
        tokens_BN: int64 emitted tokens: the accepted drafts and then the bonus token;
            columns past ``path_len`` hold 0.
    """

    path_BN: torch.Tensor
    path_len_B: torch.Tensor
    tokens_BN: torch.Tensor


class TreeBuffers:
    """Trees and accepted paths of all request slots, at fixed device addresses.

    The one state that the engine's classes share. The speculator writes the trees, the
    verifier the paths; rows are indexed by vLLM's stable request slot.

    Attributes:
        tokens_RN, parents_RN, depths_RN, ancestor_bits_RN, scores_RN: as in
            :class:`DraftTree`; a slot without a tree holds detached nodes only.
        path_RN, path_len_R: as in :class:`Acceptance`.
    """

    def __init__(self, max_num_reqs: int, num_nodes: int, device: torch.device) -> None:
        def full(value: int | float, dtype: torch.dtype, *shape: int) -> torch.Tensor:
            return torch.full(shape, value, dtype=dtype, device=device)

        self.tokens_RN = full(0, torch.int64, max_num_reqs, num_nodes)
        self.parents_RN = full(NO_PARENT, torch.int32, max_num_reqs, num_nodes)
        self.depths_RN = full(0, torch.int32, max_num_reqs, num_nodes)
        self.ancestor_bits_RN = full(1, torch.int64, max_num_reqs, num_nodes)
        self.scores_RN = full(0.0, torch.float32, max_num_reqs, num_nodes)
        self.path_RN = full(0, torch.int32, max_num_reqs, num_nodes)
        self.path_len_R = full(1, torch.int32, max_num_reqs)


class GrowthBuffers:
    """What one drafting round carries from level to level, at fixed device addresses.

    Row b belongs to request b of the running batch, not to a slot. A CUDA graph of the round
    reads and writes these tensors; nothing in them outlives the round.

    Attributes:
        tokens_BC, scores_BC, parents_BC: int64, float32, int32; the pool of candidates in the
            order in which they are offered, the children of level 1 first. A parent is a
            pool index, or ``NO_PARENT`` below the root.
        frontier_scores_BK: float32; the nodes that the draft expands next.
        frontier_index_BK: int32 pool index.
        frontier_bits_BK: int64 ancestor bits over the expanded nodes, as in
            :class:`~vllm_eagle3.tree.expand.Expansion`.
        frontier_row_BK: int64; row of the last draft forward that holds the state of the
            node's parent: b at level 1, ``b * K + k`` below.
        static: the candidates that go on and that are kept if the trees are static, or None.
    """

    def __init__(self, max_batch: int, config: TreeConfig, device: torch.device) -> None:
        C, K = config.num_candidates, config.top_k

        def zeros(dtype: torch.dtype, columns: int) -> torch.Tensor:
            return torch.zeros(max_batch, columns, dtype=dtype, device=device)

        # Padded rows of a graph may be built before anything was offered there: a tree, too.
        self.tokens_BC = zeros(torch.int64, C)
        self.scores_BC = zeros(torch.float32, C)
        self.parents_BC = torch.full_like(self.tokens_BC, NO_PARENT, dtype=torch.int32)
        self.frontier_scores_BK = zeros(torch.float32, K)
        self.frontier_index_BK = zeros(torch.int32, K)
        self.frontier_bits_BK = zeros(torch.int64, K)
        self.frontier_row_BK = zeros(torch.int64, K)
        self.static = StaticTree.of(config, device)
