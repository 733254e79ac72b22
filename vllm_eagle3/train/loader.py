"""Which process reads which batch at which step: a function of the seed alone.

An optimiser step reads a group of G = processes x ``accumulate`` batches, each of
``batch_tokens / G`` tokens; batch g of the group goes to process g modulo the number of
processes. The epochs follow each other without a gap. The last group may hold fewer batches, and
a few batches of an epoch fewer tokens: one of each class of lengths.

All processes have as many parts in a step, so that what they do together stays in step: one
with fewer batches reads the first of the group once more, for nothing.

A batch's loss is a sum over its slots, divided by its roots (see the objectives). Its share of
the step's loss is its share of the step's roots: together that is the loss of all batches as
one, and no token counts for more because its batch had little to predict.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from vllm_eagle3.corpus import Document
from vllm_eagle3.train.ahead import ahead
from vllm_eagle3.train.data import TokenBatch, epoch_batches
from vllm_eagle3.train.distributed import World
from vllm_eagle3.train.objectives.slots import counted_slots, slots_of_steps
from vllm_eagle3.train.packing import packed_batches
from vllm_eagle3.train.settings import TrainConfig


@dataclass(frozen=True)
class StepBatches:
    """What one process reads for one optimiser step.

    Attributes:
        parts: batches with their shares of the step's loss; a share is 0 where the data has
            run out for this process.
        num_tokens: of all processes, padding included.
    """

    parts: list[tuple[TokenBatch, float]]
    num_tokens: int


class Loader:
    """The steps of a run, for one process.

    Args:
        num_draft_steps: of the objective; packed documents keep their distance by it.

    Attributes:
        group: parts of a step, over all processes.
        part_tokens: most tokens of one.

    Raises:
        ValueError: a part of a step has no room for the longest document, as ``max_length``
            leaves it.
    """

    def __init__(
        self,
        documents: Sequence[Document],
        config: TrainConfig,
        world: World,
        num_draft_steps: int = 7,
    ) -> None:
        self.num_draft_steps = num_draft_steps
        self.documents, self.config, self.world = documents, config, world
        self.group = world.size * config.accumulate
        self.part_tokens = config.batch_tokens // self.group
        longest = min(config.max_length, max(len(document.tokens) for document in documents))
        if self.part_tokens < longest:
            raise ValueError(
                f"batch_tokens={config.batch_tokens} in {self.group} parts ({world.size} "
                f"processes, accumulate={config.accumulate}) leaves {self.part_tokens} tokens "
                f"for a part, and a document has {longest}: raise --batch-tokens to "
                f"{longest * self.group}, lower --accumulate, or cut documents with --max-length"
            )

    def first(self) -> TokenBatch:
        """The first batch of the run that has a root, the same for every process.

        Raises:
            ValueError: none has one.
        """
        for batch in self._epoch(0):
            if len(counted_slots(batch.assistant_BT, 0)):
                return batch
        raise ValueError(
            f"within the first {self.config.max_length} tokens no document has two tokens of the "
            "assistant after each other, from which a head learns: raise --max-length, or give "
            "other data"
        )

    def num_steps(self) -> int:
        """Steps of the run, if no clock ends it before: ``config.steps``, or those of the data.

        The latter as if all epochs had as many batches as the first: they differ by a few.
        """
        batches = self.config.epochs * sum(1 for _ in self._epoch(0))
        by_data = -(-batches // self.group)
        return by_data if self.config.steps is None else min(by_data, self.config.steps)

    def steps(self, start: int, device: torch.device) -> Iterator[StepBatches]:
        """The steps from step ``start`` on, to the end of the data or to ``config.steps``.

        A thread prepares the next ones meanwhile; the host waits for no transfer.
        """
        left = None if self.config.steps is None else max(0, self.config.steps - start)
        for parts, num_tokens in ahead(itertools.islice(self._prepared(start), left)):
            yield StepBatches([(batch.to(device), share) for batch, share in parts], num_tokens)

    def _prepared(self, start: int) -> Iterator[tuple[list[tuple[TokenBatch, float]], int]]:
        """What :class:`StepBatches` takes, on the CPU."""
        epochs = map(self._epoch, range(self.config.epochs))
        batches = itertools.chain.from_iterable(epochs)
        batches = itertools.islice(batches, start * self.group, None)
        while group := list(itertools.islice(batches, self.group)):
            num_tokens = sum(batch.tokens_BT.numel() for batch in group)
            roots = [len(counted_slots(batch.assistant_BT, 0)) for batch in group]
            shares = [count / max(1, sum(roots)) for count in roots]
            missing = -len(group) % self.world.size
            parts = [*zip(group, shares, strict=True), *[(group[0], 0.0)] * missing]
            mine = parts[self.world.rank :: self.world.size]
            yield [(self._counted(batch), share) for batch, share in mine], num_tokens

    def _counted(self, batch: TokenBatch) -> TokenBatch:
        """With slots and layout, made before it is on a device that the host would wait for."""
        batch.slots = slots_of_steps(batch.assistant_BT, self.num_draft_steps)
        _ = batch.layout
        return batch

    def _epoch(self, index: int) -> Iterator[TokenBatch]:
        config = self.config
        sizes = self.documents, self.part_tokens, config.max_length
        seed = config.seed * 1000 + index
        if config.packing:
            return packed_batches(*sizes, self.num_draft_steps, seed)
        return epoch_batches(*sizes, seed)
