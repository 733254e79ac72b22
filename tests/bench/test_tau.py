import pytest

from vllm_eagle3.bench.tau import Tally, first_divergence, vllm_tau


def test_the_prefill_counts_neither_as_token_nor_as_forward():
    tally = Tally()
    tally.add([1, 3, 1, 4])
    assert (tally.output_tokens, tally.decoded_tokens, tally.forwards) == (9, 8, 3)
    assert tally.tau == pytest.approx(8 / 3)


def test_plain_decoding_has_tau_one():
    tally = Tally()
    tally.add([1] * 50)
    assert tally.tau == 1.0


def test_a_last_step_cut_at_the_end_of_sequence_counts_what_is_left():
    """The last forward accepted 5 drafts, but the second of them ended the answer."""
    whole, cut = Tally(), Tally()
    whole.add([1, 4, 6])
    cut.add([1, 4, 2])
    assert whole.tau == 5.0
    assert cut.tau == 3.0
    # vLLM counts before the cut, whatever the answer's end.
    assert vllm_tau(num_drafts=2, num_accepted_tokens=3 + 5) == 5.0


def test_long_answers_weigh_more():
    tally = Tally()
    tally.add([1, 4])
    tally.add([1] + [2] * 9)
    assert tally.tau == pytest.approx(22 / 10)
    assert tally.turns == 2
    assert tally.tokens_per_forward == {4: 1, 2: 9}


def test_an_answer_of_its_prefill_alone_adds_nothing():
    tally = Tally()
    tally.add([1])
    assert tally.tau is None
    tally.add([1, 2])
    assert tally.tau == 2.0


def test_an_accepted_placeholder_beside_a_cached_prompt_is_a_token():
    """vLLM may verify placeholder drafts in a prefill of one token: output - 1 holds still."""
    tally = Tally()
    tally.add([2, 3])
    assert (tally.decoded_tokens, tally.forwards) == (4, 1)


@pytest.mark.parametrize("steps", [[], [1, 0, 2]])
def test_impossible_steps_are_refused(steps):
    with pytest.raises(ValueError, match="at least one token"):
        Tally().add(steps)


def test_vllms_figure_without_drafts_is_none():
    assert vllm_tau(0, 0) is None


@pytest.mark.parametrize(
    ("tokens", "reference", "index"),
    [
        ([5, 6, 7], [5, 6, 7], None),
        ([5, 6, 7], [5, 9, 7], 1),
        ([5, 6], [5, 6, 7], 2),
        ([5, 6, 7], [5, 6], 2),
        ([], [], None),
    ],
)
def test_first_divergence(tokens, reference, index):
    assert first_divergence(tokens, reference) == index
