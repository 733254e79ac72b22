"""The rows that the draft runs over at one level of the trees, at fixed addresses.

Everything here stays where it is from start to end: the drafting round is captured in CUDA
graphs, which remember addresses. Trees of several sizes have frontiers of several widths, each
with candidates of its own; what is large they share, because one round grows trees of one size.
"""

import copy
from collections.abc import Mapping

import torch

from vllm_eagle3 import ops
from vllm_eagle3.config import TreeConfig
from vllm_eagle3.engine.tree_rows import TreeRows
from vllm_eagle3.tree.types import GrowthBuffers


class FrontierMemory:
    """What the frontiers of all sizes of trees share.

    Args:
        shapes: of the trees, and how many requests' trees of each grow at once.

    Attributes:
        root_positions_B, prefix_lens_B, input_ids_M, positions_M, scratch: as in
            :class:`Frontier`.
        states: two buffers [M, H] of the draft's states.
    """

    def __init__(
        self,
        shapes: Mapping[TreeConfig, int],
        max_num_reqs: int,
        hidden_size: int,
        kv_shape: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        def zeros(dtype: torch.dtype, *shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.root_positions_B = zeros(torch.int64, max_num_reqs)
        self.prefix_lens_B = zeros(torch.int32, max_num_reqs)
        widest = max(config.top_k for config in shapes)
        self.input_ids_M = zeros(torch.int32, max_num_reqs * widest)
        self.positions_M = zeros(torch.int64, max_num_reqs * widest)
        rows = max(reqs * config.top_k for config, reqs in shapes.items())
        self.states = zeros(dtype, rows, hidden_size), zeros(dtype, rows, hidden_size)
        nodes = max(reqs * max(1, config.num_expanded) for config, reqs in shapes.items())
        self.scratch = zeros(dtype, nodes, *kv_shape), zeros(dtype, nodes, *kv_shape)


class Frontier:
    """Where the trees of a batch start, and the inputs of their next level.

    Attributes:
        config: the shape that the trees are grown in.
        reqs_at_once: requests whose trees grow together.
        growth: candidates and frontier of each request of the batch.
        input_ids_M, positions_M: inputs of the draft's forward over one level, K rows a
            request.
        root_positions_B: int64 draft position at which the root's children are expanded:
            the draft's slot for a token stands one before the token.
        prefix_lens_B: int32 committed tokens in the draft's cache; 0 for padded requests.
        scratch: keys and values [nodes, kv heads, head size] of the nodes expanded so far.
            Nothing of a tree enters the paged cache of the draft, which therefore holds
            committed tokens only and needs no slots past vLLM's own.
    """

    def __init__(self, config: TreeConfig, reqs_at_once: int, memory: FrontierMemory) -> None:
        self.config, self.reqs_at_once = config, reqs_at_once
        self.root_positions_B, self.prefix_lens_B = memory.root_positions_B, memory.prefix_lens_B
        self.input_ids_M, self.positions_M = memory.input_ids_M, memory.positions_M
        self.scratch, self._states = memory.scratch, memory.states
        device = self.root_positions_B.device
        self.growth = GrowthBuffers(len(self.root_positions_B), config, device)
        starts = torch.arange(reqs_at_once + 1, dtype=torch.int32, device=device)
        self._query_start_loc = starts * config.top_k
        self._tree_start = starts[:-1] * max(1, config.num_expanded)
        # Nodes that a row of each level may see, its own level included.
        self._tree_lens = [
            torch.full_like(self._tree_start, level * config.top_k) for level in range(config.depth)
        ]

    def set_roots(
        self, num_reqs: int, positions: torch.Tensor, seq_lens: torch.Tensor, max_position: int
    ) -> None:
        """Start at the last accepted tokens.

        Args:
            num_reqs: requests of the batch, padded ones included (B).
            positions: int64 [B] draft position of each request's last accepted row.
            seq_lens: int32 [B] tokens of each request, rejected ones included; 0 for padded
                requests, whose positions mean nothing.
            max_position: the last position that the model has.
        """
        next_B = positions[:num_reqs] + 1
        torch.clamp(next_B, max=max_position, out=self.root_positions_B[:num_reqs])
        self.prefix_lens_B[:num_reqs] = torch.minimum(next_B, seq_lens[:num_reqs])

    def no_roots_beyond(self, num_reqs: int) -> None:
        """Let the rows that a graph pads the batch with attend to nothing."""
        self.prefix_lens_B[num_reqs:] = 0

    def batches(self, num_reqs: int) -> list[slice]:
        """Requests that can grow at once, by place in the batch."""
        size = self.reqs_at_once
        return [slice(first, min(first + size, num_reqs)) for first in range(0, num_reqs, size)]

    def grown(self, reqs: slice) -> GrowthBuffers:
        """The growth buffers of some of the batch's requests, as views."""
        view = copy.copy(self.growth)
        for name, values in vars(self.growth).items():
            if isinstance(values, torch.Tensor):
                setattr(view, name, values[reqs])
        return view

    def gather_states(
        self, growth: GrowthBuffers, source: torch.Tensor, num_reqs: int, level: int
    ) -> torch.Tensor:
        """The draft's state of each row's parent, a row of ``source``: [M, H].

        Levels take turns in two buffers: vLLM's layers add to their input in place, so that
        the states of the last level may stand where its inputs stood.
        """
        rows_M = growth.frontier_row_BK[:num_reqs].flatten()
        states_MH = self._states[level % 2][: rows_M.shape[0]]
        ops.fuse_features([source], rows_M, [], 0.0, states_MH)
        return states_MH

    def rows_of(self, reqs: slice) -> slice:
        """Rows of ``input_ids_M`` and ``positions_M``."""
        return slice(reqs.start * self.config.top_k, reqs.stop * self.config.top_k)

    def attention_rows(self, reqs: slice, max_prefix_len: int) -> TreeRows:
        """The attention rows of the first level; :meth:`advance` moves them on."""
        num_reqs = reqs.stop - reqs.start
        return TreeRows(
            num_reqs=num_reqs,
            num_tokens=num_reqs * self.config.top_k,
            query_start_loc=self._query_start_loc[: num_reqs + 1],
            prefix_lens=self.prefix_lens_B[reqs],
            tree_start=self._tree_start[:num_reqs],
            tree_lens=self._tree_lens[0][:num_reqs],
            ancestor_bits=self.growth.frontier_bits_BK[reqs].flatten(),
            max_query_len=self.config.top_k,
            max_tree_len=0,
            max_prefix_len=max_prefix_len,
            scratch=self.scratch,
        )

    def advance(self, rows: TreeRows, level: int) -> None:
        """Move the rows to a level, counted from 1: K more nodes to see and to keep."""
        rows.tree_lens = self._tree_lens[level][: rows.num_reqs]
        rows.max_tree_len = level * self.config.top_k
