"""Draft trees below many slots of one document, grown with the head in PyTorch.

What a server does in a round (EAGLE-2, arXiv 2406.16858, section 4), for R roots at once: the
root of slot p is token p+1, its level-0 state is the head's output at slot p with the target's
features of slots 0..p, and a node of depth d stands at rotary position p+d and sees the step-0
keys of slots 0..p, its ancestors' and its own.

Shape suffixes: R roots, K top-k, E expanded nodes, T slots, N query heads (nodes in
``DraftTree``), D head dimension, H hidden size, F captured features.
"""

import math

import torch

from vllm_eagle3.config import TreeConfig
from vllm_eagle3.train.model import DraftHead
from vllm_eagle3.tree import expand, mask
from vllm_eagle3.tree.rerank import rerank
from vllm_eagle3.tree.static import StaticTree
from vllm_eagle3.tree.types import DraftTree

_ROOTS = 64  # bounds the scores of one forward: 64 x K x heads x T x 4 bytes


class DocumentDrafter:
    """A head that has read one document.

    Args:
        tokens_T: int64, the document.
        features_TF: the target's states that the head takes.
    """

    @torch.no_grad()
    def __init__(self, head: DraftHead, tokens_T: torch.Tensor, features_TF: torch.Tensor) -> None:
        self.head, self.tokens_T = head, tokens_T
        positions_1T = torch.arange(len(tokens_T), device=tokens_T.device).unsqueeze(0)
        self._keys_NTD = self._values_NTD = torch.empty(0)
        out_1TH = head.step(
            tokens_T.roll(-1).unsqueeze(0),
            head.fuse(features_TF.unsqueeze(0)),
            positions_1T,
            self._attend_to_document,
        )
        self._out_TH = out_1TH[0]

    def _attend_to_document(self, q, k, v):
        self._keys_NTD, self._values_NTD = k[0], v[0]
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    @torch.no_grad()
    def trees(self, slots_R: torch.Tensor, config: TreeConfig) -> DraftTree:
        """A tree for each slot, which must have a token after it."""
        parts = [self._grow(slots, config) for slots in slots_R.split(_ROOTS)]
        return DraftTree(*(torch.cat([vars(p)[name] for p in parts]) for name in vars(parts[0])))

    def _grow(self, slots_R: torch.Tensor, config: TreeConfig) -> DraftTree:
        K = config.top_k
        static = StaticTree.of(config, slots_R.device)
        out_RH = self._out_TH[slots_R]
        expansion = expand.start(*self._best(out_RH, K), static and static.frontier(1))
        hidden_RKH = self.head.feedback(out_RH).unsqueeze(1).expand(-1, K, -1)
        attend = _TreeAttention(self._keys_NTD, self._values_NTD, slots_R)
        for level in range(1, config.depth):
            positions_RK = (slots_R + level).unsqueeze(1).expand(-1, K)
            attend.bits_RK = expansion.frontier_bits_BK
            out_RKH = self.head.step(expansion.frontier_tokens_BK, hidden_RKH, positions_RK, attend)
            best = self._best(out_RKH, K)
            expansion = expand.grow(expansion, *best, static and static.frontier(level + 1))
            parents_RK1 = expansion.frontier_parent_BK.unsqueeze(-1)
            fed_RKH = self.head.feedback(out_RKH)
            hidden_RKH = fed_RKH.gather(1, parents_RK1.expand_as(fed_RKH))
        kept_M = static and static.kept(config.depth)
        return rerank(expansion, config.num_nodes, self.tokens_T[slots_R + 1], kept_M)

    def _best(self, out: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities and target ids of each row's k best children."""
        logits = self.head.logits(out)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        log_probs, ids = logits.log_softmax(-1).topk(k)
        return log_probs, self.head.draft_token_ids[ids]


class _TreeAttention:
    """Frontier nodes attend to the document up to their root, to their ancestors and themselves.

    Keys of the expanded nodes are collected from call to call.
    """

    def __init__(
        self, keys_NTD: torch.Tensor, values_NTD: torch.Tensor, slots_R: torch.Tensor
    ) -> None:
        self.keys_NTD, self.values_NTD = keys_NTD, values_NTD
        slots_T = torch.arange(keys_NTD.shape[1], device=slots_R.device)
        self.hidden_R11T = (slots_T > slots_R.unsqueeze(1))[:, None, None]
        self.tree_keys: list[torch.Tensor] = []
        self.tree_values: list[torch.Tensor] = []
        self.bits_RK = torch.empty(0)

    def __call__(self, q_RNKD, k_RNKD, v_RNKD):
        self.tree_keys.append(k_RNKD)
        self.tree_values.append(v_RNKD)
        keys_RNED, values_RNED = torch.cat(self.tree_keys, 2), torch.cat(self.tree_values, 2)
        num_slots, num_expanded = self.keys_NTD.shape[1], keys_RNED.shape[2]
        own_RKE = mask.bits_to_mask(self.bits_RK, num_expanded)
        # Two products: the document's keys are the same for every root, the tree's are not.
        document = (q_RNKD @ self.keys_NTD.mT).masked_fill(self.hidden_R11T, -math.inf)
        tree = (q_RNKD @ keys_RNED.mT).masked_fill(~own_RKE.unsqueeze(1), -math.inf)
        scores = torch.cat((document, tree), -1) / math.sqrt(q_RNKD.shape[-1])
        accurate = torch.promote_types(scores.dtype, torch.float32)
        weights = scores.to(accurate).softmax(-1).to(q_RNKD.dtype)
        document, tree = weights.split((num_slots, num_expanded), -1)
        return document @ self.values_NTD + tree @ values_RNED
