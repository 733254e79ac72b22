"""One engine of a synthesis, kept full of conversations."""

import json
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

from vllm_eagle3.corpus import read_shard, write_json, write_shard
from vllm_eagle3.engine.conversation import (
    GIVEN,
    ChatFormat,
    Conversation,
    Kind,
    draw_temperature,
    normalised,
    read_questions,
    whole_sentences,
)
from vllm_eagle3.engine.synth_config import SynthConfig

_DEVICE_SHARE = 0.85  # of the memory, for all replicas together


# Small targets fall into loops, which teach a head nothing after the second round. A loop of
# fewer tokens is found as one of a multiple of its length.
_LOOP = {"min_pattern_size": 8, "max_pattern_size": 48, "min_count": 3}


class Replica:
    """One engine, kept full of conversations."""

    def __init__(
        self, target: str, out_dir: Path, config: SynthConfig, index: int, started: float
    ) -> None:
        self.target, self.out_dir, self.config, self.index = target, out_dir, config, index
        self.deadline = None if config.minutes is None else started + 60 * config.minutes
        self.wanted = config.tokens // config.replicas
        self.status_path = out_dir / f"replica-{index:02d}.json"
        self._resume()

    def _resume(self) -> None:
        status = json.loads(self.status_path.read_text()) if self.status_path.is_file() else {}
        self.shards = list(self.out_dir.glob(f"shard-{self.index:02d}-*.safetensors"))
        documents = [d for path in self.shards for d in read_shard(path)]
        self.tokens = sum(len(d.tokens) for d in documents)
        self.seen = {d.tokens.tobytes() for d in documents}
        self.kinds = Counter(status.get("documents_by_kind", {}))
        self.dropped = Counter(status.get("dropped", {}))
        self.questions_used = status.get("questions_used", 0)
        self.num_shards = len(self.shards)
        self.finished: list[tuple[Kind, Any]] = []
        self.shard_tokens = 0
        # Every part of an interrupted run draws anew.
        self.rng = random.Random(f"{self.config.seed}/{self.index}/{self.num_shards}")

    def run(self) -> None:
        if self.tokens >= self.wanted:
            return
        self._start_engine()
        try:
            self._converse()
        finally:
            # A spawned process waits for its own children before it collects the engine.
            self.engine.engine_core.shutdown()

    def _converse(self) -> None:
        self.running: dict[str, Conversation] = {}
        self.next_id = 0
        reported = time.time()
        while not self._over():
            while len(self.running) < self.config.max_num_seqs:
                self._submit(self._new_conversation())
            for output in self.engine.step():
                if output.finished:
                    self._advance(self.running.pop(output.request_id), output.outputs[0])
            if time.time() - reported > 1:
                self._report()
                reported = time.time()
        self.engine.abort_request(list(self.running))
        self._write_shard()

    def _start_engine(self) -> None:
        from transformers import AutoTokenizer
        from vllm import LLM

        config = self.config
        tokenizer = AutoTokenizer.from_pretrained(self.target)
        self.form = ChatFormat.from_tokenizer(tokenizer, config.kinds)
        self.tokenizer = tokenizer
        self.openings = {kind.opening: self._encode(kind.opening) for kind in config.kinds}
        self.excluded = {normalised(q) for path in config.exclude for q in read_questions(path)}
        questions = [q for path in config.prompts for q in read_questions(path)]
        self.questions = questions[self.index :: config.replicas]
        arguments = {
            "max_num_seqs": config.max_num_seqs,
            "max_model_len": config.max_model_len,
            "enable_prefix_caching": True,
            "seed": self.rng.randrange(2**31),
            "disable_log_stats": True,
        }
        if config.replicas > 1:
            # Profiling cannot tell the replicas' memory apart; a fixed share can.
            arguments["gpu_memory_utilization"] = _DEVICE_SHARE / config.replicas
            arguments["kv_cache_memory_bytes"] = _kv_cache_bytes(config.replicas)
        # The engine's own loop, not LLM.generate: a finished turn makes room for the next at
        # once, and the time limit needs no full batch to end.
        self.llm = LLM(self.target, **(arguments | config.engine_args))
        self.engine = self.llm.llm_engine

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids if text else []

    def _over(self) -> bool:
        late = self.deadline is not None and time.time() > self.deadline
        return late or self.tokens + self.shard_tokens >= self.wanted

    def _new_conversation(self) -> Conversation:
        config, rng = self.config, self.rng
        turns = 2 if rng.random() < config.second_turns else 1
        temperature = draw_temperature(rng, config.answer_temperatures)
        while self.questions_used < len(self.questions) and rng.random() < config.prompts_share:
            question = self.questions[self.questions_used]
            self.questions_used += 1
            if normalised(question) in self.excluded:
                self.dropped["equal to an excluded prompt"] += 1
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

    def _submit(self, conversation: Conversation) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RepetitionDetectionParams, RequestOutputKind

        config = self.config
        if conversation.writes_answer:
            limit, temperature, top_p = config.max_answer_tokens, conversation.temperature, 1.0
        else:
            # Short questions and long ones.
            limit = self.rng.randint(min(16, config.max_user_tokens), config.max_user_tokens)
            temperature = config.user_temperature
            top_p = config.user_top_p
        params = SamplingParams(
            max_tokens=min(limit, config.max_model_len - len(conversation.tokens)),
            temperature=temperature,
            top_p=top_p,
            stop_token_ids=[self.form.end_of_turn],
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            repetition_detection=RepetitionDetectionParams(**_LOOP),
        )
        request_id = f"{self.index}-{self.next_id}"
        self.next_id += 1
        self.running[request_id] = conversation
        self.engine.add_request(request_id, {"prompt_token_ids": conversation.tokens}, params)

    def _advance(self, conversation: Conversation, completion: Any) -> None:
        tokens = list(completion.token_ids)
        ended = completion.finish_reason == "stop" and tokens[-1] == self.form.end_of_turn
        if conversation.writes_answer:
            goes_on = conversation.take_answer(self.form, tokens)
            room = self.config.max_model_len - self.config.max_answer_tokens
            if goes_on and len(conversation.tokens) + self.config.max_user_tokens < room:
                self._submit(conversation)
            else:
                self._keep(conversation)
            return
        if ended:
            tokens = tokens[:-1]
        else:
            # A small target seldom ends a user's turn by itself.
            tokens = self._encode(whole_sentences(self.tokenizer.decode(tokens)))
        if len(tokens) + len(conversation.user_turn) < 3:
            self.dropped["empty user turn"] += 1
        elif normalised(self.tokenizer.decode(conversation.user_turn + tokens)) in self.excluded:
            self.dropped["equal to an excluded prompt"] += 1
        else:
            conversation.take_user_turn(self.form, tokens)
            self._submit(conversation)
            return
        if conversation.turns_done:  # the first turn is whole: keep that
            self._keep(conversation)

    def _keep(self, conversation: Conversation) -> None:
        document = conversation.document()
        key = document.tokens.tobytes()
        if key in self.seen:
            self.dropped["duplicate"] += 1
            return
        self.seen.add(key)
        self.finished.append((conversation.kind, document))
        self.shard_tokens += len(document.tokens)
        if len(self.finished) >= self.config.shard_documents:
            self._write_shard()

    def _write_shard(self) -> None:
        if self.finished:
            path = self.out_dir / f"shard-{self.index:02d}-{self.num_shards:05d}.safetensors"
            write_shard(path, [document for _, document in self.finished])
            self.num_shards += 1
            self.kinds.update(kind.name for kind, _ in self.finished)
            self.tokens += self.shard_tokens
            self.finished, self.shard_tokens = [], 0
        self._report()

    def _report(self) -> None:
        write_json(
            self.status_path,
            {
                "tokens": self.tokens + self.shard_tokens,
                "documents_by_kind": dict(self.kinds),
                "dropped": dict(self.dropped),
                "questions_used": self.questions_used,
            },
        )


def _kv_cache_bytes(replicas: int) -> int:
    """A replica's share of the device, less weights, activations, graphs and context."""
    import torch

    if not torch.cuda.is_available():
        return 1 << 30
    share = torch.cuda.get_device_properties(0).total_memory * _DEVICE_SHARE / replicas
    return max(1 << 30, int(share) - (5 << 30))
