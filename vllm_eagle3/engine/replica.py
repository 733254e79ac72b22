"""One engine that is kept full of conversations, whatever they are for."""

import random
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vllm_eagle3.corpus import Document, write_json
from vllm_eagle3.engine.replica_config import ReplicaConfig
from vllm_eagle3.engine.shard_writer import REMEDY, add_shard, next_shard_path
from vllm_eagle3.engine.turn import Completion, Turn

_DEVICE_SHARE = 0.85  # of a GPU's memory, for all replicas on it
_MACHINE_SHARE = 0.5  # of the machine's, without a GPU: vLLM refuses a share that is not free


class Replica(ABC):
    """One engine; finished conversations go to shards of its own.

    Attributes:
        finished: documents that no shard holds yet, each with a label for the statistics.
        tokens: of what this replica has written into shards.
        sharing: replicas on this one's GPU, itself included.
    """

    sharing = 1

    def __init__(
        self, target: str, out_dir: Path, config: ReplicaConfig, index: int, started: float
    ) -> None:
        self.target, self.out_dir, self.config, self.index = target, out_dir, config, index
        self.deadline = None if config.minutes is None else started + 60 * config.minutes
        self.status_path = out_dir / f"replica-{index:02d}.json"
        self.finished: list[tuple[Any, Document]] = []
        self.tokens = self.unwritten_tokens = 0
        self._shard: Path | None = None  # that is being written
        self.rng = random.Random(f"{config.seed}/{index}")
        self.on_report: Callable[[], None] = lambda: None

    @abstractmethod
    def done(self) -> bool:
        """Whether nothing more is wanted, not even what is in flight."""

    @abstractmethod
    def prepare(self, tokenizer: Any) -> None:
        """Called once before the engine starts; what the user can mend is raised here."""

    @abstractmethod
    def start_next(self) -> bool:
        """Submit one more conversation; False when there is none."""

    @abstractmethod
    def advance(self, conversation: Any, completion: Completion) -> None:
        """Take what the engine wrote: submit the next turn, or keep the document."""

    @abstractmethod
    def status(self) -> dict[str, Any]:
        """What the progress bar and the metadata read."""

    @abstractmethod
    def shard_begins(self, path: Path, labels: Sequence[Any]) -> None:
        """Called before a shard of documents with ``labels`` appears under ``path``."""

    @abstractmethod
    def shard_written(self, labels: Sequence[Any]) -> None:
        """Called when it is there."""

    def run(self) -> None:
        """Converse until nothing is wanted; an interruption keeps what is finished."""
        from transformers import AutoTokenizer

        if self.done():
            return
        self.prepare(AutoTokenizer.from_pretrained(self.target))
        self._start_engine()
        try:
            self._converse()
        finally:
            try:
                self.write_shard()
            finally:
                # A spawned process waits for its own children before it collects the engine.
                self.engine.engine_core.shutdown()

    def _converse(self) -> None:
        self.running: dict[str, Turn] = {}
        self.next_id = 0
        reported = time.time()
        while not (self._late() or self.done()):
            while len(self.running) < self.config.max_num_seqs and self.start_next():
                pass
            if not self.running:
                return
            for output in self.engine.step():
                if output.finished:
                    self._take(self.running.pop(output.request_id), output.outputs[0])
            if time.time() - reported > 1:
                self.report()
                reported = time.time()
        self.engine.abort_request(list(self.running))

    def _late(self) -> bool:
        return self.deadline is not None and time.time() > self.deadline

    def _start_engine(self) -> None:
        import torch
        from vllm import LLM

        config = self.config
        arguments = {
            "max_num_seqs": config.max_num_seqs,
            "max_model_len": config.max_model_len,
            "enable_prefix_caching": True,
            "seed": self.rng.randrange(2**31),
            "disable_log_stats": True,
        }
        if self.sharing > 1:
            # Profiling cannot tell the replicas' memory apart; a fixed share can.
            arguments["gpu_memory_utilization"] = _DEVICE_SHARE / self.sharing
            arguments["kv_cache_memory_bytes"] = _kv_cache_bytes(self.sharing)
        if not torch.cuda.is_available():
            arguments["gpu_memory_utilization"] = _MACHINE_SHARE / self.sharing
        # The engine's own loop, not LLM.generate: a finished turn makes room for the next at
        # once, and the time limit needs no full batch to end.
        self.llm = LLM(self.target, **(arguments | config.engine_args))
        self.engine = self.llm.llm_engine

    def submit(
        self,
        conversation: Any,
        tokens: Sequence[int],
        *,
        max_tokens: int,
        temperature: float,
        top_p: float,
        end_of_turn: int | None,
    ) -> None:
        """Let the target go on from ``tokens``, up to the model's length or a loop."""
        sampling = {
            "temperature": temperature,
            "top_p": top_p,
            "stop_token_ids": [] if end_of_turn is None else [end_of_turn],
        }
        limit = min(max_tokens, self.config.max_model_len - len(tokens))
        self._write_piece(Turn(conversation, list(tokens), limit, sampling))

    def _write_piece(self, turn: Turn) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            max_tokens=turn.next_tokens,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            **turn.sampling,
        )
        request_id = f"{self.index}-{self.next_id}"
        self.next_id += 1
        self.running[request_id] = turn
        self.engine.add_request(request_id, {"prompt_token_ids": turn.next_prompt}, params)

    def _take(self, turn: Turn, piece: Any) -> None:
        completion = turn.take(piece.token_ids, piece.finish_reason)
        if completion is None:
            self._write_piece(turn)
        else:
            self.advance(turn.conversation, completion)

    def keep(self, label: Any, document: Document) -> None:
        """A conversation is finished."""
        self.finished.append((label, document))
        self.unwritten_tokens += len(document.tokens)
        if len(self.finished) >= self.config.shard_documents:
            self.write_shard()

    def write_shard(self) -> None:
        """Write what is finished, and the status; after an interruption, the same shard again."""
        if self.finished:
            if self._shard is None:
                self._shard = next_shard_path(self.out_dir, self.index)
            labels = [label for label, _ in self.finished]
            self.shard_begins(self._shard, labels)
            add_shard(self._shard, [document for _, document in self.finished])
            self.finished, self._shard = [], None
            self.tokens, self.unwritten_tokens = self.tokens + self.unwritten_tokens, 0
            self.shard_written(labels)
        self.report()

    def report(self) -> None:
        """Write the status where the progress bar finds it."""
        write_json(self.status_path, self.status(), REMEDY)
        self.on_report()


def _kv_cache_bytes(replicas: int) -> int:
    """A replica's share of its GPU, less weights, activations, graphs and context."""
    import torch

    if not torch.cuda.is_available():
        return 1 << 30
    share = torch.cuda.get_device_properties(0).total_memory * _DEVICE_SHARE / replicas
    return max(1 << 30, int(share) - (5 << 30))
