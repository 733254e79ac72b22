"""Verification inside vLLM's rejection sampler.

vLLM's sampler keeps its frame: gathering of drafts, chunks of logits, logprobs, counts. Only
the acceptance differs: the target draws one token at every node and the walk follows the
drawn tokens (algorithm: :mod:`vllm_eagle3.tree.verify`). The noise of a draw is keyed by the
request's seed and the node's position, so a seeded request yields the tokens that it yields
without speculation.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vllm_eagle3 import ops
from vllm_eagle3.engine.compat import NO_LOGPROBS, RejectionSampler, gumbel_sample
from vllm_eagle3.tree.types import TreeBuffers

if TYPE_CHECKING:
    from vllm.config import SpeculativeConfig
    from vllm.v1.worker.gpu.sample.sampler import Sampler


class TreeRejectionSampler(RejectionSampler):
    """Accepts the path through each request's tree that the target draws."""

    def __init__(
        self,
        sampler: "Sampler",
        spec_config: "SpeculativeConfig",
        device: torch.device,
        buffers: TreeBuffers,
    ) -> None:
        super().__init__(sampler, spec_config, device)
        self.buffers = buffers
        # Slots of the chunk in work, for its logprobs.
        self._idx_mapping: torch.Tensor | None = None

    def _verify(
        self,
        logits: torch.Tensor,
        draft_logits: torch.Tensor | None,
        draft_sampled: torch.Tensor,
        pos: torch.Tensor,
        cu_num_logits: torch.Tensor,
        idx_mapping: torch.Tensor,
        idx_mapping_np: np.ndarray,
        expanded_idx_mapping: torch.Tensor,
        expanded_local_pos: torch.Tensor,
        seq_lens_upper_bound_np: np.ndarray,
        verify_draft_sampled: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Processed logits [L, V], emitted tokens [B, N], and their number [B]."""
        node = expanded_local_pos.long()
        # vLLM's positions count rows; a node's noise belongs to its place in the text.
        pos = pos - node + self.buffers.depths_RN[expanded_idx_mapping, node]
        processed = self.sampler.apply_sampling_params(
            logits,
            expanded_idx_mapping,
            idx_mapping,
            idx_mapping_np,
            pos,
            draft_sampled,
            expanded_local_pos,
            seq_lens_upper_bound_np,
        )
        states = self.sampler.sampling_states
        drawn = gumbel_sample(
            processed,
            expanded_idx_mapping,
            states.temperature.gpu,
            states.seeds.gpu,
            pos,
            apply_temperature=False,
            is_drafting=False,
            use_fp64=self.sampler.use_fp64_gumbel,
        )
        sampled, num_sampled = ops.verify_tree(
            drawn,
            verify_draft_sampled,
            self.buffers.parents_RN,
            idx_mapping,
            cu_num_logits,
            self.buffers.path_RN,
            self.buffers.path_len_R,
            num_nodes=self.num_speculative_steps + 1,
        )
        self._idx_mapping = idx_mapping
        return processed, sampled, num_sampled

    def _get_logprobs_tensors(
        self,
        sampled: torch.Tensor,
        num_sampled: torch.Tensor,
        logits: torch.Tensor,
        cu_num_logits: torch.Tensor,
        cu_num_logits_np: np.ndarray,
        max_num_logprobs: int,
    ) -> Any:
        if max_num_logprobs != NO_LOGPROBS:
            # vLLM reads token i's logprobs from row i: bring the path's rows to the front.
            rows = ops.accepted_row_index(
                self.buffers.path_RN,
                self.buffers.path_len_R,
                self._idx_mapping,
                cu_num_logits,
                cu_num_logits,
                logits.shape[0],
            )
            logits = logits[rows]
        return super()._get_logprobs_tensors(
            sampled, num_sampled, logits, cu_num_logits, cu_num_logits_np, max_num_logprobs
        )
