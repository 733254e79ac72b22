"""Rounds of drafting, served and predicted, and what a set of them says about a head.

A round is one decoding forward of the target; ``context`` counts the tokens that stand when it
begins, and ``tokens`` those that it emits, after the answer is cut (see
:mod:`vllm_eagle3.bench.tau`). *Accepted at depth d* means that the round emits more than d tokens:
a draft of depth d was accepted, and a token follows it in the answer. So ``tau = 1 + sum over d``,
for served and for predicted rounds alike.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

DIFFERENCE_LIMIT = 5.0  # percent between predicted and served tau, above which it is flagged


class ServedRound(NamedTuple):
    """What the engine's steps show of a round."""

    context: int
    tokens: int


class PredictedRound(NamedTuple):
    """A round of the same answer, offline.

    ``tokens`` it emits if the target draws the answer's text; ``exceeds[d - 1]`` is the
    probability of more than d tokens at the answer's temperature.
    """

    context: int
    tokens: int
    exceeds: Sequence[float]


@dataclass(frozen=True)
class Rounds:
    """The rounds of some answers.

    Attributes:
        predicted: None where there is no prediction.
    """

    served: Sequence[ServedRound]
    predicted: Sequence[PredictedRound] | None

    def within(self, first: int, last: int) -> "Rounds":
        """Those that begin with ``first`` to ``last`` tokens of context."""
        predicted = self.predicted
        if predicted is not None:
            predicted = [r for r in predicted if first <= r.context <= last]
        return Rounds([r for r in self.served if first <= r.context <= last], predicted)

    def figures(self, depth: int) -> dict[str, Any]:
        """Served and predicted tau, their difference, and acceptance at depths 1 to ``depth``."""
        served = _served(self.served, depth)
        predicted = _predicted(self.predicted, depth) if self.predicted else None
        difference = None
        if served["tau"] and predicted:
            difference = 100 * (predicted["tau"] / served["tau"] - 1)
        return {
            "served": served,
            "predicted": predicted,
            "difference_percent": difference,
            "flagged": difference is not None and abs(difference) > DIFFERENCE_LIMIT,
        }


def served_rounds(prompt_tokens: int, steps: Sequence[int]) -> list[ServedRound]:
    """The rounds of an answer.

    Args:
        prompt_tokens: length of the prompt.
        steps: tokens that each engine step brought, the prefill's first.
    """
    rounds, context = [], prompt_tokens + steps[0]
    for tokens in steps[1:]:
        rounds.append(ServedRound(context, tokens))
        context += tokens
    return rounds


def context_ranges(rounds: Sequence[ServedRound]) -> list[tuple[int, int]]:
    """First and last context of each power of two that occurs; below 128 it is one range."""
    lowest = 128
    found = {max(1 << (r.context.bit_length() - 1), lowest // 2) for r in rounds}
    return [(0 if first < lowest else first, 2 * first - 1) for first in sorted(found)]


def _served(rounds: Sequence[ServedRound], depth: int) -> dict[str, Any]:
    count = len(rounds)
    return {
        "rounds": count,
        "tau": sum(r.tokens for r in rounds) / count if count else None,
        "accepted": [
            sum(r.tokens > d for r in rounds) / count if count else None
            for d in range(1, depth + 1)
        ],
    }


def _predicted(rounds: Sequence[PredictedRound], depth: int) -> dict[str, Any]:
    count = len(rounds)
    accepted = [sum(r.exceeds[d] for r in rounds) / count for d in range(depth)]
    return {
        "rounds": count,
        "tau": 1 + sum(accepted),
        "tau_of_text": sum(r.tokens for r in rounds) / count,
        "standard_error": math.sqrt(sum(map(_variance, rounds))) / count,
        "accepted": accepted,
    }


def _variance(round_: PredictedRound) -> float:
    """Of the number X of tokens, from P(X > d): E[(X - 1)^2] is the sum of (2d - 1) P(X > d)."""
    mean = sum(round_.exceeds)
    square = sum((2 * d - 1) * share for d, share in enumerate(round_.exceeds, 1))
    return max(0.0, square - mean * mean)
