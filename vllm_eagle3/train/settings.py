"""How to train: the settings, validated once, and their command line."""

import argparse
import math
from dataclasses import dataclass, fields
from pathlib import Path

from vllm_eagle3.config import TreeConfig

_AT_LEAST_ONE = (
    *("batch_tokens", "accumulate", "max_length", "epochs"),
    *("log_every", "eval_every", "save_every", "eval_batches", "eval_chain"),
)

_UNSET = {
    "num_ttt_steps": "the objective's",
    "ttt_decay": "the objective's",
    "draft_vocab_size": "the fewest that make 99 %% of what the assistant wrote",
}


@dataclass(frozen=True)
class TrainConfig:
    """How to train. The defaults suit a head of about 10 million parameters.

    The learning rate is some ten times the 5e-5..1e-4 that the EAGLE papers use for heads
    of 1e8..1e9 parameters: the usual peak of a small Transformer trained from scratch falls
    with its width (576 here against 4096), and clipping at 0.5 bounds the early steps.

    Attributes:
        draft_vocab_size: tokens that the head can predict; None for the fewest that make 99 % of
            what the assistant wrote (``vocabulary.covering_size``).
        batch_tokens: tokens of an optimiser step, padding included, over all processes and
            all parts of an accumulated step: the recipe stays the same on more GPUs.
        accumulate: parts that an optimiser step is read in; more of them need less memory.
        max_length: longer documents are cut.
        packing: several documents in a row of ``max_length``, none of which sees another; False
            for one document a row, padded.
        data_share: share of the documents that are not held out to train on, drawn by the seed;
            those of a smaller share are among those of a larger one.
        epochs: passes over the data, at most.
        steps: optimiser steps, at most; None for no limit.
        minutes: wall-clock limit; the schedule ends with it. None for no limit.
        learning_rate: peak, after ``warmup`` (share of the run), cosine to a tenth.
        clip: largest norm of a step's gradient.
        objective: which head, and what it is trained by; a name of ``objectives.OBJECTIVES``.
        num_ttt_steps, ttt_decay: draft steps that are trained through, and the weight of one
            relative to that before; None for the objective's own.
        top_k_from: share of the run after which HASS's top-K distillation counts; with 0.5 a
            first half trains the alignment alone (weight 0), the second both.
        held_out: share of the documents kept for evaluation; of them at least one.
        eval_batches: batches of ``batch_tokens`` that the evaluation of losses reads, at most,
            each in as many parts as a step.
        eval_documents: documents on which the acceptance lengths of ``eval_chain`` and
            ``eval_tree`` are predicted; 0 for none.
        eval_chain: drafts of the chain.
        eval_tree: draft tokens, depth and top-k of the tree.
        recompute: keep no activations within a draft step, compute them again (gradient
            checkpointing): up to a third more time, and a fraction of the memory.
        shard_target: spread the target's layers over the processes (FSDP2), where one GPU does
            not hold it; the head is on each of them.
        tensorboard: write TensorBoard's events beside the log of JSON lines.
        attention: ``"flash"`` or ``"math"``.
    """

    draft_vocab_size: int | None = None
    batch_tokens: int = 32768
    accumulate: int = 1
    max_length: int = 2048
    packing: bool = True
    data_share: float = 1.0
    epochs: int = 3
    steps: int | None = None
    minutes: float | None = None
    learning_rate: float = 8e-4
    warmup: float = 0.03
    clip: float = 0.5
    objective: str = "eagle3"
    num_ttt_steps: int | None = None
    ttt_decay: float | None = None
    top_k_from: float = 0.0
    held_out: float = 0.01
    eval_batches: int = 8
    eval_documents: int = 8
    eval_chain: int = 5
    eval_tree: tuple[int, int, int] = (63, 5, 16)
    log_every: int = 10
    eval_every: int = 500
    save_every: int = 500
    seed: int = 0
    attention: str = "flash"
    recompute: bool = False
    shard_target: bool = False
    tensorboard: bool = False

    def __post_init__(self) -> None:
        for name in _AT_LEAST_ONE:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        from vllm_eagle3.train.objectives import OBJECTIVES

        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective={self.objective!r}: use one of {', '.join(OBJECTIVES)}")
        for name in ("warmup", "held_out", "top_k_from"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0 and below 1")
        if self.top_k_from and not OBJECTIVES[self.objective].settings.top_k:
            raise ValueError(
                f"top_k_from={self.top_k_from}: objective {self.objective!r} has no top-K "
                "distillation; leave it out, or train 'hass'"
            )
        for name in ("eval_documents", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be 0 or more")
        if len(self.eval_tree) != 3:
            raise ValueError(f"eval_tree={self.eval_tree}: give draft tokens, depth and top-k")
        self.trees()
        for name in ("draft_vocab_size", "steps", "minutes", "num_ttt_steps"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value} must be positive, or left out")
        for name in ("ttt_decay", "data_share"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"{name}={value} must be above 0 and at most 1")
        for name in ("learning_rate", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        if self.attention not in ("flash", "math"):
            raise ValueError(f"attention={self.attention!r}: use 'flash' or 'math'")

    def loss_changes(self) -> dict[str, int | float | str]:
        """What this configuration changes of the objective's own ``LossSettings``."""
        changes = {"num_steps": self.num_ttt_steps, "decay": self.ttt_decay}
        given = {name: value for name, value in changes.items() if value is not None}
        return given | {"attention": self.attention, "recompute": self.recompute}

    def trees(self) -> dict[str, TreeConfig]:
        """What the evaluation predicts acceptance lengths for, by name.

        Raises:
            ValueError: no such tree can be grown.
        """
        chain, (tokens, depth, top_k) = self.eval_chain, self.eval_tree
        return {
            f"chain of {chain}": _tree(f"eval_chain={chain}", chain, chain, 1),
            f"tree of {tokens}, {depth}, {top_k}": _tree(
                f"eval_tree={self.eval_tree}", tokens, depth, top_k
            ),
        }

    def rate(self, progress: float) -> float:
        """Learning rate when a share ``progress`` of the run is over."""
        if progress < self.warmup:
            return self.learning_rate * max(progress / self.warmup, 0.01)
        done = min(1.0, (progress - self.warmup) / (1 - self.warmup))
        return self.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


def _tree(setting: str, num_drafts: int, depth: int, top_k: int) -> TreeConfig:
    try:
        return TreeConfig(num_drafts, depth=depth, top_k=top_k, verify_budget=None)
    except ValueError as error:
        raise ValueError(f"{setting}: {error}") from error


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``vllm-eagle3 train``."""
    default = TrainConfig()
    parser.add_argument("--target", required=True, help="a Llama checkpoint, folder or hub name")
    parser.add_argument(
        "--data", required=True, type=Path, nargs="+", metavar="DIR",
        help="folders of `data synth`, `data regenerate` or `data convert`",
    )  # fmt: skip
    parser.add_argument("--out", required=True, type=Path, help="folder for the head")
    parser.add_argument("--device", help="cuda or cpu (default: cuda where there is some)")
    parser.add_argument("--resume", action="store_true", help="go on from the state in --out")

    def add(name: str, kind: type, text: str) -> None:
        value = getattr(default, name)
        unset = _UNSET.get(name, "none")
        shown = unset if value is None else value
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=kind, default=value, help=f"{text} ({shown})"
        )

    from vllm_eagle3.train.objectives import OBJECTIVES

    add("objective", str, "what to train: " + ", ".join(OBJECTIVES))
    add("draft_vocab_size", int, "tokens that an EAGLE-3 head can predict")
    add("data_share", float, "share of the documents to train on, drawn by the seed")
    add("epochs", int, "passes over the data, at most")
    add("steps", int, "optimiser steps, at most")
    add("minutes", float, "wall-clock limit; the learning rate ends with it")
    add("batch_tokens", int, "tokens of an optimiser step")
    add("accumulate", int, "parts that an optimiser step is read in, to save memory")
    add("max_length", int, "longer documents are cut")
    add("learning_rate", float, "peak")
    add("clip", float, "largest norm of a step's gradient")
    add("num_ttt_steps", int, "draft steps trained through")
    add("ttt_decay", float, "weight of a draft step relative to the one before")
    add("top_k_from", float, "hass: share of the run after which top-K distillation counts")
    add("log_every", int, "steps between log lines")
    add("eval_every", int, "steps between evaluations")
    add("eval_documents", int, "held-out documents to predict acceptance lengths on; 0: none")
    add("eval_chain", int, "drafts of the chain that the evaluation predicts for")
    parser.add_argument(
        "--eval-tree",
        type=_tree_shape,
        default=default.eval_tree,
        metavar="TREE",
        help="the tree that the evaluation predicts for: N or N/DEPTH/TOP_K"
        f" ({'/'.join(map(str, default.eval_tree))})",
    )
    add("save_every", int, "steps between states to resume from")
    add("seed", int, "of the order and the weights")
    add("attention", str, "flash or math")
    parser.add_argument(
        "--packing",
        action=argparse.BooleanOptionalAction,
        default=default.packing,
        help="several documents in a row of --max-length, in place of padding (on)",
    )
    for name, text in (
        ("recompute", "compute a draft step's activations again instead of keeping them"),
        ("shard_target", "spread the target's layers over the processes of torchrun"),
        ("tensorboard", "write TensorBoard's events too"),
    ):
        parser.add_argument(f"--{name.replace('_', '-')}", action="store_true", help=text)


def _tree_shape(text: str) -> tuple[int, int, int]:
    """The type of ``--eval-tree``: draft tokens, depth and top-k, the latter two by default."""
    sizes = text.split("/")
    if len(sizes) not in (1, 3) or not all(size.isdecimal() for size in sizes):
        raise argparse.ArgumentTypeError(
            f"{text}: give the number of draft tokens, as in 31, or also depth and top-k, as in"
            " 31/5/16"
        )
    shape = dict(zip(("depth", "top_k"), map(int, sizes[1:]), strict=False))
    try:
        tree = TreeConfig.from_dict(shape or True, int(sizes[0]))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error}") from error
    return tree.num_speculative_tokens, tree.depth, tree.top_k


def config_from_arguments(args: argparse.Namespace) -> TrainConfig:
    """Settings from the command line; what has no option keeps its default."""
    names = {field.name for field in fields(TrainConfig)}
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in vars(args).items() if k in names}
    return TrainConfig(**given)
