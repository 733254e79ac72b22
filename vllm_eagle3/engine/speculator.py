"""Drafting dynamic trees in place of vLLM's chains."""

from typing import TYPE_CHECKING, Any

import torch

from vllm_eagle3 import ops
from vllm_eagle3.config import TreeConfig
from vllm_eagle3.engine import attention
from vllm_eagle3.engine.compat import (
    Attention,
    DefaultModelState,
    async_tensor_h2d,
    get_layers_from_vllm_config,
    resolve_model_state_cls,
)
from vllm_eagle3.engine.growth import TreeGrowth
from vllm_eagle3.engine.model_state import TreeModelState, TreeState, detach
from vllm_eagle3.tree.chain import best_chain
from vllm_eagle3.tree.expand import Expansion
from vllm_eagle3.tree.rerank import rerank
from vllm_eagle3.tree.types import DraftTree

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.worker.gpu.input_batch import InputBatch


class TreeSpeculator(TreeGrowth):
    """vLLM's EAGLE speculator with EAGLE-2's expansion and reranking.

    The frame is vLLM's: the draft's prefill over the accepted tokens is its own, on inputs
    that :meth:`_commit` has put in the order of a chain. Its loop over single tokens is
    replaced by :meth:`_grow`.
    """

    def __init__(self, vllm_config: "VllmConfig", device: torch.device, config: TreeConfig) -> None:
        super().__init__(vllm_config, device, config)
        self.tree = TreeState(self.max_num_reqs, self.max_num_tokens, config.num_nodes, device)
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
            reqs = slice(0, input_batch.num_reqs)
            self._publish(self._rerank(self._first_level(reqs), reqs), reqs)
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

    def _multi_step_decode(self, num_reqs: int, skip_attn: bool, *args: Any, **kwargs: Any) -> None:
        """In place of vLLM's loop over single tokens."""
        # The draft's buffers hold max_num_tokens rows, K for each request.
        size = self.max_num_tokens // self.config.top_k
        roots = [
            self._root(first, min(first + size, num_reqs)) for first in range(0, num_reqs, size)
        ]
        for root in roots:
            self._publish(self._rerank(self._grow(root, skip_attn), root.reqs), root.reqs)

    def _rerank(self, expansion: Expansion, reqs: slice) -> DraftTree:
        num_nodes = min(self.config.num_nodes, expansion.scores_BC.shape[1] + 1)
        tree = rerank(expansion, num_nodes)
        if self._chain_rows_B is None:
            return tree
        chain = best_chain(tree, self.config.depth)
        is_chain_B1 = self._chain_rows_B[reqs].unsqueeze(1)
        return DraftTree(
            **{
                name: torch.where(is_chain_B1, getattr(chain, name), getattr(tree, name))
                for name in vars(tree)
            }
        )

    def _publish(self, tree: DraftTree, reqs: slice) -> None:
        """Write the trees to their request slots, and the drafts to vLLM's buffer."""
        num_nodes = tree.tokens_BN.shape[1]
        buffers = self.tree.buffers
        spare = buffers.tokens_RN.shape[0] - 1
        slots = self.idx_mapping[reqs]
        slots = slots.where(slots >= 0, spare)
        if num_nodes < self.config.num_nodes:
            detach(buffers, slots)
        for name in ("tokens", "parents", "depths", "ancestor_bits", "scores"):
            getattr(buffers, f"{name}_RN")[slots, :num_nodes] = getattr(tree, f"{name}_BN")
        self.draft_tokens[reqs, : num_nodes - 1] = tree.tokens_BN[:, 1:]

    def _touch_verification_memory(self) -> None:
        """Show vLLM's memory profile the logits of a full verification.

        Its dummy batches have one logits row a request.
        """
        if self.device.type == "cpu":
            return
        rows = min(self.max_num_reqs * self.config.num_nodes, self.max_num_tokens)
        vocabulary = self.vllm_config.model_config.get_vocab_size()
        torch.empty(rows, vocabulary, dtype=self.dtype, device=self.device)
