"""What an engine writes for one turn of a conversation, asked for piece by piece.

A loop has to be looked for. vLLM would compare up to 41 lengths of loops at every token, in the
scheduler, which bounds small targets; here the engine is asked for a piece at a time, which is
looked at as a whole, and the prefix cache makes asking for the next one cheap.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from vllm_eagle3.data.loops import end_of_loop

PIECE_TOKENS = 128


@dataclass(frozen=True)
class Completion:
    """A whole turn.

    Attributes:
        finish_reason: ``"stop"`` at an end token, which is the last one; ``"length"``; or
            ``"repetition"`` where the text repeated itself for the third time and was cut.
    """

    token_ids: list[int]
    finish_reason: Literal["stop", "length", "repetition"]


@dataclass
class Turn:
    """A turn that is being written.

    Attributes:
        prompt: token ids before it.
        max_tokens: of it, at most.
        sampling: further arguments of vLLM's ``SamplingParams``.
    """

    conversation: Any
    prompt: Sequence[int]
    max_tokens: int
    sampling: dict[str, Any]
    written: list[int] = field(default_factory=list)

    @property
    def next_prompt(self) -> list[int]:
        """Token ids before the next piece."""
        return [*self.prompt, *self.written]

    @property
    def next_tokens(self) -> int:
        """Of the next piece, at most."""
        return min(PIECE_TOKENS, self.max_tokens - len(self.written))

    def take(self, token_ids: Sequence[int], finish_reason: str) -> Completion | None:
        """Add a piece; the turn, if that was the last one."""
        self.written += token_ids
        end = end_of_loop(self.written)
        if end is not None:
            return Completion(self.written[:end], "repetition")
        if finish_reason == "length" and self.next_tokens > 0:
            return None
        return Completion(self.written, finish_reason)
