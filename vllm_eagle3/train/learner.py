"""Head, target and optimiser: what a step of training works on."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from vllm_eagle3.corpus import Document
from vllm_eagle3.train.attention import avoid_plans, check_flash
from vllm_eagle3.train.data import TokenBatch, check_documents
from vllm_eagle3.train.distributed import World, syncing
from vllm_eagle3.train.features import FeatureBatch, Target, load_target
from vllm_eagle3.train.loader import StepBatches
from vllm_eagle3.train.model import DraftHead
from vllm_eagle3.train.norms import fuse_norms
from vllm_eagle3.train.objectives import OBJECTIVES, LossResult, LossSettings
from vllm_eagle3.train.settings import TrainConfig
from vllm_eagle3.train.vocabulary import count_tokens, covering_size, frequent_tokens

_BETAS = (0.9, 0.95)


class HeadLoss(nn.Module):
    """Head and loss as one module, so that a wrapper sees the whole forward."""

    def __init__(self, head: DraftHead, loss: Callable[..., LossResult]) -> None:
        super().__init__()
        self.head, self._loss = head, loss

    def forward(self, batch: FeatureBatch, settings: LossSettings) -> LossResult:
        """The objective's loss on one batch."""
        return self._loss(self.head, batch, settings)


class Learner:
    """A head with all that trains it.

    Args:
        documents: what it learns from, the draft vocabulary included.
        held_out: what it is measured on; only checked here.

    Attributes:
        settings: of the loss, as trained.
        quiet: the same without noise, to measure: a measure must not depend on it, nor draw
            from its generator.
        coverage: share of the assistant's tokens that the draft vocabulary covers.

    Raises:
        ValueError: an unsuitable target, data of another one, or an attention that the device
            cannot compute.
    """

    def __init__(
        self,
        target: str | Path,
        documents: Sequence[Document],
        config: TrainConfig,
        device: torch.device,
        world: World,
        held_out: Sequence[Document] = (),
    ) -> None:
        self.config, self.device, self.world = config, device, world
        avoid_plans()
        # Half precision only where it is fast; the master weights are float32 everywhere.
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.objective = OBJECTIVES[config.objective]
        self.settings = replace(self.objective.settings, **config.loss_changes())
        self.quiet = replace(self.settings, feature_noise=0.0)
        if config.shard_target and world.size == 1:
            raise ValueError("shard_target spreads the target over processes: use torchrun")
        model = load_target(target, self.dtype)
        fuse_norms(model)
        if config.shard_target:
            world.shard_layers(model, device)
        model.to(device)
        limits = config.max_length, model.config.max_position_embeddings
        check_documents([*documents, *held_out], model.config.vocab_size, *limits)
        counts = count_tokens(documents, model.config.vocab_size)
        draft_vocab_size = config.draft_vocab_size or covering_size(counts)
        head_config = self.objective.head_config(model.config, draft_vocab_size)
        if device.type == "cuda" and self.settings.attention == "flash":
            check_flash(head_config.head_dim, torch.cuda.get_device_capability(device))
        self.target = Target(model, head_config.aux_layer_ids)
        ids, self.coverage = frequent_tokens(
            counts, head_config.draft_vocab_size, always=self.target.end_token_ids
        )
        self.head = self.objective.make_head(head_config, self.target, ids).to(device)
        self.optimizer = torch.optim.AdamW(
            self.head.parameters(),
            lr=config.learning_rate,
            betas=_BETAS,
            weight_decay=0.0,
            fused=True,  # the only one that heeds ``found_inf``
        )
        # 1 once a gradient was not finite: on the device, where the optimiser looks for it.
        self._failed = torch.zeros((), device=device)
        self.optimizer.found_inf = self._failed
        self._trained: nn.Module = HeadLoss(self.head, self.objective.loss)

    @property
    def learning_rate(self) -> float:
        """Of the last step."""
        return self.optimizer.param_groups[0]["lr"]

    def initialise(self, sample: TokenBatch) -> None:
        """The weights that training starts from."""
        self.objective.initialise(self.head, self.target, self.read(sample))

    def replicate(self) -> None:
        """Give all processes the main one's weights: call it once these are what they shall be."""
        self._trained = self.world.replicate(self._trained)

    def measure(self, batch: TokenBatch) -> LossResult:
        """The objective without its noise, on this process alone; not for gradients."""
        return self.objective.loss(self.head, self.read(batch), self.quiet)

    def optimise(self, batches: StepBatches, progress: float) -> tuple[torch.Tensor, torch.Tensor]:
        """One step of the optimiser.

        Args:
            progress: share of the run that is over.

        Returns:
            This process's share of the measures, float32 [1 + 3K]: the loss, then losses,
            accuracy and accepted by draft step; and the norm of the gradient. The host need not
            wait for either.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.rate(progress)
        settings = self.settings
        if progress < self.config.top_k_from:
            settings = replace(settings, top_k_weight=0.0)
        measures = torch.zeros(1 + 3 * self.settings.num_steps, device=self.device)
        for number, (batch, share) in enumerate(batches.parts, 1):
            with syncing(self._trained, number == len(batches.parts)):
                result = self._forward(batch, settings)
                # Times the processes: their gradients are averaged, their shares add up to one.
                (result.loss * (share * self.world.size)).backward()
            measures += share * _as_vector(result)
        grad_norm = torch.nn.utils.clip_grad_norm_(self.head.parameters(), self.config.clip)
        # Of the summed gradient, so that all processes stop together.
        self._failed.logical_or_(grad_norm.isfinite().logical_not())
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return measures, grad_norm

    def check_finite(self) -> None:
        """Wait for the steps so far.

        Raises:
            FloatingPointError: the gradient of one of them was not finite; the weights are those
                before it, and :attr:`updates` the steps until then.
        """
        if self._failed:
            raise FloatingPointError("the gradient is not finite")

    @property
    def updates(self) -> int:
        """Steps of the optimiser that have changed the weights."""
        return max((int(state["step"]) for state in self.optimizer.state.values()), default=0)

    def _forward(self, batch: TokenBatch, settings: LossSettings) -> LossResult:
        return self._trained(self.read(batch), settings)

    def read(self, batch: TokenBatch) -> FeatureBatch:
        """What the target says about a batch, as the head and the loss take it."""
        return self.objective.read(self.target, batch, self.head)


def _as_vector(result: LossResult) -> torch.Tensor:
    loss = result.loss.detach().float().reshape(1)
    return torch.cat((loss, result.losses_K, result.accuracy_K, result.accepted_K))
