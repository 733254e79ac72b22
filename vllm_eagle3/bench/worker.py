"""One engine in a process of its own: reads a job, writes events.

``python -m vllm_eagle3.bench.worker JOB.json EVENT_FD`` builds one ``LLM``, answers the job's
conversations and writes one JSON object a line to the file descriptor ``EVENT_FD``; vLLM's
own output keeps stdout and stderr. :mod:`vllm_eagle3.bench.jobs` is the other end.

Job::

    {"engine": {...},            keyword arguments of LLM; "dtype": null picks one
     "stream": false,            also write "step" events, with the text of each token
     "passes": [{"temperature": 0.0, "max_tokens": 512, "runner_up": false,
                 "conversations": [{"dataset": "gsm8k", "number": 0,
                                    "turns": ["..."], "seeds": [1]}]}]}

Events, by ``"event"``::

    ready    versions and device, before the first pass
    step     stream only: dataset, number, turn, texts (of each token), finished
    turn     dataset, number, turn, temperature, prompt (its tokens), tokens, steps (tokens of
             each engine step), finish_reason (vLLM's), runner_up ([token, log-probability gap]
             for each token) where asked for and where a GPU makes it cheap
    skipped  a turn whose prompt leaves no room below max_model_len
    pass     temperature, seconds, and vLLM's own counters of the pass
    done     the last one
"""

import time
from typing import TYPE_CHECKING, Any

from vllm_eagle3.bench.job_process import Emit, job_and_events
from vllm_eagle3.bench.llm import build_engine, describe, read_counters
from vllm_eagle3.bench.questions import chat_prompt
from vllm_eagle3.engine.interpreter import is_prepared

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput


def run(job: dict[str, Any], emit: Emit) -> None:
    """Answer the job's conversations, reporting through ``emit``."""
    llm = build_engine(job["engine"])
    emit({"event": "ready", **describe(llm)})
    for number, settings in enumerate(job["passes"]):
        if number:
            # Or the second pass would find its whole prompts in the cache.
            llm.reset_prefix_cache()
        _Pass(llm, settings, job.get("stream", False), emit).run()
    emit({"event": "done"})


class _Turn:
    """A conversation's turn that is being answered."""

    def __init__(self, conversation: dict[str, Any], answers: list[str]) -> None:
        self.conversation = conversation
        self.prompt: list[int] = []
        self.answers = answers
        self.number = len(answers)
        self.tokens: list[int] = []
        self.steps: list[int] = []
        self.runner_up: list[list[float]] = []
        self.text = ""

    def ids(self) -> dict[str, Any]:
        return {
            "dataset": self.conversation["dataset"],
            "number": self.conversation["number"],
            "turn": self.number,
        }


class _Pass:
    """All conversations at one temperature, answered in continuous batches."""

    def __init__(self, llm: "LLM", settings: dict[str, Any], stream: bool, emit: Emit) -> None:
        self.llm = llm
        self.engine = llm.llm_engine
        self.tokenizer = llm.get_tokenizer()
        self.settings = settings
        self.stream = stream
        self.emit = emit
        # The interpreter needs most of a second for each token's log-probabilities.
        self.runner_up = bool(settings.get("runner_up")) and not is_prepared()
        self.turns: dict[str, _Turn] = {}

    def run(self) -> None:
        before = read_counters(self.llm)
        start = time.monotonic()
        for conversation in self.settings["conversations"]:
            self._ask(_Turn(conversation, []))
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                self._receive(output)
        counters = {name: value - before[name] for name, value in read_counters(self.llm).items()}
        self.emit(
            {
                "event": "pass",
                "temperature": self.settings["temperature"],
                "seconds": round(time.monotonic() - start, 3),
                "counters": counters,
            }
        )

    def _ask(self, turn: _Turn) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        turn.prompt = chat_prompt(self.tokenizer, turn.conversation["turns"], turn.answers)
        if len(turn.prompt) >= self.engine.vllm_config.model_config.max_model_len:
            self.emit({"event": "skipped", **turn.ids(), "prompt_tokens": len(turn.prompt)})
            return
        request_id = f"{turn.conversation['dataset']}-{turn.conversation['number']}-{turn.number}"
        self.turns[request_id] = turn
        sampling = SamplingParams(
            temperature=self.settings["temperature"],
            max_tokens=self.settings["max_tokens"],
            seed=turn.conversation["seeds"][turn.number],
            logprobs=2 if self.runner_up else None,
            # One output for each engine step: the step's own tokens.
            output_kind=RequestOutputKind.DELTA,
        )
        self.engine.add_request(request_id, {"prompt_token_ids": turn.prompt}, sampling)

    def _receive(self, output: "RequestOutput") -> None:
        turn = self.turns[output.request_id]
        completion = output.outputs[0]
        if completion.token_ids:
            turn.steps.append(len(completion.token_ids))
            turn.tokens.extend(completion.token_ids)
            turn.text += completion.text
            for token, logprobs in zip(
                completion.token_ids, completion.logprobs or (), strict=False
            ):
                turn.runner_up.append(_runner_up(token, logprobs))
            if self.stream:
                self._emit_step(turn, len(completion.token_ids), output.finished)
        if output.finished:
            del self.turns[output.request_id]
            self._finish(turn, completion.finish_reason)

    def _emit_step(self, turn: _Turn, count: int, finished: bool) -> None:
        texts = token_texts(self.tokenizer, turn.tokens, count)
        self.emit({"event": "step", **turn.ids(), "texts": texts, "finished": finished})

    def _finish(self, turn: _Turn, finish_reason: str | None) -> None:
        event = {
            "event": "turn",
            **turn.ids(),
            "temperature": self.settings["temperature"],
            "prompt": turn.prompt,
            "tokens": turn.tokens,
            "steps": turn.steps,
            "finish_reason": finish_reason,
        }
        if turn.runner_up:
            event["runner_up"] = turn.runner_up
        self.emit(event)
        if turn.number + 1 < len(turn.conversation["turns"]):
            self._ask(_Turn(turn.conversation, [*turn.answers, turn.text]))


def _runner_up(token: int, logprobs: dict[int, Any]) -> list[float]:
    """The best other token, and how much less likely it was (difference of logits)."""
    other = max((t for t in logprobs if t != token), key=lambda t: logprobs[t].logprob)
    return [other, round(logprobs[token].logprob - logprobs[other].logprob, 6)]


def token_texts(tokenizer: Any, tokens: list[int], count: int) -> list[str]:
    """The text that each of the last ``count`` tokens adds.

    Bytes that do not yet make a character add nothing; the token that completes it adds it.
    """
    texts = []
    shown = _decode(tokenizer, tokens[: len(tokens) - count])
    for end in range(len(tokens) - count + 1, len(tokens) + 1):
        text = _decode(tokenizer, tokens[:end])
        texts.append(text[len(shown) :])
        shown = text
    return texts


def _decode(tokenizer: Any, tokens: list[int]) -> str:
    return tokenizer.decode(tokens, skip_special_tokens=True).rstrip("�")


def main() -> None:
    with job_and_events() as (job, emit):
        run(job, emit)


if __name__ == "__main__":
    main()
