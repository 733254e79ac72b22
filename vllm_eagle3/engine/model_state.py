"""The target's side of tree decoding: positions, masks, slots, and the verifier."""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vllm_eagle3 import ops
from vllm_eagle3.engine.compat import CUDAGraphMode, DefaultModelState, async_tensor_h2d
from vllm_eagle3.engine.tree_batch import TreeBatch
from vllm_eagle3.engine.verifier import TreeRejectionSampler
from vllm_eagle3.tree import mask
from vllm_eagle3.tree.mask import chain_parents
from vllm_eagle3.tree.types import TreeBuffers

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams
    from vllm.v1.core.sched.output import NewRequestData
    from vllm.v1.worker.gpu.input_batch import InputBatch


class TreeState:
    """What the speculator, the model state and the verifier of one engine share.

    Attributes:
        buffers: trees and accepted paths by request slot, with one spare row at the end that
            takes what padded and dummy rows write.
        batch: the running batch's trees.
        chain_only_R: flags by request slot: sampling parameters that read the tokens before a
            row (penalties, bad words, grammars) need rows in the order of the text.
        cache_table: where the target's KV caches are; None until they are allocated.
    """

    def __init__(
        self, max_num_reqs: int, max_num_tokens: int, num_nodes: int, device: torch.device
    ) -> None:
        self.buffers = TreeBuffers(max_num_reqs + 1, num_nodes, device)
        self.batch = TreeBatch(max_num_reqs, max_num_tokens, device)
        self.chain_only_R = torch.zeros(max_num_reqs + 1, dtype=torch.bool, device=device)
        self.cache_table: ops.KVCacheTable | None = None
        detached_N = chain_parents(num_nodes, 0, device)
        self._detached = (
            detached_N,
            mask.depths(detached_N, max_depth=1),
            mask.ancestor_bits(detached_N, max_depth=1),
        )

    def detach(self, slots_B: torch.Tensor) -> None:
        """Leave only detached nodes in the slots: whatever is scheduled, nothing is accepted."""
        buffers = self.buffers
        targets = (buffers.parents_RN, buffers.depths_RN, buffers.ancestor_bits_RN)
        for target_RN, values_N in zip(targets, self._detached, strict=True):
            target_RN[slots_B] = values_N


class TreeModelState(DefaultModelState):
    """vLLM's model state, with the trees' positions and masks in each step's inputs."""

    tree: TreeState
    target_layer_names: frozenset[str]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._new_slots: dict[int, bool] = {}  # slot to whether it needs a chain

    @classmethod
    def bind(cls, tree: TreeState, target_layer_names: frozenset[str]) -> type["TreeModelState"]:
        """A class that vLLM can construct with its own arguments alone."""
        namespace = {"tree": tree, "target_layer_names": target_layer_names}
        return type(cls.__name__, (cls,), namespace)

    def add_request(self, req_index: int, new_req_data: "NewRequestData") -> None:
        super().add_request(req_index, new_req_data)
        # The slot's last owner may have left a tree: vLLM can schedule placeholder drafts
        # before this request has drafted any.
        params = new_req_data.sampling_params
        self._new_slots[req_index] = params is not None and needs_chain(params)

    def apply_staged_writes(self) -> None:
        super().apply_staged_writes()
        if self._new_slots:
            staged = np.array([*self._new_slots.items()], dtype=np.int64)
            slots, chain_only = async_tensor_h2d(staged.T.copy(), device=self.device)
            self.tree.detach(slots)
            self.tree.chain_only_R[slots] = chain_only.bool()
            self._new_slots.clear()

    def initialize_kv_cache(self, kv_cache_config: Any, block_tables: Any) -> None:
        super().initialize_kv_cache(kv_cache_config, block_tables)
        # Called again after vLLM's memory profiling, with other caches.
        layers = self.vllm_config.compilation_config.static_forward_context
        self.tree.cache_table = ops.KVCacheTable.from_layers(
            (layers[name].kv_cache, group)
            for group, spec in enumerate(kv_cache_config.kv_cache_groups)
            for name in spec.layer_names
            if name in self.target_layer_names
        )

    def prepare_attn(
        self,
        input_batch: "InputBatch",
        cudagraph_mode: Any,
        *args: Any,
        for_capture: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        batch = self.tree.batch
        if for_capture:
            batch.prepare_capture(input_batch)
        else:
            replays_graph = cudagraph_mode == CUDAGraphMode.FULL
            batch.prepare(input_batch, self.tree.buffers, replays_graph)
        return super().prepare_attn(
            input_batch, cudagraph_mode, *args, for_capture=for_capture, **kwargs
        )

    def prepare_inputs(self, input_batch: "InputBatch", req_states: Any) -> dict[str, Any]:
        inputs = super().prepare_inputs(input_batch, req_states)
        num_tokens = input_batch.num_tokens_after_padding
        return {**inputs, "positions": self.tree.batch.positions_T[:num_tokens]}

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
        inputs = super().prepare_dummy_inputs(num_reqs, num_tokens)
        return {**inputs, "positions": self.tree.batch.positions_T[:num_tokens]}

    def custom_sampler(self, sampler: Any) -> tuple[Any, TreeRejectionSampler]:
        config = self.vllm_config.speculative_config
        return sampler, TreeRejectionSampler(sampler, config, self.device, self.tree.buffers)


def needs_chain(params: "SamplingParams") -> bool:
    """Whether a request's sampling reads the tokens of the rows before each row.

    vLLM computes penalties, bad words, grammars and thinking budgets as if the rows of a
    request were one text. In a tree they are not; such requests get their best path only.
    """
    return bool(
        params.repetition_penalty != 1.0
        or params.presence_penalty != 0.0
        or params.frequency_penalty != 0.0
        or params.bad_words
        or params.structured_outputs is not None
        or getattr(params, "thinking_token_budget", None) is not None
    )
