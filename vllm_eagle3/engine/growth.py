"""Growing trees with the draft: one forward over K nodes of each request for each level.

Source: EAGLE-2 (arXiv 2406.16858), section 4.1; the choice of nodes is
:mod:`vllm_eagle3.tree.expand`.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from vllm_eagle3 import ops
from vllm_eagle3.config import TreeConfig
from vllm_eagle3.engine.attention import TreeMetadata
from vllm_eagle3.engine.compat import EagleSpeculator
from vllm_eagle3.engine.tree_batch import DraftScratch, TreeRows
from vllm_eagle3.tree.expand import Expansion, grow, start

if TYPE_CHECKING:
    from vllm.config import VllmConfig


@dataclass
class Root:
    """Where the trees of some of the batch's requests start: B requests.

    Attributes:
        reqs: their places in the batch.
        expansion: their first level.
        position_B1: draft position at which the root's children are expanded.
        state_BH: the draft's state at the root.
    """

    reqs: slice
    expansion: Expansion
    position_B1: torch.Tensor
    state_BH: torch.Tensor


class TreeGrowth(EagleSpeculator):
    """vLLM's EAGLE speculator, able to run its draft over the frontier of a tree."""

    def __init__(self, vllm_config: "VllmConfig", device: torch.device, config: TreeConfig) -> None:
        super().__init__(vllm_config, device)
        self.config = config
        draft = self.draft_model_config
        self.scratch = DraftScratch(
            self.max_num_reqs,
            max(1, config.num_expanded),
            draft.get_num_kv_heads(vllm_config.parallel_config),
            draft.get_head_size(),
            self.dtype,
            device,
        )
        # The K best children of each row of the last draft forward.
        self._log_probs_MK: torch.Tensor | None = None
        self._tokens_MK: torch.Tensor | None = None

    def sample_draft(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The K best children of each row [M, H]; returns the best token [M] as vLLM expects."""
        self._log_probs_MK, self._tokens_MK = self._best_children(hidden_states)
        return self._tokens_MK[:, 0]

    def _configure_decode_metadata_update(self) -> None:
        self.supports_decode_metadata_update = False

    def _root(self, first: int, last: int) -> Root:
        reqs = slice(first, last)
        return Root(
            reqs=reqs,
            expansion=self._first_level(reqs),
            # The draft's slot for a token stands one before the token: the root's children are
            # expanded at the root's own position, which vLLM has prepared. Copies, because
            # growing overwrites the draft's inputs.
            position_B1=self.input_buffers.positions[reqs].unsqueeze(1).clone(),
            state_BH=self.hidden_states[reqs].clone(),
        )

    def _first_level(self, reqs: slice) -> Expansion:
        """The root's children, which the draft's prefill has offered."""
        return start(self._log_probs_MK[reqs], self._tokens_MK[reqs])

    def _grow(self, root: Root, skip_attn: bool) -> Expansion:
        """Expand level by level: one forward over the frontier of all requests for each."""
        B, K = root.state_BH.shape[0], self.config.top_k
        expansion = root.expansion
        states_BKH = root.state_BH.unsqueeze(1).expand(B, K, -1)
        metadata = None if skip_attn else self._level_metadata(root.reqs, B)
        for level in range(1, self.config.depth):
            parents_BKH = expansion.frontier_parent_BK.unsqueeze(2).expand_as(states_BKH)
            states_BKH = states_BKH.gather(1, parents_BKH)
            positions_B1 = (root.position_B1 + level - 1).clamp(max=self.max_model_len - 1)
            self.hidden_states[: B * K] = states_BKH.flatten(0, 1)
            self.input_buffers.input_ids[: B * K] = expansion.frontier_tokens_BK.flatten()
            self.input_buffers.positions[: B * K] = positions_B1.expand(B, K).flatten()
            if metadata is not None:
                rows = metadata.tree
                rows.ancestor_bits = expansion.frontier_bits_BK.flatten()
                rows.tree_lens = rows.tree_lens + K
                rows.max_tree_len = level * K
                self.scratch.first_node = (level - 1) * K
            last_MH, feedback_MH = self._run_frontier(B * K, metadata)
            log_probs_MK, tokens_MK = self._best_children(last_MH)
            states_BKH = feedback_MH.view(B, K, -1)
            expansion = grow(expansion, log_probs_MK.view(B, K, K), tokens_MK.view(B, K, K))
        return expansion

    def _level_metadata(self, reqs: slice, num_reqs: int) -> TreeMetadata:
        """The frontier's rows: K a request, after the committed tokens."""
        B, K = num_reqs, self.config.top_k
        starts_B1 = torch.arange(B + 1, dtype=torch.int32, device=self.device)
        rows = TreeRows(
            num_reqs=B,
            num_tokens=B * K,
            query_start_loc=starts_B1 * K,
            # vLLM has counted the root, whose own slot is not written yet.
            prefix_lens=self.input_buffers.seq_lens[reqs] - 1,
            tree_start=starts_B1[:-1] * self.scratch.keys.shape[1],
            tree_lens=torch.zeros(B, dtype=torch.int32, device=self.device),
            ancestor_bits=torch.empty(0),
            max_query_len=K,
            max_tree_len=0,
            max_prefix_len=self.draft_max_seq_len,
            scratch=self.scratch,
        )
        (group,) = (group for groups in self.attn_groups for group in groups)
        blocks_BP = self.block_tables.input_block_tables[group.kv_cache_group_id][reqs]
        # The layer may see its cache in smaller blocks than the cache's manager.
        return TreeMetadata(rows, group.map_to_kernel_block_table(blocks_BP), None)

    def _run_frontier(
        self, num_rows: int, metadata: TreeMetadata | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One draft forward: states for the logits and states to feed back, [M, H] each."""
        by_layer = None
        if metadata is not None:
            by_layer = dict.fromkeys(self.draft_attn_layer_names, metadata)
        # No slot mapping: a tree's keys and values stay out of the paged cache.
        last, feedback = self._run_model(num_rows, by_layer, {}, None)
        return last[:num_rows], feedback[:num_rows]

    def _best_children(self, hidden_MH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The K best children of each row, log-probabilities and target token ids."""
        logits_MV = self.model.logits_processor(self.model.lm_head, hidden_MH)
        log_probs_MK, tokens_MK = ops.draft_topk(logits_MV, self.config.top_k)
        offsets_V = self.model.draft_id_to_target_id
        if offsets_V is not None:
            tokens_MK = tokens_MK + offsets_V[tokens_MK]
        return log_probs_MK, tokens_MK
