"""Draft trees below many slots of some documents, grown with the head in PyTorch.

What a server does in a round (EAGLE-2, arXiv 2406.16858, section 4), for R roots at once: the
root of slot p is token p+1, its level-0 state is the head's output at slot p with the target's
features of slots 0..p, and a node of depth d stands at rotary position p+d and sees the step-0
keys of slots 0..p, its ancestors' and its own.

Shape suffixes: B documents, T slots, R roots, K top-k, E expanded nodes, N query heads (nodes in
``DraftTree``), J key heads, D head dimension, H hidden size, F captured features.
"""

from functools import partial

import torch

from vllm_eagle3.config import TreeConfig
from vllm_eagle3.ops import draft_topk
from vllm_eagle3.train.model import DraftHead
from vllm_eagle3.train.node_attention import NodeAttention, node_bias, num_columns, trees_at_once
from vllm_eagle3.tree import expand, mask
from vllm_eagle3.tree.rerank import rerank
from vllm_eagle3.tree.static import StaticTree
from vllm_eagle3.tree.types import DraftTree


class DocumentDrafter:
    """A head that has read some documents.

    Args:
        tokens_BT: int64, the documents, right-padded.
        features_BTF: the target's states that the head takes.
    """

    @torch.no_grad()
    def __init__(
        self, head: DraftHead, tokens_BT: torch.Tensor, features_BTF: torch.Tensor
    ) -> None:
        self.head, self._tokens_BT = head, tokens_BT
        self._group = head.config.num_heads // head.config.num_kv_heads
        self._keys_values = torch.empty(0), torch.empty(0)  # BJTD
        self._prepared = head.prepared(features_BTF.dtype)
        self._out_BTH = head.step(
            tokens_BT.roll(-1, 1),
            head.fuse(features_BTF),
            torch.arange(tokens_BT.shape[1], device=tokens_BT.device).unsqueeze(0),
            self._attend_to_documents,
            self._prepared,
        )

    def _attend_to_documents(self, q, k, v):
        self._keys_values = self._once(k), self._once(v)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    def _attend_from_nodes(self, attention: NodeAttention, bias: torch.Tensor, q, k, v):
        return attention(q, self._once(k), self._once(v), bias)

    def _once(self, repeated: torch.Tensor) -> torch.Tensor:
        """Key heads that were repeated to the query heads, one of each."""
        return repeated[:, :: self._group]

    @torch.no_grad()
    def trees(
        self, documents_R: torch.Tensor, slots_R: torch.Tensor, config: TreeConfig
    ) -> DraftTree:
        """A tree below each slot, which must have a token after it.

        Args:
            documents_R, slots_R: int64, rows and columns of ``tokens_BT``.
        """
        _, J, T, D = self._keys_values[0].shape
        logits = config.top_k * len(self.head.d2t)
        keys = J * num_columns(T, config.num_expanded) * D
        size = trees_at_once(slots_R.device, config.top_k, 4 * max(logits, keys))
        roots = zip(documents_R.split(size), slots_R.split(size), strict=True)
        parts = [self._grow(*part, config) for part in roots]
        return DraftTree(*(torch.cat([vars(p)[name] for p in parts]) for name in vars(parts[0])))

    def _grow(
        self, documents_R: torch.Tensor, slots_R: torch.Tensor, config: TreeConfig
    ) -> DraftTree:
        K, E, T = config.top_k, config.num_expanded, self._tokens_BT.shape[1]
        static = StaticTree.of(config, slots_R.device)
        out_RH = self._out_BTH[documents_R, slots_R]
        expansion = expand.start(*self._best(out_RH, K), static and static.frontier(1))
        hidden_RKH = self.head.feedback(out_RH).unsqueeze(1).expand(-1, K, -1)
        attention = NodeAttention(*self._keys_values, documents_R, E)
        for level in range(1, config.depth):
            positions_RK = (slots_R + level).unsqueeze(1).expand(-1, K)
            own_RKE = mask.bits_to_mask(expansion.frontier_bits_BK, E)
            bias = node_bias(slots_R, own_RKE, T, self._group, self._keys_values[0].dtype)
            attend = partial(self._attend_from_nodes, attention, bias)
            given = expansion.frontier_tokens_BK, hidden_RKH, positions_RK
            out_RKH = self.head.step(*given, attend, self._prepared)
            best = self._best(out_RKH, K)
            expansion = expand.grow(expansion, *best, static and static.frontier(level + 1))
            parents_RK1 = expansion.frontier_parent_BK.unsqueeze(-1)
            fed_RKH = self.head.feedback(out_RKH)
            hidden_RKH = fed_RKH.gather(1, parents_RK1.expand_as(fed_RKH))
        kept_M = static and static.kept(config.depth)
        roots_R = self._tokens_BT[documents_R, slots_R + 1]
        return rerank(expansion, config.num_nodes, roots_R, kept_M)

    def _best(self, out: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities and target ids of each row's k best children."""
        logits = self.head.logits(out).flatten(0, -2)
        log_probs, tokens = draft_topk(logits, k, self.head.d2t)
        return log_probs.view(*out.shape[:-1], k), tokens.view(*out.shape[:-1], k)
