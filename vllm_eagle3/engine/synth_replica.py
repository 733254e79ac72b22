"""One engine of a synthesis: conversations that the target writes by itself."""

import json
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_eagle3.corpus import read_shard
from vllm_eagle3.data.duplicates import EvaluationSets
from vllm_eagle3.engine.conversation import (
    GIVEN,
    ChatFormat,
    Conversation,
    Kind,
    draw_temperature,
    given_questions,
    whole_sentences,
)
from vllm_eagle3.engine.replica import Replica
from vllm_eagle3.engine.synth_config import SynthConfig
from vllm_eagle3.engine.turn import Completion


class SynthReplica(Replica):
    """One engine of a synthesis; its shards are labelled with kinds of conversations."""

    config: SynthConfig

    def __init__(
        self, target: str, out_dir: Path, config: SynthConfig, index: int, started: float
    ) -> None:
        super().__init__(target, out_dir, config, index, started)
        self.wanted = config.tokens // config.replicas
        self._resume()

    def _resume(self) -> None:
        status = json.loads(self.status_path.read_text()) if self.status_path.is_file() else {}
        shards = list(self.out_dir.glob(f"shard-{self.index:02d}-*.safetensors"))
        documents = [d for path in shards for d in read_shard(path)]
        self.tokens = sum(len(d.tokens) for d in documents)
        self.seen = {d.tokens.tobytes() for d in documents}
        self.kinds = Counter(status.get("documents_by_kind", {}))
        self.dropped = Counter(status.get("dropped", {}))
        self.questions_used = status.get("questions_used", 0)
        # Every part of an interrupted run draws anew.
        self.rng = random.Random(f"{self.config.seed}/{self.index}/{len(shards)}")

    def done(self) -> bool:
        return self.tokens + self.unwritten_tokens >= self.wanted

    def prepare(self, tokenizer: Any) -> None:
        config = self.config
        self.form = ChatFormat.from_tokenizer(tokenizer, config.kinds)
        self.tokenizer = tokenizer
        self.openings = {kind.opening: self._encode(kind.opening) for kind in config.kinds}
        self.evaluation_sets = EvaluationSets.from_files(config.exclude)
        self.questions = given_questions(config.prompts)[self.index :: config.replicas]

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids if text else []

    def start_next(self) -> bool:
        self._go_on(self._new_conversation())
        return True

    def _new_conversation(self) -> Conversation:
        config, rng = self.config, self.rng
        turns = 2 if rng.random() < config.second_turns else 1
        temperature = draw_temperature(rng, config.answer_temperatures)
        while self.questions_used < len(self.questions) and rng.random() < config.prompts_share:
            question = self.questions[self.questions_used]
            self.questions_used += 1
            if self._repeats_evaluation(question):
                continue
            question_ids = self._encode(question)
            if len(question_ids) > config.max_model_len - config.max_answer_tokens - 128:
                self.dropped["question too long"] += 1
                continue
            conversation = Conversation.start(self.form, GIVEN, [], turns, temperature)
            conversation.take_user_turn(self.form, question_ids)
            return conversation
        kind = rng.choices(config.kinds, [k.weight for k in config.kinds])[0]
        opening = self.openings[kind.opening]
        return Conversation.start(self.form, kind, opening, turns, temperature)

    def _repeats_evaluation(self, question: str) -> bool:
        finding = self.evaluation_sets.repeated_by(question)
        if finding:
            self.dropped[finding] += 1
        return finding is not None

    def _go_on(self, conversation: Conversation) -> None:
        config = self.config
        if conversation.writes_answer:
            limit, temperature, top_p = config.max_answer_tokens, conversation.temperature, 1.0
        else:
            # Short questions and long ones.
            limit = self.rng.randint(min(16, config.max_user_tokens), config.max_user_tokens)
            temperature = config.user_temperature
            top_p = config.user_top_p
        self.submit(
            conversation,
            conversation.tokens,
            max_tokens=limit,
            temperature=temperature,
            top_p=top_p,
            end_of_turn=self.form.end_of_turn,
        )

    def advance(self, conversation: Conversation, completion: Completion) -> None:
        tokens = completion.token_ids
        ended = completion.finish_reason == "stop" and tokens[-1] == self.form.end_of_turn
        if conversation.writes_answer:
            goes_on = conversation.take_answer(self.form, tokens)
            room = self.config.max_model_len - self.config.max_answer_tokens
            if goes_on and len(conversation.tokens) + self.config.max_user_tokens < room:
                self._go_on(conversation)
            else:
                self._keep_new(conversation)
            return
        if ended:
            tokens = tokens[:-1]
        else:
            # A small target seldom ends a user's turn by itself.
            tokens = self._encode(whole_sentences(self.tokenizer.decode(tokens)))
        question = conversation.user_turn + tokens
        if len(question) < 3:
            self.dropped["empty user turn"] += 1
        elif not self._repeats_evaluation(self.tokenizer.decode(question)):
            conversation.take_user_turn(self.form, tokens)
            self._go_on(conversation)
            return
        if conversation.turns_done:  # the first turn is whole: keep that
            self._keep_new(conversation)

    def _keep_new(self, conversation: Conversation) -> None:
        document = conversation.document()
        key = document.tokens.tobytes()
        if key in self.seen:
            self.dropped["duplicate"] += 1
            return
        self.seen.add(key)
        self.keep(conversation.kind, document)

    def shard_begins(self, path: Path, labels: Sequence[Kind]) -> None:
        """Nothing goes with a shard: how far this run came, the status says."""

    def shard_written(self, labels: Sequence[Kind]) -> None:
        self.kinds.update(kind.name for kind in labels)

    def status(self) -> dict[str, Any]:
        return {
            "tokens": self.tokens + self.unwritten_tokens,
            "documents_by_kind": dict(self.kinds),
            "dropped": dict(self.dropped),
            "questions_used": self.questions_used,
        }
