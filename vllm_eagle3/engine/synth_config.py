"""What to synthesise: the settings, validated once, and their command line."""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

from vllm_eagle3.engine.conversation import DEFAULT_KINDS, Kind
from vllm_eagle3.engine.replica_config import (
    ReplicaConfig,
    add_replica_arguments,
    add_setting,
    settings_from,
)


@dataclass(frozen=True, kw_only=True)
class SynthConfig(ReplicaConfig):
    """What to synthesise, and how.

    Attributes:
        tokens: stop at this many tokens, all replicas together.
        second_turns: share of conversations with a second user turn.
        prompts: JSON-lines files of user turns for the target to answer.
        prompts_share: how many of the started conversations take a given question.
    """

    tokens: int = 5_000_000
    kinds: tuple[Kind, ...] = DEFAULT_KINDS
    user_temperature: float = 1.0
    user_top_p: float = 0.9
    second_turns: float = 0.2
    max_user_tokens: int = 256
    prompts: tuple[Path, ...] = ()
    prompts_share: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("tokens", "max_user_tokens")
        if not self.kinds:
            raise ValueError("kinds must not be empty")
        if self.max_user_tokens + self.max_answer_tokens >= self.max_model_len:
            longest = 2 * (self.max_user_tokens + self.max_answer_tokens)
            raise ValueError(
                f"max_model_len={self.max_model_len} cannot hold a user turn and an answer: "
                f"raise it (two full turns take about {longest}), or lower max_answer_tokens"
            )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``vllm-eagle3 data synth``."""
    default = SynthConfig()
    add_replica_arguments(parser, default)
    for name, kind, text in (
        ("tokens", int, "stop at this many tokens"),
        ("max_user_tokens", int, "tokens of a user turn, at most"),
        ("user_temperature", float, "of user turns"),
        ("user_top_p", float, "of user turns"),
        ("second_turns", float, "share of conversations with a second user turn"),
        ("prompts_share", float, "share of given questions among what is started"),
    ):
        add_setting(parser, default, name, kind, text)
    parser.add_argument(
        "--kinds", type=_kinds, default=DEFAULT_KINDS, metavar="FILE.json",
        help="a list of {name, system, opening, weight} instead of the default kinds",
    )  # fmt: skip
    parser.add_argument(
        "--prompts", type=Path, nargs="*", default=(), metavar="FILE.jsonl",
        help="questions to answer besides, in any format that data regenerate reads",
    )  # fmt: skip


def config_from_arguments(args: argparse.Namespace) -> SynthConfig:
    """Settings from the command line."""
    return SynthConfig(**settings_from(args, SynthConfig))


def _kinds(path: str) -> tuple[Kind, ...]:
    try:
        return tuple(Kind(**entry) for entry in json.loads(Path(path).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise argparse.ArgumentTypeError(
            f"{path} is no list of kinds of conversations as JSON objects ({error})"
        ) from error
