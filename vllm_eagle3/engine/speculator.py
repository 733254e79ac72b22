"""Drafting dynamic trees in place of vLLM's chains."""

from typing import TYPE_CHECKING, Any

import torch

from vllm_eagle3 import ops
from vllm_eagle3.config import TreeConfig
from vllm_eagle3.engine import attention
from vllm_eagle3.engine.attention import TreeMetadata
from vllm_eagle3.engine.compat import (
    Attention,
    DefaultModelState,
    EagleSpeculator,
    async_tensor_h2d,
    get_layers_from_vllm_config,
    resolve_model_state_cls,
)
from vllm_eagle3.engine.model_state import TreeModelState, TreeState, detach
from vllm_eagle3.engine.tree_batch import DraftScratch, TreeRows
from vllm_eagle3.tree.chain import best_chain
from vllm_eagle3.tree.expand import Expansion, grow, start
from vllm_eagle3.tree.rerank import rerank
from vllm_eagle3.tree.types import DraftTree

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.worker.gpu.input_batch import InputBatch


class TreeSpeculator(EagleSpeculator):
    """vLLM's EAGLE speculator with EAGLE-2's expansion and reranking.

    The frame is vLLM's: the draft's prefill over the accepted tokens is its own, on inputs
    that :meth:`_commit` has put in the order of a chain. Its loop over single tokens is
    replaced by :meth:`_grow`.
    """

    def __init__(self, vllm_config: "VllmConfig", device: torch.device, config: TreeConfig) -> None:
        super().__init__(vllm_config, device)
        self.config = config
        self.tree = TreeState(self.max_num_reqs, self.max_num_tokens, config.num_nodes, device)
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
        # Slots of the batch that get a chain; None in the common case.
        self._chain_rows_B: torch.Tensor | None = None

    def load_model(self, target_model: torch.nn.Module) -> None:
        base = resolve_model_state_cls(self.vllm_config, target_model)
        if base is not DefaultModelState:
            raise ValueError(
                f"draft trees do not support {type(target_model).__name__}, whose state is a"
                f" {base.__name__}: serve it with a chain (leave tree out)"
            )
        target_layers = get_layers_from_vllm_config(self.vllm_config, Attention)
        attention.adopt(target_layers, self.tree.batch)
        super().load_model(target_model)
        draft_layers = get_layers_from_vllm_config(
            self.vllm_config, Attention, list(self.draft_attn_layer_names)
        )
        if len(draft_layers) != 1:
            raise ValueError(
                f"an EAGLE-3 head has one attention layer, {self.draft_model_config.model} has"
                f" {len(draft_layers)}"
            )
        attention.adopt(draft_layers, None)
        state = TreeModelState.bind(self.tree, frozenset(target_layers))
        target_model.get_model_state_cls = lambda: state

    @torch.inference_mode()
    def propose(
        self,
        input_batch: "InputBatch",
        attn_metadata: dict[str, Any],
        slot_mappings: dict[str, torch.Tensor],
        last_hidden_states: torch.Tensor,
        aux_hidden_states: list[torch.Tensor] | None,
        num_sampled: torch.Tensor,
        num_rejected: torch.Tensor,
        *args: Any,
        dummy_run: bool = False,
        is_profile: bool = False,
        num_speculative_tokens: int | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Draft the next tree of each request; publish it in the request's slot.

        Arguments are those of vLLM's ``propose``. Returns the draft tokens [B, N - 1].
        """
        if is_profile:
            self._touch_verification_memory()
        hidden = self.model.combine_hidden_states(torch.cat(aux_hidden_states, dim=-1))
        self._chain_rows_B = None
        if not dummy_run:
            chain = self.tree.chain_only[input_batch.idx_mapping_np]
            if chain.any():
                self._chain_rows_B = async_tensor_h2d(chain, device=self.device)
            if input_batch.num_draft_tokens:
                hidden = self._commit(input_batch, hidden)
        drafts = super().propose(
            input_batch,
            attn_metadata,
            slot_mappings,
            hidden,
            None,
            num_sampled,
            num_rejected,
            *args,
            dummy_run=dummy_run,
            is_profile=is_profile,
            num_speculative_tokens=num_speculative_tokens,
            **kwargs,
        )
        if num_speculative_tokens == 0:
            if not dummy_run:
                detach(self.tree.buffers, input_batch.idx_mapping)
        elif num_speculative_tokens == 1 or self.num_speculative_steps == 1:
            # vLLM returns before its loop over steps: the root's best child is the tree.
            self._publish(self._rerank(self._root(input_batch.num_reqs)))
        return drafts

    def _commit(self, batch: "InputBatch", hidden_TH: torch.Tensor) -> torch.Tensor:
        """Bring the accepted path to the front of its request's rows: KV, ids and states.

        Runs in the step that verified the path, before anything reads those cache blocks and
        while the target's slot mappings stand.
        """
        buffers, groups = self.tree.buffers, self.block_tables.slot_mappings
        path = (
            buffers.path_RN,
            buffers.path_len_R,
            batch.idx_mapping,
            batch.query_start_loc,
            batch.cu_num_logits,
        )
        ops.compact_kv(self.tree.cache_table, groups, *path)
        rows_T = ops.accepted_row_index(*path, hidden_TH.shape[0])
        ids_T = batch.input_ids
        ids_T.copy_(ids_T[rows_T[: ids_T.shape[0]]])
        return hidden_TH[rows_T]

    def sample_draft(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The K best children of each row [M, H]; returns the best token [M] as vLLM expects."""
        self._log_probs_MK, self._tokens_MK = self._best_children(hidden_states)
        return self._tokens_MK[:, 0]

    def _multi_step_decode(self, num_reqs: int, skip_attn: bool, *args: Any, **kwargs: Any) -> None:
        """In place of vLLM's loop over single tokens."""
        self._publish(self._rerank(self._grow(num_reqs, skip_attn)))

    def _configure_decode_metadata_update(self) -> None:
        self.supports_decode_metadata_update = False

    def _root(self, num_reqs: int) -> Expansion:
        return start(self._log_probs_MK[:num_reqs], self._tokens_MK[:num_reqs])

    def _grow(self, num_reqs: int, skip_attn: bool) -> Expansion:
        """Expand level by level: one forward over the frontier of all requests for each."""
        B, K = num_reqs, self.config.top_k
        expansion = self._root(B)
        # The draft's slot for a token stands one before the token: the root's children are
        # expanded at the root's own position, which vLLM has prepared.
        root_position_B1 = self.input_buffers.positions[:B].unsqueeze(1).clone()
        states_BKH = self.hidden_states[:B].unsqueeze(1).expand(B, K, -1)
        rows = None if skip_attn else self._level_rows(B)
        for level in range(1, self.config.depth):
            parents_BKH = expansion.frontier_parent_BK.unsqueeze(2).expand_as(states_BKH)
            states_BKH = states_BKH.gather(1, parents_BKH)
            positions_B1 = (root_position_B1 + level - 1).clamp(max=self.max_model_len - 1)
            self.hidden_states[: B * K] = states_BKH.flatten(0, 1)
            self.input_buffers.input_ids[: B * K] = expansion.frontier_tokens_BK.flatten()
            self.input_buffers.positions[: B * K] = positions_B1.expand(B, K).flatten()
            if rows is not None:
                rows.ancestor_bits = expansion.frontier_bits_BK.flatten()
                rows.tree_lens = rows.tree_lens + K
                rows.max_tree_len = level * K
                self.scratch.first_node = (level - 1) * K
            last_MH, feedback_MH = self._run_frontier(B * K, rows)
            log_probs_MK, tokens_MK = self._best_children(last_MH)
            states_BKH = feedback_MH.view(B, K, -1)
            expansion = grow(expansion, log_probs_MK.view(B, K, K), tokens_MK.view(B, K, K))
        return expansion

    def _level_rows(self, num_reqs: int) -> TreeRows:
        """The frontier's rows: K a request, after the committed tokens."""
        B, K = num_reqs, self.config.top_k
        starts_B1 = torch.arange(B + 1, dtype=torch.int32, device=self.device)
        return TreeRows(
            num_reqs=B,
            num_tokens=B * K,
            query_start_loc=starts_B1 * K,
            # vLLM has counted the root, whose own slot is not written yet.
            prefix_lens=self.input_buffers.seq_lens[:B] - 1,
            tree_start=starts_B1[:-1] * self.scratch.keys.shape[1],
            tree_lens=torch.zeros(B, dtype=torch.int32, device=self.device),
            ancestor_bits=torch.empty(0),
            max_query_len=K,
            max_tree_len=0,
            max_prefix_len=self.draft_max_seq_len,
            scratch=self.scratch,
        )

    def _run_frontier(
        self, num_rows: int, rows: TreeRows | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One draft forward: states for the logits and states to feed back, [M, H] each."""
        metadata = None
        if rows is not None:
            (name,) = self.draft_attn_layer_names
            group = self._draft_kv_group(name)
            metadata = {name: TreeMetadata(rows, self.block_tables.input_block_tables[group], None)}
        # No slot mapping: a tree's keys and values stay out of the paged cache.
        last, feedback = self._run_model(num_rows, metadata, {}, None)
        return last[:num_rows], feedback[:num_rows]

    def _draft_kv_group(self, layer_name: str) -> int:
        groups = self.kv_cache_config.kv_cache_groups
        return next(i for i, group in enumerate(groups) if layer_name in group.layer_names)

    def _best_children(self, hidden_MH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The K best children of each row, log-probabilities and target token ids."""
        logits_MV = self.model.logits_processor(self.model.lm_head, hidden_MH)
        log_probs_MK, tokens_MK = ops.draft_topk(logits_MV, self.config.top_k)
        offsets_V = self.model.draft_id_to_target_id
        if offsets_V is not None:
            tokens_MK = tokens_MK + offsets_V[tokens_MK]
        return log_probs_MK, tokens_MK

    def _rerank(self, expansion: Expansion) -> DraftTree:
        num_nodes = min(self.config.num_nodes, expansion.scores_BC.shape[1] + 1)
        tree = rerank(expansion, num_nodes)
        if self._chain_rows_B is None:
            return tree
        chain = best_chain(tree, self.config.depth)
        is_chain_B1 = self._chain_rows_B.unsqueeze(1)
        return DraftTree(
            **{
                name: torch.where(is_chain_B1, getattr(chain, name), getattr(tree, name))
                for name in vars(tree)
            }
        )

    def _publish(self, tree: DraftTree) -> None:
        """Write the trees to their request slots, and the drafts to vLLM's buffer."""
        num_reqs, num_nodes = tree.tokens_BN.shape
        buffers = self.tree.buffers
        spare = buffers.tokens_RN.shape[0] - 1
        slots = self.idx_mapping[:num_reqs]
        slots = slots.where(slots >= 0, spare)
        if num_nodes < self.config.num_nodes:
            detach(buffers, slots)
        for name in ("tokens", "parents", "depths", "ancestor_bits", "scores"):
            getattr(buffers, f"{name}_RN")[slots, :num_nodes] = getattr(tree, f"{name}_BN")
        self.draft_tokens[:num_reqs, : num_nodes - 1] = tree.tokens_BN[:, 1:]

    def _touch_verification_memory(self) -> None:
        """Show vLLM's memory profile the logits of a full verification.

        Its dummy batches have one logits row a request.
        """
        if self.device.type == "cpu":
            return
        rows = min(self.max_num_reqs * self.config.num_nodes, self.max_num_tokens)
        vocabulary = self.vllm_config.model_config.get_vocab_size()
        torch.empty(rows, vocabulary, dtype=self.dtype, device=self.device)
