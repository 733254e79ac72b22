"""An engine that answers by rule, in place of vLLM's in a replica."""

from collections import deque
from types import SimpleNamespace
from typing import Any

from tests.data.tokenizers import byte_tokenizer

END = 2


class ScriptedEngine:
    """Answers one request a step, in the order of asking, and ends every turn.

    A user's turn is answered by how many there were, "1!"; a bare header of the user's turn
    by the next of ``questions``, until there is none (IndexError). What ``max_tokens`` cuts off
    follows when the request comes again with what it got.
    """

    def __init__(self, crash_after: int | None = None, questions: tuple[str, ...] = ()) -> None:
        self.tokenizer, self.crash_after = byte_tokenizer(), crash_after
        self.questions = deque(questions)
        self.waiting: deque[tuple[str, list[int], Any]] = deque()
        self.rest: dict[tuple[int, ...], list[int]] = {}
        self.prompts: list[str] = []
        self.engine_core = SimpleNamespace(shutdown=lambda: None)

    def add_request(self, request_id: str, prompt: dict, params: Any) -> None:
        self.waiting.append((request_id, prompt["prompt_token_ids"], params))

    def abort_request(self, request_ids: list[str]) -> None:
        self.waiting.clear()

    def step(self) -> list[Any]:
        if len(self.prompts) == self.crash_after:
            raise KeyboardInterrupt
        request_id, prompt, params = self.waiting.popleft()
        tokens = self.rest.pop(tuple(prompt), None) or self._begin(self.tokenizer.decode(prompt))
        piece, rest = tokens[: params.max_tokens], tokens[params.max_tokens :]
        if rest:
            self.rest[*prompt, *piece] = rest
        reason = "length" if rest else "stop"
        completion = SimpleNamespace(token_ids=piece, finish_reason=reason)
        return [SimpleNamespace(finished=True, request_id=request_id, outputs=[completion])]

    def _begin(self, text: str) -> list[int]:
        self.prompts.append(text)
        if text.endswith("assistant\n"):
            answer = f"{text.count('<|im_start|>user')}!"
        else:
            answer = self.questions.popleft()
        return [*self.tokenizer(answer).input_ids, END]
