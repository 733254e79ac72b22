"""Replays served answers offline, in a process of its own: reads a job, writes events.

``python -m vllm_eagle3.bench.predictor JOB.json EVENT_FD`` drafts along each answer with the
head in PyTorch and scores the drafts with the target in Transformers; it needs no vLLM. One JSON
object a line goes to the file descriptor ``EVENT_FD``; :mod:`vllm_eagle3.bench.prediction` is the
other end.

Job::

    {"target": "...", "head": "...",
     "dtype": "bfloat16",         of both, as the engine had them
     "end_token_ids": [2],        ends of answers beside those that the target's config names
     "answers": [{"prompt": [...], "tokens": [...],
                  "limit": 700,   tokens, the prompt's included, at which the server cuts
                  "wanted": [{"drafts": 31, "tree": {"depth": 5, ...}, "temperature": 0.0}]}]}

Events, by ``"event"``::

    ready    device
    rounds   answer and wanted (their indices), contexts (tokens before each round), tokens (that
             it emits with the answer's text), exceeds (for each round the probabilities that it
             emits more than 1, 2, ... tokens)
    refused  reason: a target or head that PyTorch cannot run here
    done     the last one
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vllm_eagle3.bench.job_process import Emit, job_and_events
from vllm_eagle3.config import TreeConfig
from vllm_eagle3.corpus import Document
from vllm_eagle3.train.attention import avoid_plans
from vllm_eagle3.train.export import load_head
from vllm_eagle3.train.features import Target, load_target, read_target_config
from vllm_eagle3.train.model import DraftHead
from vllm_eagle3.train.rounds import Replay, batches_to_replay

_DIGITS = 6


@torch.no_grad()
def run(job: dict[str, Any], emit: Emit) -> None:
    """Replay all answers of a job."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target, head = _load(job, device)
    except (ValueError, OSError) as error:  # Transformers' own for what it cannot find
        emit({"event": "refused", "reason": str(error)})
        return
    emit({"event": "ready", "device": device.type})
    for numbers in _batches(job["answers"]):
        answers = [job["answers"][number] for number in numbers]
        for index, event in _replay(target, head, answers):
            emit({"event": "rounds", "answer": int(numbers[index]), **event})
    emit({"event": "done"})


def check(target: str, head: str) -> None:
    """Check that PyTorch can run both, without the target's weights.

    Raises:
        ValueError: the target is no Llama, or the head has parts that cannot be run here.
    """
    config = read_target_config(target)
    matrix = torch.empty(config.vocab_size, config.hidden_size, device="meta")
    load_head(Path(head), matrix, matrix, config.num_hidden_layers)


def _load(job: dict[str, Any], device: torch.device) -> tuple[Target, DraftHead]:
    avoid_plans()
    dtype = getattr(torch, job["dtype"])
    model = load_target(job["target"], dtype).to(device)
    matrices = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    head = load_head(Path(job["head"]), *matrices, model.config.num_hidden_layers)
    target = Target(model, head.config.aux_layer_ids)
    # A server ends answers at the tokenizer's end token, too.
    ends = {*target.end_token_ids, *job["end_token_ids"]}
    model.generation_config.eos_token_id = sorted(ends)
    return target, head.to(device, dtype).eval()


def _batches(answers: list[dict[str, Any]]) -> Iterator[list[int]]:
    """Numbers of answers that are replayed at once: those that want the same, of similar length."""
    alike: dict[str, list[int]] = {}
    for number, answer in enumerate(answers):
        alike.setdefault(json.dumps(answer["wanted"]), []).append(number)
    for numbers in alike.values():
        for batch in batches_to_replay([_document(answers[number]) for number in numbers]):
            yield [numbers[index] for index in batch]


def _document(answer: dict[str, Any]) -> Document:
    tokens = np.array(answer["prompt"] + answer["tokens"])
    return Document(tokens, np.arange(len(tokens)) >= len(answer["prompt"]))


def _replay(
    target: Target, head: DraftHead, answers: list[dict[str, Any]]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rounds of answers that want the same chains or trees: which answer, and an event."""
    replay = Replay(target, head, [_document(answer) for answer in answers])
    limits = [answer["limit"] for answer in answers]
    for number, wanted in enumerate(answers[0]["wanted"]):
        config = TreeConfig.from_dict(wanted["tree"], wanted["drafts"])
        temperature = wanted["temperature"]
        for index, rounds in enumerate(replay.rounds(config, [temperature], limits)):
            if rounds is None:
                continue
            exceeds = rounds.exceeds_TRD[temperature].tolist()
            yield (
                index,
                {
                    "wanted": number,
                    "contexts": (rounds.roots_R + 1).tolist(),
                    "tokens": rounds.emitted_R.tolist(),
                    "exceeds": [[round(share, _DIGITS) for share in row] for row in exceeds],
                },
            )


def main() -> None:
    with job_and_events() as (job, emit):
        run(job, emit)


if __name__ == "__main__":
    main()
