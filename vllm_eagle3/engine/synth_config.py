"""What to synthesise: the settings, validated once, and their command line."""

import argparse
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_eagle3.engine.conversation import DEFAULT_KINDS, Kind


@dataclass(frozen=True)
class SynthConfig:
    """What to synthesise, and how.

    Attributes:
        tokens: stop at this many tokens, all replicas together.
        minutes: stop after this long; what is finished by then is kept. None for no limit.
        replicas: engines that share the device.
        second_turns: share of conversations with a second user turn.
        answer_temperatures: temperature -> relative frequency.
        prompts: JSON-lines files of user turns for the target to answer.
        prompts_share: how many of the started conversations take a given question.
        exclude: JSON-lines files of user turns that must not be used (evaluation sets).
        shard_documents: documents of a shard.
        engine_args: further arguments of ``vllm.LLM``.
    """

    tokens: int = 5_000_000
    minutes: float | None = None
    replicas: int = 1
    seed: int = 0
    kinds: tuple[Kind, ...] = DEFAULT_KINDS
    user_temperature: float = 1.0
    user_top_p: float = 0.9
    answer_temperatures: dict[float, float] = field(
        default_factory=lambda: {0.0: 0.4, 0.7: 0.3, 1.0: 0.3}
    )
    second_turns: float = 0.2
    max_user_tokens: int = 256
    max_answer_tokens: int = 768
    prompts: tuple[Path, ...] = ()
    prompts_share: float = 0.3
    exclude: tuple[Path, ...] = ()
    shard_documents: int = 1000
    max_num_seqs: int = 512
    max_model_len: int = 2048
    engine_args: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("tokens", "replicas", "max_user_tokens", "max_answer_tokens",
                     "shard_documents", "max_num_seqs"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.minutes is not None and self.minutes <= 0:
            raise ValueError(f"minutes={self.minutes} must be positive, or left out for no limit")
        longest = 2 * (self.max_user_tokens + self.max_answer_tokens)
        if not self.kinds or not self.answer_temperatures:
            raise ValueError("kinds and answer_temperatures must not be empty")
        if self.max_user_tokens + self.max_answer_tokens >= self.max_model_len:
            raise ValueError(
                f"max_model_len={self.max_model_len} cannot hold a user turn and an answer: "
                f"raise it (two full turns take about {longest}), or lower max_answer_tokens"
            )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``vllm-eagle3 data synth``."""
    default = SynthConfig()
    parser.add_argument("--target", required=True, help="a checkpoint with a chat template")
    parser.add_argument("--out", required=True, type=Path, help="folder for the shards")

    def add(name: str, kind: type, text: str) -> None:
        value = getattr(default, name)
        shown = "none" if value is None else value
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=kind, default=value, help=f"{text} ({shown})"
        )

    add("tokens", int, "stop at this many tokens")
    add("minutes", float, "stop after this long, start of the engines included")
    add("replicas", int, "engines that share the device")
    add("max_num_seqs", int, "conversations in flight, each replica")
    add("max_model_len", int, "tokens of a conversation, at most")
    add("max_user_tokens", int, "tokens of a user turn, at most")
    add("max_answer_tokens", int, "tokens of an answer, at most")
    add("user_temperature", float, "of user turns")
    add("user_top_p", float, "of user turns")
    add("second_turns", float, "share of conversations with a second user turn")
    add("prompts_share", float, "share of given questions among what is started")
    add("shard_documents", int, "documents of a shard")
    add("seed", int, "of everything drawn")
    parser.add_argument(
        "--answer-temperatures",
        type=_mix,
        default=default.answer_temperatures,
        metavar="T=WEIGHT,...",
        help="of answers (0=0.4,0.7=0.3,1=0.3)",
    )
    parser.add_argument(
        "--kinds", type=_kinds, default=DEFAULT_KINDS, metavar="FILE.json",
        help="a list of {name, system, opening, weight} instead of the default kinds",
    )  # fmt: skip
    parser.add_argument(
        "--prompts", type=Path, nargs="*", default=(), metavar="FILE.jsonl",
        help="questions to answer besides (keys turns, question or prompt)",
    )  # fmt: skip
    parser.add_argument(
        "--exclude", type=Path, nargs="*", default=(), metavar="FILE.jsonl",
        help="questions that must not occur (evaluation sets)",
    )  # fmt: skip
    parser.add_argument(
        "--engine-args", type=json.loads, default={}, metavar="JSON",
        help="further arguments of vllm.LLM, such as '{\"enforce_eager\": true}'",
    )  # fmt: skip


def config_from_arguments(args: argparse.Namespace) -> SynthConfig:
    """Settings from the command line."""
    given = {k: v for k, v in vars(args).items() if k in SynthConfig.__dataclass_fields__}
    return SynthConfig(**given | {"prompts": tuple(args.prompts), "exclude": tuple(args.exclude)})


def _mix(text: str) -> dict[float, float]:
    pairs = (part.split("=") for part in text.split(","))
    return {float(temperature): float(weight) for temperature, weight in pairs}


def _kinds(path: str) -> tuple[Kind, ...]:
    return tuple(Kind(**entry) for entry in json.loads(Path(path).read_text()))
