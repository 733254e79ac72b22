"""Conversations that a target writes by itself, turn by turn ("Magpie", arXiv 2406.08464).

The chat template up to the user's first word makes the model write a user turn; the
template's next piece makes it answer. Plain Python: nothing here runs a model.
"""

import random
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vllm_eagle3.corpus import Document
from vllm_eagle3.data.formats import read_chats

_MARKS = ("⟦user-1⟧", "⟦answer-1⟧", "⟦user-2⟧")


@dataclass(frozen=True)
class Kind:
    """A sort of conversation: who the target is told to be when it writes the user's turn.

    Attributes:
        name: for the statistics.
        system: system prompt; None takes the chat template's own default.
        opening: first words of the user's turn, which the target goes on from.
        weight: relative frequency.
    """

    name: str
    system: str | None = None
    opening: str = ""
    weight: float = 1.0


_CODER = "You are an expert Python programmer."
_TEACHER = "You are a maths teacher who helps pupils with word problems, step by step."
DEFAULT_KINDS = (
    Kind("chat", None, weight=6),
    Kind("knowledge", "You explain science, history and society clearly.", weight=2),
    Kind("writing", "You are a creative writing assistant.", weight=2),
    Kind("writing", None, "Write ", weight=1),
    Kind("reasoning", "You solve puzzles and answer questions by careful reasoning.", weight=1),
    Kind("mathematics", _TEACHER, weight=1),
    Kind("mathematics", _TEACHER, "If ", weight=0.5),
    Kind("code", _CODER, weight=1.5),
    Kind("code", _CODER, "Write a Python function that", weight=2),
    Kind("code", None, "Complete the following Python function.\n\ndef ", weight=2),
    Kind("code", None, "Implement this function.\n\nfrom typing import List\n\n\ndef ", weight=1),
)
GIVEN = Kind("given questions", None)


@dataclass(frozen=True)
class ChatFormat:
    """The token pieces between the turns of a chat template."""

    headers: dict[str | None, list[int]]
    user_to_answer: list[int]
    answer_to_user: list[int]
    end_of_turn: int

    @classmethod
    def from_tokenizer(cls, tokenizer: Any, kinds: Iterable[Kind]) -> "ChatFormat":
        """Cut a rendered chat at the turns.

        Raises:
            ValueError: there is no chat template, or its turns do not end with one token.
        """
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                "the target's tokenizer has no chat template: data synthesis needs one"
            )

        def encode(text: str) -> list[int]:
            return tokenizer(text, add_special_tokens=False).input_ids

        headers = {}
        for system in {kind.system for kind in kinds} | {None}:
            header, first, second = _pieces(tokenizer, system)
            headers[system] = encode(header)
        end_of_turn = encode(first)[0]
        if encode(second)[0] != end_of_turn:
            raise ValueError("the chat template ends a user's and an answer's turn differently")
        # The end of an answer is written by the model itself; what follows is the template's.
        return cls(headers, encode(first), encode(second)[1:], end_of_turn)


def _pieces(tokenizer: Any, system: str | None) -> list[str]:
    user, answer, follow_up = _MARKS
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages += [
        {"role": "user", "content": user},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": follow_up},
    ]
    rest = tokenizer.apply_chat_template(messages, tokenize=False)
    pieces = []
    for mark in _MARKS:
        piece, found, rest = rest.partition(mark)
        if not found:
            raise ValueError("the chat template does not render its messages in order")
        pieces.append(piece)
    return pieces


@dataclass
class Conversation:
    """One conversation in the making: tokens so far, and whose turn is next."""

    kind: Kind
    turns: int
    temperature: float
    tokens: list[int]
    assistant: list[bool]
    user_turn: list[int] = field(default_factory=list)
    writes_answer: bool = False
    turns_done: int = 0

    @classmethod
    def start(cls, form: ChatFormat, kind: Kind, opening: list[int], turns: int, temp: float):
        """The bare header of the user's turn, and its first words."""
        tokens = form.headers[kind.system] + opening
        return cls(kind, turns, temp, tokens, [False] * len(tokens), user_turn=list(opening))

    def take_user_turn(self, form: ChatFormat, tokens: list[int]) -> None:
        """The user's turn is over: the answer is next. ``tokens`` exclude the end of turn."""
        self.user_turn = self.user_turn + tokens
        if self.turns_done == 0:
            # Answered under the template's default system prompt, as most users ask.
            self.tokens = form.headers[None] + self.user_turn
        else:
            self.tokens = self.tokens + tokens
        self.tokens = self.tokens + form.user_to_answer
        self.assistant += [False] * (len(self.tokens) - len(self.assistant))
        del self.assistant[len(self.tokens) :]
        self.writes_answer = True

    def take_answer(self, form: ChatFormat, tokens: list[int]) -> bool:
        """The answer is over; returns whether another user's turn is next."""
        self.tokens = self.tokens + tokens
        self.assistant += [True] * len(tokens)
        self.writes_answer = False
        self.turns_done += 1
        finished = bool(tokens) and tokens[-1] == form.end_of_turn
        if self.turns_done == self.turns or not finished:
            return False
        self.tokens = self.tokens + form.answer_to_user
        self.assistant += [False] * len(form.answer_to_user)
        self.user_turn = []
        return True

    def document(self) -> Document:
        """What was written so far."""
        return Document(np.array(self.tokens, np.int32), np.array(self.assistant, bool))


def given_questions(paths: Iterable[Path]) -> list[str]:
    """The first user turn of every line of JSON-lines files, in any format of conversations.

    Raises:
        ValueError: a line cannot be read.
    """
    paths = list(paths)
    if not paths:
        return []
    chats, unreadable, _ = read_chats(paths)
    if unreadable:
        raise ValueError(unreadable[0])
    return [chat.users[0] for chat in chats]


def whole_sentences(text: str) -> str:
    """The text up to the end of its last whole sentence or line; empty if it has none."""
    ends = [match.end() for match in re.finditer(r"[.?!](?=\s|$)|\S(?=\n)", text)]
    return text[: ends[-1]] if ends else ""


def draw_temperature(rng: random.Random, mix: dict[float, float]) -> float:
    """A temperature with its relative frequency."""
    return rng.choices(list(mix), list(mix.values()))[0]
