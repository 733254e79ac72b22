"""What every kind of data making asks of its engines, and the command line for it."""

import argparse
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from vllm_eagle3.options import json_object


@dataclass(frozen=True, kw_only=True)
class ReplicaConfig:
    """Engines that make data side by side.

    Attributes:
        minutes: stop after this long; what is finished by then is kept. None for no limit.
        replicas: engines, spread over the visible GPUs; where there are more, they share them.
        shard_documents: documents of a shard.
        max_num_seqs: conversations in flight, each replica.
        max_model_len: tokens of a conversation, at most.
        answer_temperatures: temperature -> relative frequency.
        exclude: JSON-lines files of prompts that must not be used, besides the bundled
            evaluation sets.
        engine_args: further arguments of ``vllm.LLM``.
    """

    minutes: float | None = None
    replicas: int = 1
    seed: int = 0
    shard_documents: int = 1000
    max_num_seqs: int = 512
    max_model_len: int = 2048
    max_answer_tokens: int = 768
    answer_temperatures: dict[float, float] = field(
        default_factory=lambda: {0.0: 0.4, 0.7: 0.3, 1.0: 0.3}
    )
    exclude: tuple[Path, ...] = ()
    engine_args: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.require_positive("replicas", "shard_documents", "max_num_seqs", "max_answer_tokens")
        if self.minutes is not None and self.minutes <= 0:
            raise ValueError(f"minutes={self.minutes} must be positive, or left out for no limit")
        if not self.answer_temperatures:
            raise ValueError("answer_temperatures must not be empty")

    @property
    def gpus_each(self) -> int:
        """GPUs that one engine spreads the target over."""
        sizes = ("tensor_parallel_size", "pipeline_parallel_size")
        return prod(int(self.engine_args.get(name, 1)) for name in sizes)

    def require_positive(self, *names: str) -> None:
        """Raise ValueError for the first of these settings that is below 1."""
        for name in names:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")


def add_setting(
    parser: argparse.ArgumentParser, default: ReplicaConfig, name: str, kind: type, text: str
) -> None:
    """An option for the setting ``name``, with its default."""
    value = getattr(default, name)
    shown = "none" if value is None else value
    parser.add_argument(
        f"--{name.replace('_', '-')}", type=kind, default=value, help=f"{text} ({shown})"
    )


def add_replica_arguments(parser: argparse.ArgumentParser, default: ReplicaConfig) -> None:
    """The options that all commands share."""
    parser.add_argument("--target", required=True, help="a checkpoint with a chat template")
    parser.add_argument("--out", required=True, type=Path, help="folder for the shards")
    for name, kind, text in (
        ("minutes", float, "stop after this long, start of the engines included"),
        ("replicas", int, "engines, spread over the GPUs"),
        ("max_num_seqs", int, "conversations in flight, each replica"),
        ("max_model_len", int, "tokens of a conversation, at most"),
        ("max_answer_tokens", int, "tokens of an answer, at most"),
        ("shard_documents", int, "documents of a shard"),
        ("seed", int, "of everything drawn"),
    ):
        add_setting(parser, default, name, kind, text)
    parser.add_argument(
        "--answer-temperatures",
        type=_mix,
        default=default.answer_temperatures,
        metavar="T=WEIGHT,...",
        help="of answers (0=0.4,0.7=0.3,1=0.3)",
    )
    parser.add_argument(
        "--exclude", type=Path, nargs="*", default=(), metavar="FILE.jsonl",
        help="prompts that must not occur, besides the bundled evaluation sets",
    )  # fmt: skip
    parser.add_argument(
        "--engine-args", type=json_object, default={}, metavar="JSON",
        help="further arguments of vllm.LLM, such as '{\"enforce_eager\": true}'",
    )  # fmt: skip


def settings_from(args: argparse.Namespace, config: type[ReplicaConfig]) -> dict[str, Any]:
    """Those options of a command line that are settings of ``config``; lists as tuples."""
    given = {k: v for k, v in vars(args).items() if k in config.__dataclass_fields__}
    return {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}


def _mix(text: str) -> dict[float, float]:
    pairs = [part.split("=") for part in text.split(",")]
    try:
        mix = {float(temperature): float(weight) for temperature, weight in pairs}
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text}: give temperatures with their weights, as in 0=0.4,0.7=0.6"
        ) from error
    return mix
