"""How many drafts a step leaves behind, by the number of its requests.

vLLM's dynamic speculative decoding, which makes trees smaller as requests become more. Trees of
a size grow, and are captured in graphs, only at the numbers of requests where the schedule has
that size; vLLM by itself would capture every size at every size of batch.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from vllm_eagle3.config import TreeConfig
from vllm_eagle3.engine.compat import (
    BatchExecutionDescriptor,
    CUDAGraphMode,
    SpeculatorBatchDescriptor,
    SpeculatorCudaGraphManager,
    build_dynamic_sd_schedule_lookup,
)

if TYPE_CHECKING:
    from vllm.config import SpeculativeConfig


class DraftSchedule:
    """vLLM's schedule, or one size for all."""

    def __init__(self, config: "SpeculativeConfig", max_num_reqs: int) -> None:
        most = config.num_speculative_tokens
        self._drafts = [most] * (max_num_reqs + 1)  # by number of requests, from 0
        if schedule := config.num_speculative_tokens_per_batch_size:
            self._drafts = build_dynamic_sd_schedule_lookup(schedule, max_num_reqs, most)
        # The largest trees are what vLLM asks for where it runs ahead of any schedule.
        self._sizes = sorted({*self._drafts[1:], most} - {0})

    def drafts(self, num_reqs: int) -> int:
        """Nodes below the root of each tree."""
        return self._drafts[num_reqs]

    def shapes(self, config: TreeConfig, max_rows: int) -> dict[TreeConfig, int]:
        """The shapes that trees grow in, smallest first, and how many requests' grow at once.

        Args:
            config: the whole tree.
            max_rows: of one forward of the draft.
        """
        shapes = {}
        for size in self._sizes:
            most = max((n for n, drafts in enumerate(self._drafts) if drafts == size), default=1)
            # A graph pads the batch.
            padded = min(len(self._drafts) - 1, 1 << max(0, most - 1).bit_length())
            shape = config.tier(size)
            shapes[shape] = max(1, min(padded, max_rows // shape.top_k))
        return shapes

    def keep_rounds(self, manager: SpeculatorCudaGraphManager) -> None:
        """Capture a draft prefill, and the round behind it, only with trees of the schedule.

        The round of a step between two sizes does without: its growth has a graph of its own.

        Args:
            manager: of vLLM's draft prefills, each with trees of one size, root included.
        """
        unneeded = {
            descriptor
            for descriptor, drafts in self._uniform(manager)
            if descriptor.uniform_token_count - 1 not in drafts
        }
        for lists in (manager._capture_descs, manager._candidates):
            for key, descriptors in lists.items():
                lists[key] = [d for d in descriptors if d not in unneeded]

    def split_growth(self, manager: SpeculatorCudaGraphManager) -> None:
        """Capture the growth alone for each size that is scheduled at a size of batch.

        vLLM captures it for the largest trees; but it looks for a graph of the step's own size
        where there is none for all of them.

        Args:
            manager: of vLLM's draft decoding.
        """
        split = [
            SpeculatorBatchDescriptor(**vars(descriptor), num_speculative_tokens=size)
            for descriptor, drafts in self._uniform(manager)
            for size in sorted(drafts - {0, 1}, reverse=True)  # these have no level to grow
        ]
        if CUDAGraphMode.FULL in manager._capture_descs:
            manager._capture_descs[CUDAGraphMode.FULL] = split

    def _uniform(
        self, manager: SpeculatorCudaGraphManager
    ) -> Iterator[tuple[BatchExecutionDescriptor, set[int]]]:
        """Graphs of requests of one length, and the drafts behind the batches that replay them."""
        descriptors = [
            descriptor
            for descriptor in manager._capture_descs.get(CUDAGraphMode.FULL, [])
            if descriptor.uniform_token_count is not None
        ]
        for descriptor in descriptors:
            smaller = (
                other.num_reqs
                for other in descriptors
                if other.uniform_token_count == descriptor.uniform_token_count
                and other.num_active_loras == descriptor.num_active_loras
                and other.num_reqs < descriptor.num_reqs
            )
            first = max(smaller, default=0) + 1
            yield descriptor, set(self._drafts[first : descriptor.num_reqs + 1])
