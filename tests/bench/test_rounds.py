"""Rounds and their figures: tau, acceptance by depth, and how far chance carries."""

import itertools
import math

import pytest

from vllm_eagle3.bench.rounds import (
    PredictedRound,
    Rounds,
    ServedRound,
    context_ranges,
    served_rounds,
)
from vllm_eagle3.bench.tau import Tally


def test_the_prefill_is_no_round():
    assert served_rounds(10, [1, 3, 2]) == [ServedRound(11, 3), ServedRound(14, 2)]
    assert served_rounds(10, [1]) == []


def test_tau_is_that_of_the_benchmarks_and_one_more_than_the_acceptance_of_all_depths():
    steps = [1, 3, 1, 4, 2, 1]
    tally = Tally()
    tally.add(steps)
    served = Rounds(served_rounds(5, steps), None).figures(3)["served"]
    assert served["tau"] == tally.tau == 1 + sum(served["accepted"])
    assert served["accepted"] == [3 / 5, 2 / 5, 1 / 5]


def test_contexts_are_split_at_powers_of_two():
    rounds = [ServedRound(context, 1) for context in (3, 127, 128, 255, 1024)]
    ranges = context_ranges(rounds)
    assert ranges == [(0, 127), (128, 255), (1024, 2047)]
    counts = [
        Rounds(rounds, None).within(*place).figures(1)["served"]["rounds"] for place in ranges
    ]
    assert counts == [2, 2, 1]


def test_the_standard_error_is_that_of_independent_rounds():
    shares = [(0.5, 0.25), (0.9, 0.0), (1.0, 1.0)]
    predicted = [PredictedRound(9, 1, exceeds) for exceeds in shares]
    figures = Rounds([ServedRound(9, 2)], predicted).figures(2)["predicted"]

    def chances(first: float, second: float) -> list[float]:
        return [1 - first, first - second, second]  # of 1, 2 and 3 tokens

    outcomes = {}
    for tokens in itertools.product((1, 2, 3), repeat=3):
        share = math.prod(chances(*s)[n - 1] for s, n in zip(shares, tokens, strict=True))
        outcomes[tokens] = share, sum(tokens) / 3
    mean = sum(share * tau for share, tau in outcomes.values())
    variance = sum(share * (tau - mean) ** 2 for share, tau in outcomes.values())
    assert figures["tau"] == pytest.approx(mean)
    assert figures["standard_error"] == pytest.approx(math.sqrt(variance))


@pytest.mark.parametrize(("expected", "flagged"), [(1.04, False), (1.06, True), (0.94, True)])
def test_a_prediction_that_is_off_is_flagged(expected, flagged):
    predicted = [PredictedRound(9, 2, (2 * expected - 1,))]
    figures = Rounds([ServedRound(9, 2)], predicted).figures(1)
    assert figures["difference_percent"] == pytest.approx(100 * (expected - 1))
    assert figures["flagged"] is flagged


def test_without_rounds_there_are_no_figures():
    figures = Rounds([], [PredictedRound(9, 1, (0.5,))]).figures(1)
    assert figures["served"] == {"rounds": 0, "tau": None, "accepted": [None]}
    assert figures["difference_percent"] is None
    assert Rounds([ServedRound(9, 1)], None).figures(1)["predicted"] is None
