"""Token ids of conversations, and which of them the assistant wrote: the loss mask.

Both come from the tokenizer's chat template alone. Every answer begins where the template
puts its generation prompt, and ends with the first special token that the template puts
behind an answer. The pieces between answers are encoded one by one, exactly as they reach
the target when it is served: it goes on from the prompt's tokens, whatever a joint encoding
of prompt and answer would merge.

This asks of a template that a conversation only grows: what was rendered before an answer
must stay as it was when the answer and a further question follow. A template that rewrites
its history (most often: one that removes earlier reasoning) is refused, because then no
single sequence of tokens is what the target saw at every turn.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from vllm_eagle3.corpus import Document
from vllm_eagle3.data.formats import Chat, Message

_ANSWER = "⟦answer {}⟧"
_THOUGHT = "⟦thought⟧"


class ChatTemplate:
    """A tokenizer's chat template, cut at the answers.

    Attributes:
        end_of_turn: the token that ends an answer; None if the template writes none, and
            then conversations have one turn.
    """

    def __init__(self, tokenizer: Any, *, turns: int = 2, **settings: Any) -> None:
        """
        Args:
            tokenizer: as transformers loads it.
            turns: most user turns of a conversation; 1 asks less of the template.
            settings: further variables of the template, such as ``enable_thinking``.

        Raises:
            ValueError: there is no chat template, or it cannot do ``turns`` turns.
        """
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                "the target's tokenizer has no chat template: use an instruction-tuned target,"
                " or add a chat_template to its tokenizer_config.json"
            )
        self._tokenizer, self._settings = tokenizer, settings
        probe = Chat(None, ("⟦question 1⟧", "⟦question 2⟧"))
        asked = self._render(probe, 0, prompt=True)
        begin, end = self._cut(self._render(probe, 1, prompt=False), 1)
        # Some templates set a space before an answer; the target writes that itself.
        space = begin.removeprefix(asked) if begin.startswith(asked) else ""
        self._space = "" if space.strip() else space
        self._tail = self._encode(end)
        special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
        ends = [place for place, token in enumerate(self._tail) if token in special]
        # What follows the end of a turn, often a line break, is the template's.
        self._tail = self._tail[: ends[0] + 1] if ends else []
        self.end_of_turn: int | None = self._tail[-1] if ends else None
        if turns > 1:
            self._check_history(probe)

    def _check_history(self, probe: Chat) -> None:
        remedy = "; with at most one turn (--max-turns 1) this does not matter"
        if self.end_of_turn is None:
            raise ValueError(f"the chat template ends an answer with no special token{remedy}")
        try:
            self.follow_up(probe, 1)
        except ValueError as error:
            raise ValueError(f"{error}{remedy}") from error
        thinking = f"<think>\n{_THOUGHT}\n</think>\n\n{_ANSWER.format(1)}"
        if _THOUGHT not in self._apply(probe.messages([thinking]), prompt=True):
            raise ValueError(
                "the chat template removes reasoning from earlier answers, so that a later turn"
                f" does not go on from what the target wrote{remedy}"
            )

    def prompt(self, chat: Chat) -> list[int]:
        """Token ids up to where the first answer begins."""
        return self._encode(self._render(chat, 0, prompt=True))

    def follow_up(self, chat: Chat, turns: int) -> list[int]:
        """Token ids between the end of answer ``turns`` (from 1) and the next answer's begin.

        Raises:
            ValueError: the template rewrites what precedes, or follows answers differently.
        """
        before = self._render(chat, turns - 1, prompt=True)
        history, rest = self._cut(self._render(chat, turns, prompt=True), turns)
        tokens = self._encode(rest)
        stable = history in (before, before + self._space)
        if not stable or tokens[: len(self._tail)] != self._tail:
            raise ValueError(
                "the chat template is not prefix-stable: it renders a conversation differently"
                " when a further turn follows"
            )
        return tokens[len(self._tail) :]

    def document(self, chat: Chat) -> Document:
        """A conversation with the answers that it has; a last question without one is left out.

        Raises:
            ValueError: no answer, or none that has a token, or as :meth:`follow_up`.
        """
        if not chat.answers:
            raise ValueError("the conversation has no answer")
        builder = DocumentBuilder(self.prompt(chat))
        for turn, answer in enumerate(chat.answers, 1):
            if turn > 1:
                builder.add(self.follow_up(chat, turn - 1), assistant=False)
            builder.add(self._encode(self._space + answer) + self._tail, assistant=True)
        document = builder.document()
        if not len(document.tokens):
            raise ValueError("all answers are empty")
        return document

    def _render(self, chat: Chat, answers: int, *, prompt: bool) -> str:
        """Text with marks for answers; without ``prompt``, up to the last of them."""
        messages = chat.messages(_ANSWER.format(turn) for turn in range(1, answers + 1))
        if not prompt:
            messages = messages[:-1]
        return self._apply(messages, prompt=prompt)

    def _apply(self, messages: Sequence[Message], *, prompt: bool) -> str:
        from jinja2 import TemplateError

        try:
            return self._tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=prompt, **self._settings
            )
        except TemplateError as error:  # most often: no system message allowed
            raise ValueError(f"the chat template refuses the conversation: {error}") from error

    @staticmethod
    def _cut(text: str, turn: int) -> tuple[str, str]:
        before, found, after = text.partition(_ANSWER.format(turn))
        if not found:
            raise ValueError("the chat template does not render the assistant's messages")
        return before, after

    def _encode(self, text: str) -> list[int]:
        # The template writes the special tokens itself.
        return list(self._tokenizer(text, add_special_tokens=False).input_ids) if text else []


class DocumentBuilder:
    """A document in the making: tokens, and whose they are."""

    def __init__(self, prompt: Sequence[int]) -> None:
        self.tokens = list(prompt)
        self._assistant = [False] * len(prompt)

    def add(self, tokens: Sequence[int], *, assistant: bool) -> None:
        """Put ``tokens`` at the end."""
        self.tokens += tokens
        self._assistant += [assistant] * len(tokens)

    def document(self) -> Document:
        """What was added so far, up to the assistant's last token."""
        length = 1 + max((i for i, mine in enumerate(self._assistant) if mine), default=-1)
        return Document(
            np.array(self.tokens[:length], np.int32), np.array(self._assistant[:length], bool)
        )
