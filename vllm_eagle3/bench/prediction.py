"""Predicted rounds of served answers, by a process that has torch and Transformers."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_eagle3.bench.answering import Progress
from vllm_eagle3.bench.configurations import Configuration
from vllm_eagle3.bench.jobs import WorkerProcess, worker_error
from vllm_eagle3.bench.results import Run, TurnKey
from vllm_eagle3.bench.rounds import PredictedRound

_MODULE = "vllm_eagle3.bench.predictor"


@dataclass
class Prediction:
    """Predicted rounds, by configuration and turn.

    Attributes:
        error: why there are none.
    """

    rounds: dict[tuple[str, TurnKey], list[PredictedRound]] = field(default_factory=dict)
    error: str | None = None


def predict(
    args: argparse.Namespace,
    configurations: Sequence[Configuration],
    runs: Sequence[Run],
    log_path: Path,
) -> Prediction:
    """Replay every answer of every run with the run's own chain or tree.

    Args:
        args: ``target``, ``head``, ``max_tokens`` and ``max_model_len`` of the runs;
            ``prediction_timeout``, seconds for all answers, None for no limit.
        log_path: receives what the process prints.
    """
    job, keys = _job(args, configurations, runs)
    found = Prediction({key: [] for answer in keys for key in answer})
    if not job["answers"]:
        return Prediction(error="there are no answers")
    progress = Progress(sum(map(len, keys)))
    finished = 0
    progress.show("prediction", "loading")
    with WorkerProcess(job, log_path, args.prediction_timeout, module=_MODULE) as process:
        for event in process.events():
            if event["event"] == "rounds":
                columns = event["contexts"], event["tokens"], event["exceeds"]
                rounds = [PredictedRound(*row) for row in zip(*columns, strict=True)]
                found.rounds[keys[event["answer"]][event["wanted"]]] = rounds
                finished += 1
                progress.advance("prediction", finished)
            elif event["event"] == "refused":
                return Prediction(error=event["reason"])
            elif event["event"] == "done":
                progress.show("prediction", "finished")
                return found
        failure = process.wait()
    return Prediction(error=str(worker_error(failure, log_path)))


def _job(
    args: argparse.Namespace, configurations: Sequence[Configuration], runs: Sequence[Run]
) -> tuple[dict[str, Any], list[list[tuple[str, TurnKey]]]]:
    """The predictor's job and, for each of its answers, what the wanted trees belong to.

    Configurations that gave the same answer share one reading of it.
    """
    answers: dict[tuple[tuple[int, ...], int], dict[str, Any]] = {}
    keys: dict[tuple[tuple[int, ...], int], list[tuple[str, TurnKey]]] = {}
    ends = set()
    for configuration, run in zip(configurations, runs, strict=True):
        for turn_key, turn in run.turns.items():
            prompt, tokens = turn["prompt"], turn["tokens"]
            if turn["finish_reason"] == "stop":
                limit = min(len(prompt) + args.max_tokens, args.max_model_len)
                ends.add(tokens[-1])
            else:
                limit = len(prompt) + len(tokens)
            same = (*prompt, *tokens), len(prompt)
            answer = answers.setdefault(
                same, {"prompt": prompt, "tokens": tokens, "limit": limit, "wanted": []}
            )
            tree = configuration.as_tree
            wanted = {"drafts": tree.num_speculative_tokens, "tree": tree.to_dict()}
            answer["wanted"].append(wanted | {"temperature": turn["temperature"]})
            keys.setdefault(same, []).append((configuration.name, turn_key))
    ready = next((run.ready for run in runs if run.ready), {"dtype": "float32"})
    job = {
        "target": args.target,
        "head": args.head,
        "dtype": ready["dtype"],
        "end_token_ids": sorted(ends),
        "answers": list(answers.values()),
    }
    return job, list(keys.values())
