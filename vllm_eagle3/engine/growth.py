"""Growing trees with the draft: one forward over K nodes of each request for each level.

Source: EAGLE-2 (arXiv 2406.16858), section 4.1; the choice of nodes is
:mod:`vllm_eagle3.tree.expand`.

The whole drafting round is one CUDA graph where vLLM captures its draft prefill whole (every
request decodes); where other requests are in their prompts, the prefill runs as vLLM runs it
and the growth is a graph of its own.
"""

from typing import TYPE_CHECKING, Any

import torch

from vllm_eagle3 import ops
from vllm_eagle3.config import TreeConfig
from vllm_eagle3.engine.attention import TreeMetadata
from vllm_eagle3.engine.compat import (
    BatchDescriptor,
    CUDAGraphMode,
    EagleSpeculator,
    set_forward_context,
)
from vllm_eagle3.engine.draft_schedule import DraftSchedule
from vllm_eagle3.engine.frontier import Frontier, FrontierMemory
from vllm_eagle3.tree.types import GrowthBuffers

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class TreeGrowth(EagleSpeculator):
    """vLLM's EAGLE speculator, able to run its draft over the frontier of a tree."""

    def __init__(self, vllm_config: "VllmConfig", device: torch.device, config: TreeConfig) -> None:
        super().__init__(vllm_config, device)
        self._schedule = DraftSchedule(self.speculative_config, self.max_num_reqs)
        shapes = self._schedule.shapes(config, self.max_num_tokens)
        draft = self.draft_model_config
        memory = FrontierMemory(
            shapes,
            self.max_num_reqs,
            self.hidden_size,
            (draft.get_num_kv_heads(vllm_config.parallel_config), draft.get_head_size()),
            self.dtype,
            device,
        )
        self._frontiers = [Frontier(*shape, memory) for shape in shapes.items()]
        # Of the draft prefill, over the draft vocabulary.
        self._root_logits_BV: torch.Tensor | None = None
        # Nodes of a tree that the next step will verify.
        self._num_drafts = config.num_speculative_tokens
        self._captures_round = False
        # Whether the graph of the draft prefill has grown the trees of this step as well.
        self._grown_with_prefill = False

    def frontier_of(self, num_drafts: int) -> Frontier:
        """That of the smallest trees with so many nodes below the root."""
        return next(
            (f for f in self._frontiers if f.config.num_speculative_tokens >= num_drafts),
            self._frontiers[-1],
        )

    def init_cudagraph_manager(self, cudagraph_mode: CUDAGraphMode) -> None:
        super().init_cudagraph_manager(cudagraph_mode)
        if len(self._frontiers) > 1:
            self._schedule.keep_rounds(self.prefill_cudagraph_manager)
            self._schedule.split_growth(self.decode_cudagraph_manager)

    def sample_draft(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Keeps the logits of the roots; the tokens [B] that it returns are yet to be drafted."""
        self._root_logits_BV = self._logits(hidden_states)
        return self.draft_tokens[: hidden_states.shape[0], 0]

    def _configure_decode_metadata_update(self) -> None:
        self.supports_decode_metadata_update = False

    def capture(self) -> None:
        self._captures_round = True
        super().capture()
        self._captures_round = False

    def _prefill(
        self,
        num_reqs: int,
        num_tokens: int,
        attn_metadata: dict[str, Any] | None,
        slot_mappings: dict[str, torch.Tensor] | None,
        num_tokens_across_dp: torch.Tensor | None,
        cudagraph_runtime_mode: CUDAGraphMode = CUDAGraphMode.NONE,
        **kwargs: Any,
    ) -> None:
        """vLLM's draft prefill, and the first level of the trees; in its graph, all of them."""
        super()._prefill(
            num_reqs,
            num_tokens,
            attn_metadata,
            slot_mappings,
            num_tokens_across_dp,
            cudagraph_runtime_mode,
            **kwargs,
        )
        self._grown_with_prefill = False
        if kwargs.get("skip_sample"):
            return
        num_drafts = self._num_drafts
        captures_round = self._captures_round and cudagraph_runtime_mode == CUDAGraphMode.NONE
        if captures_round:
            # Of the size that the graph's own steps verify; the next step's is rarely another.
            num_drafts = max(1, num_tokens // num_reqs - 1)
        buffers, frontier = self.input_buffers, self.frontier_of(num_drafts)
        frontier.set_roots(num_reqs, buffers.positions, buffers.seq_lens, self.max_model_len - 1)
        if not captures_round:
            frontier.no_roots_beyond(num_reqs)  # a graph of the growth may be of more
        self._expand(frontier, frontier.growth, slice(0, num_reqs), self._root_logits_BV, level=1)
        self._root_logits_BV = None
        if captures_round:
            self._generate_draft(
                num_reqs, num_reqs, attn_metadata, num_speculative_steps=num_drafts
            )

    def _multi_step_decode(
        self,
        num_reqs: int,
        skip_attn: bool,
        batch_desc: Any,
        num_tokens_across_dp: torch.Tensor | None,
        seq_lens_cpu_upper_bound: torch.Tensor,
        num_speculative_steps: int,
    ) -> None:
        """In place of vLLM's loop over single tokens."""
        if self._grown_with_prefill:
            return
        if batch_desc.cg_mode == CUDAGraphMode.FULL:
            self.decode_cudagraph_manager.run_fullgraph(batch_desc)
        else:
            metadata = None if skip_attn else {}
            self._generate_draft(
                num_reqs, num_reqs, metadata, num_speculative_steps=self._num_drafts
            )

    def _generate_draft(
        self,
        num_reqs: int,
        num_rows: int,
        attn_metadata: dict[str, Any] | None,
        *args: Any,
        num_speculative_steps: int,
        **kwargs: Any,
    ) -> None:
        """Grow the trees of the batch from their first level, and publish them.

        vLLM captures this under the name of its single draft step.

        Args:
            num_reqs: requests, padded ones included.
            num_rows: vLLM's, of a chain's step; not used.
            attn_metadata: None in vLLM's profiling run, which has no KV cache; its content,
                of a chain's step, is not used.
            num_speculative_steps: nodes of a tree that will be verified.
        """
        frontier = self.frontier_of(num_speculative_steps)
        for reqs in frontier.batches(num_reqs):
            growth = frontier.grown(reqs)
            self._grow(frontier, growth, reqs, has_cache=attn_metadata is not None)
            self._publish(growth, reqs, level=frontier.config.depth)

    def _publish(self, growth: GrowthBuffers, reqs: slice, level: int) -> None:
        """Make trees of the candidates offered up to a level."""
        raise NotImplementedError

    def _grow(
        self, frontier: Frontier, growth: GrowthBuffers, reqs: slice, has_cache: bool
    ) -> None:
        """Expand level by level: one forward over the frontier of all requests for each."""
        num_reqs = reqs.stop - reqs.start
        metadata = self._level_metadata(frontier, reqs) if has_cache else None
        states = self.hidden_states  # of the roots, which level 1 counts through the batch
        for level in range(1, frontier.config.depth):
            inputs = frontier.gather_states(growth, states, num_reqs, level)
            if metadata is not None:
                frontier.advance(metadata.tree, level)
            last_MH, states = self._run_frontier(frontier, reqs, inputs, metadata)
            self._expand(frontier, growth, reqs, self._logits(last_MH), level=level + 1)

    def _expand(
        self,
        frontier: Frontier,
        growth: GrowthBuffers,
        reqs: slice,
        logits_MV: torch.Tensor,
        level: int,
    ) -> None:
        """Offer a level's candidates, and choose the next frontier of the requests."""
        rows = frontier.rows_of(reqs)
        ops.expand_logits(
            growth,
            logits_MV,
            self._draft_offsets,
            level,
            reqs.stop - reqs.start,
            frontier.root_positions_B[reqs],
            self.max_model_len - 1,
            frontier.input_ids_M[rows],
            frontier.positions_M[rows],
        )

    def _level_metadata(self, frontier: Frontier, reqs: slice) -> TreeMetadata:
        """The frontier's rows: K a request, after the committed tokens."""
        (group,) = (group for groups in self.attn_groups for group in groups)
        blocks_BP = self.block_tables.input_block_tables[group.kv_cache_group_id][reqs]
        # The layer may see its cache in smaller blocks than the cache's manager.
        block_table = group.map_to_kernel_block_table(blocks_BP)
        rows = frontier.attention_rows(reqs, self.max_model_len)
        return group.get_metadata_builder().build_tree_rows(rows, block_table)

    @torch.inference_mode()
    def _run_frontier(
        self,
        frontier: Frontier,
        reqs: slice,
        states_MH: torch.Tensor,
        metadata: TreeMetadata | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One draft forward: states for the logits and states to feed back, [M, H] each."""
        rows = frontier.rows_of(reqs)
        num_rows = rows.stop - rows.start
        by_layer = None
        if metadata is not None:
            by_layer = dict.fromkeys(self.draft_attn_layer_names, metadata)
        input_ids = frontier.input_ids_M[rows]
        embeds = self.model.embed_input_ids(input_ids) if self.supports_mm_inputs else None
        # No slot mapping: a tree's keys and values stay out of the paged cache.
        with set_forward_context(
            by_layer,
            self.vllm_config,
            num_tokens=num_rows,
            cudagraph_runtime_mode=CUDAGraphMode.NONE,
            slot_mapping={},
            batch_descriptor=BatchDescriptor(num_tokens=num_rows),
        ):
            return self.model(
                input_ids=input_ids,
                positions=frontier.positions_M[rows],
                hidden_states=states_MH,
                inputs_embeds=embeds,
            )

    @property
    def _draft_offsets(self) -> torch.Tensor | None:
        """Target token minus draft id [Vd]; None if the head drafts in the target's vocabulary."""
        return getattr(self.model, "draft_id_to_target_id", None)

    def _logits(self, hidden_MH: torch.Tensor) -> torch.Tensor:
        """Over the draft vocabulary [M, Vd]."""
        if self._draft_offsets is None:
            return self.model.compute_logits(hidden_MH)
        # The head's own method spreads them over the target's vocabulary.
        return self.model.logits_processor(self.model.lm_head, hidden_MH)
