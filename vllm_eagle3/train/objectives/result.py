"""What an objective is told, and what it answers."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class LossSettings:
    """What is free in a loss. Each objective has its paper's as ``Objective.settings``.

    Attributes:
        num_steps: draft steps K that are trained through (training-time test, or HASS's
            aligned forwards) and measured.
        decay: weight of a step's loss relative to that of the step before; 0 trains the
            first step alone and only measures the others.
        attention: ``"flash"`` or ``"math"``.
        token_weight: of the cross-entropy beside the feature regression (EAGLE-1, HASS).
        feature_noise: half width of the uniform noise on the target's features while
            training (EAGLE-1, HASS).
        recompute: keep no activations within a draft step, compute them again.
        top_k, top_k_weight: tokens (0: none) and weight of HASS's top-K distillation.
    """

    num_steps: int = 7
    decay: float = 0.8
    attention: str = "flash"
    recompute: bool = False
    token_weight: float = 0.1
    feature_noise: float = 0.0
    top_k: int = 0
    top_k_weight: float = 0.0

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ValueError(f"num_steps={self.num_steps} must be at least 1")
        if self.attention not in ("flash", "math"):
            raise ValueError(f"attention={self.attention!r}: use 'flash' or 'math'")
        for name in ("decay", "token_weight", "feature_noise", "top_k", "top_k_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")


@dataclass
class LossResult:
    """Loss with its gradient, and measures without.

    Attributes:
        loss: scalar, the sum over steps of decay^k times the slots' losses, over the number of
            roots (counted slots of step 0, whether or not the draft vocabulary covers them).
        losses_K: float32, detached.
        accuracy_K: float32, how often the draft's and the target's most likely tokens
            agree, over counted slots.
        accepted_K: float32, how often the drafts of steps 0..k all equal the document:
            1 + sum = tokens for each target forward of a greedy chain of K.
        parts: what losses_K consists of, by name, each float32 [K] before its weight; empty
            where there is one part.
    """

    loss: torch.Tensor
    losses_K: torch.Tensor
    accuracy_K: torch.Tensor
    accepted_K: torch.Tensor
    parts: dict[str, torch.Tensor] = field(default_factory=dict)


def weighted(losses: Sequence[torch.Tensor], counts: Sequence[int], decay: float) -> torch.Tensor:
    """sum over k of decay^k (counts_k / counts_0) loss_k; decay 0 leaves the first."""
    # Plain numbers: a tensor of them would have to be copied to a GPU, for which the host waits.
    weights = (decay**step * count / max(1, counts[0]) for step, count in enumerate(counts))
    return torch.stack([w * loss for w, loss in zip(weights, losses, strict=True)]).sum()
