"""Mean acceptance length, and where two outputs part.

**tau** is the number of tokens that a user receives for each target forward that decodes::

    tau = (output tokens - 1 for each turn) / (decoding forwards)

Every turn's first token comes from its prefill, which verifies nothing: neither that token
nor that forward counts. Tokens are counted *after* the output is cut at the end-of-sequence
token or at ``max_tokens``: what the last forward accepted past the cut was never worth
anything to anyone. Sums are taken over all tokens and all forwards of a data set before
dividing (token-weighted), so that long answers weigh what they cost. A forward without drafts
(the last one before ``max_model_len``, or a resumed request) counts as the forward it is.

vLLM's own figure, ``1 + accepted / drafts``, counts before the cut and leaves forwards
without drafts out, so it lies slightly above tau. It is reported beside tau as a check.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Tally:
    """Tokens and forwards of the turns added so far."""

    turns: int = 0
    output_tokens: int = 0
    decoded_tokens: int = 0
    forwards: int = 0
    tokens_per_forward: Counter[int] = field(default_factory=Counter)

    def add(self, steps: Sequence[int]) -> None:
        """Add one turn, given the tokens that arrived in each engine step, prefill first.

        Args:
            steps: tokens of the turn's output that each step brought, after the cut.

        Raises:
            ValueError: no step, or a step without tokens.
        """
        if not steps or min(steps) < 1:
            raise ValueError(f"every step of a turn brings at least one token, got {list(steps)}")
        self.turns += 1
        self.output_tokens += sum(steps)
        self.decoded_tokens += sum(steps) - 1
        self.forwards += len(steps) - 1
        self.tokens_per_forward.update(steps[1:])

    @property
    def tau(self) -> float | None:
        """Tokens for each decoding forward; None before the first such forward."""
        return self.decoded_tokens / self.forwards if self.forwards else None


def vllm_tau(num_drafts: int, num_accepted_tokens: int) -> float | None:
    """vLLM's mean acceptance length: ``1 + accepted / drafts``, counted before the cut."""
    return 1 + num_accepted_tokens / num_drafts if num_drafts else None


def first_divergence(tokens: Sequence[int], reference: Sequence[int]) -> int | None:
    """Index of the first token that differs, or of the first that only one side has."""
    for index, (token, expected) in enumerate(zip(tokens, reference, strict=False)):
        if token != expected:
            return index
    if len(tokens) != len(reference):
        return min(len(tokens), len(reference))
    return None
