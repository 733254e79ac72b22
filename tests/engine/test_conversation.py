"""Conversations for training data: whose token is whose, and what is cut where."""

import json
import random
from pathlib import Path

import pytest

from vllm_eagle3.engine.conversation import (
    ChatFormat,
    Conversation,
    Kind,
    draw_temperature,
    given_questions,
)
from vllm_eagle3.engine.synth_config import SynthConfig

FORM = ChatFormat(
    headers={None: [10, 11], "coder": [12, 13, 14]},
    user_to_answer=[2, 20, 21],
    answer_to_user=[30, 31],
    end_of_turn=2,
)


class CharacterTokenizer:
    """One token for a character; a chat template with one-character marks of the roles."""

    chat_template = "given"

    def __call__(self, text: str, add_special_tokens: bool = True):
        return type("Encoding", (), {"input_ids": [ord(c) for c in text]})

    def apply_chat_template(self, messages: list[dict], tokenize: bool) -> str:
        if messages[0]["role"] != "system":
            messages = [{"role": "system", "content": "default"}, *messages]
        return "".join(f"<{m['role'][0]}>{m['content']}|\n" for m in messages)


def test_the_pieces_of_a_chat_template() -> None:
    form = ChatFormat.from_tokenizer(CharacterTokenizer(), [Kind("code", "coder")])
    as_text = lambda ids: "".join(map(chr, ids))  # noqa: E731
    assert as_text(form.headers[None]) == "<s>default|\n<u>"
    assert as_text(form.headers["coder"]) == "<s>coder|\n<u>"
    assert as_text(form.user_to_answer) == "|\n<a>"
    assert as_text(form.answer_to_user) == "\n<u>"
    assert chr(form.end_of_turn) == "|"


def test_only_what_the_assistant_wrote_counts_over_two_turns() -> None:
    conversation = Conversation.start(FORM, Kind("code", "coder", "x"), [40], 2, 0.7)
    assert conversation.tokens == [12, 13, 14, 40]
    conversation.take_user_turn(FORM, [41])
    # The answer is asked for under the default system prompt.
    assert conversation.tokens == [10, 11, 40, 41, 2, 20, 21]
    assert conversation.take_answer(FORM, [50, 51, 2])
    conversation.take_user_turn(FORM, [42])
    assert not conversation.take_answer(FORM, [52, 2])
    document = conversation.document()
    assert document.tokens.tolist() == [
        10, 11, 40, 41, 2, 20, 21, 50, 51, 2, 30, 31, 42, 2, 20, 21, 52, 2,
    ]  # fmt: skip
    assert document.tokens[document.assistant].tolist() == [50, 51, 2, 52, 2]


def test_an_answer_that_was_cut_ends_the_conversation() -> None:
    conversation = Conversation.start(FORM, Kind("chat"), [], 2, 0.0)
    conversation.take_user_turn(FORM, [41])
    assert not conversation.take_answer(FORM, [50, 51])
    assert conversation.document().tokens[-1] == 51


def test_given_questions_are_first_turns_and_every_line_must_read(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    entries = [{"turns": ["One?", "More?"]}, {"question": "Two?"}, {"prompt": "Three?"}]
    path.write_text("\n".join(map(json.dumps, entries)) + "\n\n")
    assert given_questions([path]) == ["One?", "Two?", "Three?"]
    assert given_questions([]) == []
    with path.open("a") as file:
        file.write("not JSON\n")
    with pytest.raises(ValueError, match="line 5"):
        given_questions([path])


def test_temperatures_follow_their_weights() -> None:
    rng = random.Random(0)
    drawn = [draw_temperature(rng, {0.0: 0.4, 1.0: 0.6}) for _ in range(2000)]
    assert 0.35 < drawn.count(0.0) / 2000 < 0.45


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokens": 0}, "tokens=0"),
        ({"minutes": -1.0}, "minutes=-1"),
        ({"max_model_len": 512}, "max_model_len=512"),
        ({"kinds": ()}, "kinds"),
    ],
)
def test_impossible_settings_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SynthConfig(**settings)
