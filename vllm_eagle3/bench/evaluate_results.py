"""The figures of ``vllm-eagle3 eval``: by task, by context length, served and predicted."""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vllm_eagle3.bench import target
from vllm_eagle3.bench.configurations import Configuration
from vllm_eagle3.bench.options import recorded
from vllm_eagle3.bench.prediction import Prediction
from vllm_eagle3.bench.questions import Question
from vllm_eagle3.bench.results import Run, TurnKey, account
from vllm_eagle3.bench.rounds import (
    DIFFERENCE_LIMIT,
    PredictedRound,
    Rounds,
    ServedRound,
    context_ranges,
    served_rounds,
)

Task = tuple[str | None, str | None]  # data set and category; None for all of them


def merge(
    args: argparse.Namespace,
    configurations: Sequence[Configuration],
    runs: Sequence[Run],
    prediction: Prediction,
    questions: Sequence[Question],
) -> dict[str, Any]:
    """All figures, as they are written to ``--output``."""
    return {
        "kind": "eval",
        "settings": recorded(args) | {"data": [str(path) for path in args.data]},
        "notes": target.notes(args.target),
        "training": _training(Path(args.head)),
        "difference_limit_percent": DIFFERENCE_LIMIT,
        "prediction_error": prediction.error,
        "configurations": [
            _entry(configuration, run, prediction, questions)
            for configuration, run in zip(configurations, runs, strict=True)
        ],
    }


def tasks(questions: Sequence[Question]) -> list[Task]:
    """Every set, followed by its categories if it has several; all sets together last."""
    found: list[Task] = []
    datasets = list(dict.fromkeys(question.dataset for question in questions))
    for dataset in datasets:
        found.append((dataset, None))
        categories = dict.fromkeys(q.category for q in questions if q.dataset == dataset)
        if len(categories) > 1:
            found += [(dataset, category) for category in categories if category is not None]
    if len(datasets) > 1:
        found.append((None, None))
    return found


def _entry(
    configuration: Configuration,
    run: Run,
    prediction: Prediction,
    questions: Sequence[Question],
) -> dict[str, Any]:
    depth = configuration.as_tree.depth
    answers = _Answers(configuration.name, run, prediction, questions)
    by_task, by_context = [], []
    for temperature in (event["temperature"] for event in run.passes):
        for task in tasks(questions):
            keys = list(answers.of(temperature, task))
            figures = answers.rounds(keys).figures(depth)
            where = {"dataset": task[0], "category": task[1], "temperature": temperature}
            by_task.append(where | {"answers": len(keys)} | figures)
        everything = answers.rounds(list(answers.of(temperature, (None, None))))
        for first, last in context_ranges(everything.served):
            figures = everything.within(first, last).figures(depth)
            where = {"first": first, "last": last, "temperature": temperature}
            by_context.append(where | figures)
    return {
        "name": configuration.name,
        "num_speculative_tokens": configuration.num_speculative_tokens,
        "tree": configuration.tree,
        "shape": configuration.shape,
        "depth": depth,
        **account(run),
        "tasks": by_task,
        "contexts": by_context,
    }


class _Answers:
    """The answers of one configuration, by task."""

    def __init__(
        self, name: str, run: Run, prediction: Prediction, questions: Sequence[Question]
    ) -> None:
        self._name, self._run = name, run
        self._predicted = prediction.rounds
        self._category = {(q.dataset, q.number): q.category for q in questions}

    def of(self, temperature: float, task: Task) -> Iterator[TurnKey]:
        dataset, category = task
        for key in self._run.turns:
            name, at, number, _ = key
            inside = dataset in (None, name) and category in (None, self._category[name, number])
            if inside and at == temperature:
                yield key

    def rounds(self, keys: Sequence[TurnKey]) -> Rounds:
        served: list[ServedRound] = []
        predicted: list[PredictedRound] = []
        for key in keys:
            turn = self._run.turns[key]
            served += served_rounds(len(turn["prompt"]), turn["steps"])
            predicted += self._predicted.get((self._name, key), ())
        return Rounds(served, predicted if self._predicted else None)


def _training(head: Path) -> dict[str, Any]:
    """What ``vllm-eagle3 train`` wrote beside a head; nothing of a head from elsewhere."""
    path = head / "training.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
