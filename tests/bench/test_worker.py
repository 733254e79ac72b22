from types import SimpleNamespace

from vllm_eagle3.bench.worker import _runner_up, token_texts


class Bytes:
    """A tokenizer whose tokens are bytes; token 0 is special."""

    def decode(self, tokens, skip_special_tokens):
        assert skip_special_tokens
        return bytes(token for token in tokens if token).decode(errors="replace")


def test_each_token_adds_its_own_text():
    tokens = list(b"one two")
    assert token_texts(Bytes(), tokens, 3) == ["t", "w", "o"]
    assert token_texts(Bytes(), tokens, 7) == list("one two")


def test_half_a_character_shows_with_the_token_that_completes_it():
    tokens = list("né!".encode())
    assert token_texts(Bytes(), tokens, 4) == ["n", "", "é", "!"]
    assert token_texts(Bytes(), tokens[:2], 1) == [""]


def test_special_tokens_show_nothing():
    assert token_texts(Bytes(), [*b"ab", 0], 2) == ["b", ""]


def test_the_runner_up_is_the_best_other_token():
    logprobs = {
        4: SimpleNamespace(logprob=-0.5),
        9: SimpleNamespace(logprob=-0.75),
        7: SimpleNamespace(logprob=-3.0),
    }
    assert _runner_up(4, logprobs) == [9, 0.25]
