"""How to train: the settings, validated once, and their command line."""

import argparse
import math
from dataclasses import dataclass, fields
from pathlib import Path


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

    def rate(self, progress: float) -> float:
        """Learning rate when a share ``progress`` of the run is over."""
        if progress < self.warmup:
            return self.learning_rate * max(progress / self.warmup, 0.01)
        done = min(1.0, (progress - self.warmup) / (1 - self.warmup))
        return self.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``vllm-eagle3 train``."""
    default = TrainConfig()
    parser.add_argument("--target", required=True, help="a Llama checkpoint, folder or hub name")
    parser.add_argument("--data", required=True, type=Path, help="folder of `data synth`")
    parser.add_argument("--out", required=True, type=Path, help="folder for the head")
    parser.add_argument("--device", help="cuda or cpu (default: cuda where there is some)")
    parser.add_argument("--resume", action="store_true", help="go on from the state in --out")

    def add(name: str, kind: type, text: str) -> None:
        value = getattr(default, name)
        shown = "none" if value is None else value
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=kind, default=value, help=f"{text} ({shown})"
        )

    add("draft_vocab_size", int, "tokens that the head can predict")
    add("epochs", int, "passes over the data, at most")
    add("steps", int, "optimiser steps, at most")
    add("minutes", float, "wall-clock limit; the learning rate ends with it")
    add("batch_tokens", int, "tokens of an optimiser step")
    add("max_length", int, "longer documents are cut")
    add("learning_rate", float, "peak")
    add("num_ttt_steps", int, "draft steps trained through")
    add("ttt_decay", float, "weight of a draft step relative to the one before")
    add("log_every", int, "steps between log lines")
    add("eval_every", int, "steps between evaluations")
    add("save_every", int, "steps between states to resume from")
    add("seed", int, "of the order and the weights")
    add("attention", str, "flash or math")


def config_from_arguments(args: argparse.Namespace) -> TrainConfig:
    """Settings from the command line; what has no option keeps its default."""
    names = {field.name for field in fields(TrainConfig)}
    return TrainConfig(**{k: v for k, v in vars(args).items() if k in names})
