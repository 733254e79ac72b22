"""The trees of the running batch, as the attention layers need them."""

from typing import TYPE_CHECKING

import torch

from vllm_eagle3 import ops
from vllm_eagle3.engine.tree_rows import TreeRows
from vllm_eagle3.tree.types import TreeBuffers

if TYPE_CHECKING:
    from vllm.v1.worker.gpu.input_batch import InputBatch


class TreeBatch:
    """Positions, prefix lengths and ancestor bits in batch order, at fixed addresses.

    Filled once for each step by :meth:`prepare`; read by the attention metadata builders of
    the target's layers and passed to the target as its positions. Graphs of whole batches
    replay on these buffers.

    Attributes:
        positions_T: int64 rotary positions, root + depth for the nodes of a tree.
        rows: the batch's tree rows, which come first in the batch; None if it has no tree.
    """

    def __init__(self, max_num_reqs: int, max_num_tokens: int, device: torch.device) -> None:
        self.positions_T = torch.zeros(max_num_tokens, dtype=torch.int64, device=device)
        self.ancestor_bits_T = torch.zeros(max_num_tokens, dtype=torch.int64, device=device)
        self.prefix_lens_B = torch.zeros(max_num_reqs, dtype=torch.int32, device=device)
        self.tree_lens_B = torch.zeros(max_num_reqs, dtype=torch.int32, device=device)
        self.rows: TreeRows | None = None

    def prepare(self, batch: "InputBatch", buffers: TreeBuffers, replays_graph: bool) -> None:
        """Gather the trees of a batch from the request slots' buffers.

        Requests with drafts lead the batch (vLLM sorts it so); a request without drafts
        among them is a one-node tree.

        Args:
            replays_graph: whether the step replays the graph of a whole batch, with requests of
                no rows at the end.
        """
        self.positions_T[: batch.num_tokens_after_padding].copy_(batch.positions)
        self.rows = None
        num_drafts = batch.num_draft_tokens_per_req
        if num_drafts is None or batch.num_draft_tokens == 0:
            # Dummy batches come here too: their slots name real requests.
            return
        num_reqs = int(num_drafts.nonzero()[0][-1]) + 1
        query_lens = batch.num_scheduled_tokens[:num_reqs]
        assert (query_lens == num_drafts[:num_reqs] + 1).all(), "tree rows must lead the batch"
        ops.gather_tree_rows(
            buffers.ancestor_bits_RN,
            buffers.depths_RN,
            batch.idx_mapping[:num_reqs],
            batch.query_start_loc[: num_reqs + 1],
            batch.cu_num_logits[: num_reqs + 1],
            batch.positions,
            self.ancestor_bits_T,
            self.positions_T,
            self.prefix_lens_B,
            batch.seq_lens[:num_reqs],
        )
        max_prefix_len = int(batch.seq_lens_cpu_upper_bound[:num_reqs].max())
        num_tokens = int(query_lens.sum())
        if replays_graph:
            assert num_reqs == batch.num_reqs, "a graph of tree rows has no other rows"
            num_reqs = batch.num_reqs_after_padding
            num_tokens = batch.num_tokens_after_padding
        self._set_rows(batch, num_reqs, num_tokens, int(query_lens.max()), max_prefix_len)

    def prepare_capture(self, batch: "InputBatch") -> None:
        """Rows of a dummy batch whose graph will be replayed by trees.

        A batch of one row a request is one without drafts.
        """
        num_tokens = batch.num_tokens_after_padding
        self.positions_T[:num_tokens].copy_(batch.positions)
        self.rows = None
        max_query_len = int(batch.num_scheduled_tokens.max())
        if max_query_len == 1:
            return
        self.ancestor_bits_T[:num_tokens] = 1
        self.prefix_lens_B.zero_()
        num_reqs = batch.num_reqs_after_padding
        self._set_rows(batch, num_reqs, num_tokens, max_query_len, max_prefix_len=0)

    def _set_rows(
        self,
        batch: "InputBatch",
        num_reqs: int,
        num_tokens: int,
        max_query_len: int,
        max_prefix_len: int,
    ) -> None:
        starts = batch.query_start_loc[: num_reqs + 1]
        torch.sub(starts[1:], starts[:-1], out=self.tree_lens_B[:num_reqs])
        self.rows = TreeRows(
            num_reqs=num_reqs,
            num_tokens=num_tokens,
            query_start_loc=starts,
            prefix_lens=self.prefix_lens_B[:num_reqs],
            tree_start=starts[:-1],
            tree_lens=self.tree_lens_B[:num_reqs],
            ancestor_bits=self.ancestor_bits_T,
            max_query_len=max_query_len,
            max_tree_len=max_query_len,
            max_prefix_len=max_prefix_len,
        )
