"""One engine that answers the prompts of given conversations."""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_eagle3.data.formats import Chat
from vllm_eagle3.data.masks import ChatTemplate, DocumentBuilder
from vllm_eagle3.engine.answered import Answer, write_answers
from vllm_eagle3.engine.conversation import draw_temperature
from vllm_eagle3.engine.replica import Replica
from vllm_eagle3.engine.replica_config import ReplicaConfig
from vllm_eagle3.engine.turn import Completion

_LEAST_ROOM = 64  # tokens that an answer must have room for

TOO_LONG = "no room for an answer within max_model_len"


@dataclass(frozen=True, kw_only=True)
class RegenerateConfig(ReplicaConfig):
    """How to answer given prompts.

    Attributes:
        max_turns: user turns of a conversation that are answered, at most.
        top_p: of answers.
        template: further variables of the chat template, such as ``enable_thinking``.
    """

    max_model_len: int = 4096
    max_answer_tokens: int = 1024
    max_turns: int = 8
    top_p: float = 1.0
    template: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("max_turns")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be above 0 and at most 1")


@dataclass
class Dialogue:
    """A conversation in the making."""

    prompt: int
    chat: Chat
    temperature: float
    builder: DocumentBuilder
    turns_done: int = 0


class RegenerateReplica(Replica):
    """Answers ``chats``, each with its number; every answer sees the answers before it."""

    config: RegenerateConfig

    def __init__(
        self,
        target: str,
        out_dir: Path,
        config: RegenerateConfig,
        chats: Sequence[tuple[int, Chat]],
        index: int,
        started: float,
    ) -> None:
        super().__init__(target, out_dir, config, index, started)
        self._waiting = list(reversed(chats))
        self._in_flight = self._conversations = 0
        self._skipped: dict[int, str] = {}

    def done(self) -> bool:
        return not self._waiting and not self._in_flight

    def prepare(self, tokenizer: Any) -> None:
        config = self.config
        turns = max(min(len(chat.users), config.max_turns) for _, chat in self._waiting)
        self.template = ChatTemplate(tokenizer, turns=turns, **config.template)

    def start_next(self) -> bool:
        while self._waiting:
            prompt, chat = self._waiting.pop()
            try:
                tokens = self.template.prompt(chat)
            except ValueError as error:
                self._skip(prompt, str(error))
                continue
            if not self._has_room(tokens):
                self._skip(prompt, TOO_LONG)
                continue
            # The same for a prompt in every run, whichever replica answers it.
            rng = random.Random(f"{self.config.seed}/{prompt}")
            temperature = draw_temperature(rng, self.config.answer_temperatures)
            self._in_flight += 1
            self._ask(Dialogue(prompt, chat, temperature, DocumentBuilder(tokens)))
            return True
        return False

    def _skip(self, prompt: int, reason: str) -> None:
        self._skipped[prompt] = reason
        self._conversations += 1

    def _has_room(self, tokens: Sequence[int]) -> bool:
        room = self.config.max_model_len - len(tokens)
        return room >= min(_LEAST_ROOM, self.config.max_answer_tokens)

    def _ask(self, dialogue: Dialogue) -> None:
        self.submit(
            dialogue,
            dialogue.builder.tokens,
            max_tokens=self.config.max_answer_tokens,
            temperature=dialogue.temperature,
            top_p=self.config.top_p,
            end_of_turn=self.template.end_of_turn,
        )

    def advance(self, dialogue: Dialogue, completion: Completion) -> None:
        tokens = completion.token_ids
        dialogue.builder.add(tokens, assistant=True)
        dialogue.turns_done += 1
        end = self._next_turn(dialogue, tokens, completion.finish_reason)
        if end is None:
            self._ask(dialogue)
            return
        self._in_flight -= 1
        self._conversations += 1
        answer = Answer(dialogue.prompt, dialogue.turns_done, end)
        self.keep(answer, dialogue.builder.document())

    def _next_turn(self, dialogue: Dialogue, tokens: list[int], reason: str) -> str | None:
        """Put the next question behind the answer; why there is none, otherwise."""
        if reason != "stop":
            return {"length": "answer cut at its longest"}.get(reason, f"answer cut: {reason}")
        if dialogue.turns_done == min(len(dialogue.chat.users), self.config.max_turns):
            return "whole"
        if tokens[-1] != self.template.end_of_turn:
            return "ended by another token than a turn's end"
        try:
            follow_up = self.template.follow_up(dialogue.chat, dialogue.turns_done)
        except ValueError:
            return "the chat template rewrites this conversation"
        if not self._has_room(dialogue.builder.tokens + follow_up):
            return "later turns too long"
        dialogue.builder.add(follow_up, assistant=False)
        return None

    def shard_begins(self, path: Path, labels: Sequence[Answer]) -> None:
        write_answers(path, labels)

    def shard_written(self, labels: Sequence[Answer]) -> None:
        """The file beside the shard says it all."""

    def status(self) -> dict[str, Any]:
        return {
            "tokens": self.tokens + self.unwritten_tokens,
            "conversations": self._conversations,
            "skipped": Counter(self._skipped.values()),
            "skipped_prompts": dict(self._skipped),
        }
