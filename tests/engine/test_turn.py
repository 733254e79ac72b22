"""A turn that an engine writes piece by piece."""

import pytest

from vllm_eagle3.engine.turn import PIECE_TOKENS, Completion, Turn

TEXT = list(range(1000, 1000 + 5 * PIECE_TOKENS))


def write(text: list[int], max_tokens: int, end: int | None = None) -> tuple[Completion, list[int]]:
    """The turn of an engine that writes ``text``, and the lengths of its prompts."""
    turn, prompts = Turn("chat", [1, 2, 3], max_tokens, {}), []
    while True:
        prompts.append(len(turn.next_prompt))
        assert turn.next_prompt == [1, 2, 3, *text[: len(turn.written)]]
        piece = text[len(turn.written) :][: turn.next_tokens]
        stopped = end in piece
        piece = piece[: piece.index(end) + 1] if stopped else piece
        completion = turn.take(piece, "stop" if stopped else "length")
        if completion:
            return completion, prompts


@pytest.mark.parametrize("max_tokens", [1, PIECE_TOKENS, PIECE_TOKENS + 1, 3 * PIECE_TOKENS])
def test_a_turn_is_as_long_as_asked_for(max_tokens: int) -> None:
    completion, prompts = write(TEXT, max_tokens)
    assert completion == Completion(TEXT[:max_tokens], "length")
    assert prompts == list(range(3, 3 + max_tokens, PIECE_TOKENS))


@pytest.mark.parametrize("length", [1, PIECE_TOKENS, PIECE_TOKENS + 1])
def test_an_end_token_ends_it(length: int) -> None:
    completion, _ = write(TEXT, len(TEXT), end=TEXT[length - 1])
    assert completion == Completion(TEXT[:length], "stop")


def test_a_loop_is_cut_at_its_third_time() -> None:
    text = TEXT[:90] + TEXT[200:230] * 20
    completion, _ = write(text, len(text))
    assert completion == Completion(text[: 90 + 3 * 30], "repetition")
