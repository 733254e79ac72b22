"""What to synthesise: the settings, validated once."""

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
