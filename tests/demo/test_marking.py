import pytest

from vllm_eagle3.demo.marking import mark, plain_text


@pytest.mark.parametrize(
    ("texts", "segments"),
    [
        ([" one"], [(" one", False)]),
        ([" one", " two", "!"], [(" one two", True), ("!", False)]),
        # The second token is half a character, which the third completes.
        (["a", "", "é"], [("a", True), ("é", False)]),
        # The end-of-sequence token shows nothing.
        (["a", "b", ""], [("ab", True)]),
        ([""], []),
    ],
)
def test_all_but_the_last_token_of_a_step_were_drafted(texts, segments):
    assert mark(texts) == segments


def test_marks_are_legible_without_colours():
    assert plain_text(mark([" the", " sky", " is"])) == "⟨ the sky⟩ is"
    assert plain_text(mark([" blue"])) == " blue"
