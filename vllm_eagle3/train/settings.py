"""How to train: the settings, validated once."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TrainConfig:
    """How to train. The defaults suit a head of about 10 million parameters.

    The learning rate is some ten times the 5e-5..1e-4 that the EAGLE papers use for heads
    of 1e8..1e9 parameters: the usual peak of a small Transformer trained from scratch falls
    with its width (576 here against 4096), and clipping at 0.5 bounds the early steps.

    Attributes:
        draft_vocab_size: tokens that the head can predict.
        batch_tokens: tokens of an optimiser step, padding included.
        max_length: longer documents are cut.
        epochs: passes over the data, at most.
        steps: optimiser steps, at most; None for no limit.
        minutes: wall-clock limit; the schedule ends with it. None for no limit.
        learning_rate: peak, after ``warmup`` (share of the run), cosine to a tenth.
        num_ttt_steps, ttt_decay: K and the decay of algorithm `ttt`.
        held_out: share of the documents kept for evaluation.
        attention: ``"flash"`` or ``"math"``.
    """

    draft_vocab_size: int = 8192
    batch_tokens: int = 32768
    max_length: int = 2048
    epochs: int = 3
    steps: int | None = None
    minutes: float | None = None
    learning_rate: float = 8e-4
    warmup: float = 0.03
    clip: float = 0.5
    num_ttt_steps: int = 7
    ttt_decay: float = 0.8
    held_out: float = 0.01
    eval_batches: int = 8
    log_every: int = 10
    eval_every: int = 500
    save_every: int = 500
    seed: int = 0
    attention: str = "flash"

    def __post_init__(self) -> None:
        for name in ("draft_vocab_size", "batch_tokens", "max_length", "epochs", "num_ttt_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("steps", "minutes"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name}={value} must be positive, or left out for no limit")
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate={self.learning_rate} must be positive")
        if self.attention not in ("flash", "math"):
            raise ValueError(f"attention={self.attention!r}: use 'flash' or 'math'")
