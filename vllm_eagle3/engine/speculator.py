"""Drafting trees in place of vLLM's chains."""

from typing import TYPE_CHECKING, Any

import torch

from vllm_eagle3 import ops
from vllm_eagle3.config import TreeConfig
from vllm_eagle3.engine import attention
from vllm_eagle3.engine.compat import (
    Attention,
    DefaultModelState,
    Eagle3LlamaForCausalLM,
    get_layers_from_vllm_config,
    get_max_chunk_logits,
    resolve_model_state_cls,
)
from vllm_eagle3.engine.growth import TreeGrowth
from vllm_eagle3.engine.model_state import TreeModelState, TreeState
from vllm_eagle3.tree.types import GrowthBuffers

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.worker.gpu.input_batch import InputBatch


class TreeSpeculator(TreeGrowth):
    """vLLM's EAGLE speculator with trees: EAGLE-2's expansion and reranking, or EAGLE-1's paths.

    The frame is vLLM's: the draft's prefill over the accepted tokens is its own, on inputs
    that :meth:`_fuse` has put in the order of a chain. Its loop over single tokens is
    replaced by the growth of trees.
    """

    def __init__(self, vllm_config: "VllmConfig", device: torch.device, config: TreeConfig) -> None:
        super().__init__(vllm_config, device, config)
        self.tree = TreeState(self.max_num_reqs, self.max_num_tokens, config.num_nodes, device)
        self._drafted_nothing = False  # in the last step

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
                f"a head has one attention layer, {self.draft_model_config.model} has"
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
        rows_T = None
        if input_batch.num_draft_tokens and not dummy_run:
            rows_T = self._commit(input_batch, last_hidden_states.shape[0])
        hidden = self._fuse(last_hidden_states, aux_hidden_states, rows_T)
        if num_speculative_tokens is None:
            num_speculative_tokens = self._schedule.drafts(input_batch.num_reqs)
        self._num_drafts = max(1, num_speculative_tokens)
        if self._drafted_nothing:
            # vLLM's mark of no drafts, -1, which it would take for the last step's first drafts
            # and put into rows of the draft's prefill that nobody reads, but the model embeds.
            self.draft_tokens.zero_()
        self._drafted_nothing = num_speculative_tokens == 0
        self._grown_with_prefill = True  # unless the prefill runs outside of its graph
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
                self.tree.detach(input_batch.idx_mapping)
        elif num_speculative_tokens == 1:
            # vLLM returns before its loop over steps: the root's best child is the tree.
            reqs = slice(0, input_batch.num_reqs)
            if not self._grown_with_prefill:
                self._publish(self.frontier_of(1).grown(reqs), reqs, level=1)
        return drafts

    def _fuse(
        self,
        last_hidden_states: torch.Tensor,
        aux_hidden_states: list[torch.Tensor] | None,
        rows_T: torch.Tensor | None,
    ) -> torch.Tensor:
        """The head's input state [T, H] of these rows, or of all.

        An EAGLE-1 head takes the target's last state, after its final norm, as it is.
        """
        if aux_hidden_states is None:
            return last_hidden_states if rows_T is None else last_hidden_states[rows_T]
        num_rows, hidden_size = aux_hidden_states[0].shape
        head = self.model.model
        combine = type(self.model).combine_hidden_states
        is_stock = combine is Eagle3LlamaForCausalLM.combine_hidden_states
        if not is_stock or (head.fc_norm and head.norm_before_fc):
            if rows_T is not None:
                aux_hidden_states = [states[rows_T] for states in aux_hidden_states]
            return self.model.combine_hidden_states(torch.cat(aux_hidden_states, dim=-1))
        norms = head.fc_norm or ([head.input_norm] if head.norm_before_fc else [])
        fused_TF = aux_hidden_states[0].new_empty(num_rows, hidden_size * len(aux_hidden_states))
        ops.fuse_features(
            aux_hidden_states,
            rows_T,
            [norm.weight for norm in norms],
            norms[0].variance_epsilon if norms else 0.0,
            fused_TF,
        )
        return head.fc(fused_TF)

    def _commit(self, batch: "InputBatch", num_rows: int) -> torch.Tensor:
        """Bring the accepted path to the front of its request's rows: KV and token ids.

        Runs in the step that verified the path, before anything reads those cache blocks and
        while the target's slot mappings stand. Returns the rows [T] to take the states from.
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
        return ops.accepted_row_index(*path, num_rows, token_ids_T=batch.input_ids)

    def _publish(self, growth: GrowthBuffers, reqs: slice, level: int) -> None:
        """Rerank; write the trees to their request slots, and the drafts to vLLM's buffer."""
        ops.build_tree(
            growth,
            level,
            reqs.stop - reqs.start,
            self.idx_mapping[reqs],
            self.tree.chain_only_R,
            self.tree.buffers,
            self.draft_tokens[reqs],
        )

    def _touch_verification_memory(self) -> None:
        """Show vLLM's memory profile the logits of a full verification, and their float32 copy.

        Its dummy batches have one logits row a request. The copy is that of processed sampling
        parameters; further ones, of logprobs, are not counted.
        """
        if self.device.type == "cpu":
            return
        reqs = range(1, self.max_num_reqs + 1)
        rows = max(n * (self._schedule.drafts(n) + 1) for n in reqs)
        rows = min(rows, self.max_num_tokens)
        vocabulary = self.vllm_config.model_config.get_vocab_size()
        logits = torch.empty(rows, vocabulary, dtype=self.dtype, device=self.device)
        copied = min(rows, get_max_chunk_logits(vocabulary))
        torch.empty_like(logits[:copied], dtype=torch.float32)
