"""The loss mask is what the chat template leaves to the assistant."""

import pytest

from tests.data.tokenizers import (
    CHATML,
    FORGETFUL,
    NO_END,
    REWRITING,
    TRIMMING,
    byte_tokenizer,
)
from vllm_eagle3.data.formats import Chat
from vllm_eagle3.data.masks import ChatTemplate

CHAT = Chat("Be brief.", ("Hi", "assistant: no"), ("Hello.", "So."))


def test_the_assistant_wrote_its_answers_and_their_ends() -> None:
    tokenizer = byte_tokenizer()
    document = ChatTemplate(tokenizer).document(CHAT)
    whole = tokenizer.apply_chat_template(CHAT.messages(CHAT.answers), tokenize=False)
    assert tokenizer.decode(document.tokens) == whole.removesuffix("\n")
    written = tokenizer.decode(document.tokens[document.assistant])
    assert written == "Hello.<|im_end|>So.<|im_end|>"


def test_pieces_join_to_what_the_target_is_asked_at_every_turn() -> None:
    tokenizer = byte_tokenizer()
    template = ChatTemplate(tokenizer)
    answer = [*tokenizer("Hello.").input_ids, template.end_of_turn]
    asked = template.prompt(CHAT) + answer + template.follow_up(CHAT, 1)
    served = tokenizer.apply_chat_template(
        CHAT.messages(["Hello."]), add_generation_prompt=True, return_dict=False
    )
    assert asked == served


def test_a_last_question_without_an_answer_is_left_out() -> None:
    template = ChatTemplate(byte_tokenizer())
    open_end = Chat(None, ("Hi", "Why?"), ("Hello.",))
    assert template.document(open_end).tokens[-1] == template.end_of_turn
    with pytest.raises(ValueError, match="no answer"):
        template.document(Chat(None, ("Hi",)))


def test_a_template_may_trim_what_is_said_and_set_a_space_before_it() -> None:
    tokenizer = byte_tokenizer(TRIMMING)
    document = ChatTemplate(tokenizer).document(Chat(None, (" Hi ", "Why?"), ("Hello.", "So.")))
    assert tokenizer.decode(document.tokens).startswith("<|im_start|>user\n Hi<|im_end|>")
    written = tokenizer.decode(document.tokens[document.assistant])
    assert written == " Hello.<|im_end|> So.<|im_end|>"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (REWRITING, "not prefix-stable"),
        (FORGETFUL, "removes reasoning"),
        (NO_END, "no special token"),
        (CHATML.replace("m['content']", "m['role']"), "does not render"),
    ],
    ids=["rewriting", "forgetful", "no end", "no content"],
)
def test_templates_that_cannot_do_several_turns_are_refused(template: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ChatTemplate(byte_tokenizer(template))


@pytest.mark.parametrize("template", [REWRITING, FORGETFUL, NO_END])
def test_one_turn_asks_less_of_a_template(template: str) -> None:
    tokenizer = byte_tokenizer(template)
    document = ChatTemplate(tokenizer, turns=1).document(Chat(None, ("Hi",), ("Hello.",)))
    assert tokenizer.decode(document.tokens[document.assistant]).startswith("Hello.")


def test_a_target_without_a_template_is_refused() -> None:
    with pytest.raises(ValueError, match="no chat template: use an instruction-tuned target"):
        ChatTemplate(byte_tokenizer(None))


def test_variables_reach_the_template() -> None:
    tokenizer = byte_tokenizer("{{ mood }}" + CHATML)
    prompt = ChatTemplate(tokenizer, mood="glad").prompt(Chat(None, ("Hi",)))
    assert tokenizer.decode(prompt).startswith("glad<|im_start|>")


def test_what_the_template_itself_refuses_is_a_mistake_of_the_conversation() -> None:
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    template = ChatTemplate(byte_tokenizer(strict + CHATML))
    assert template.prompt(Chat(None, ("Hi",)))
    with pytest.raises(ValueError, match="refuses the conversation: no system"):
        template.prompt(CHAT)
