"""Figures of a configuration, out of the events of its worker."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from vllm_eagle3.bench.tau import Tally, first_divergence, vllm_tau

Cell = tuple[str, float]  # data set, temperature
TurnKey = tuple[str, float, int, int]  # data set, temperature, question, turn


@dataclass
class Run:
    """What one configuration produced, or why it produced less.

    Attributes:
        turns: the worker's ``turn`` event of each answered turn.
        skipped: the ``skipped`` events.
        passes: the ``pass`` events.
        ready: the ``ready`` event, once the engine stood.
        error: why the run is not complete.
    """

    turns: dict[TurnKey, dict[str, Any]] = field(default_factory=dict)
    skipped: list[dict[str, Any]] = field(default_factory=list)
    passes: list[dict[str, Any]] = field(default_factory=list)
    ready: dict[str, Any] | None = None
    error: str | None = None

    def receive(self, event: dict[str, Any]) -> None:
        """Take in one event of the worker."""
        kind = event["event"]
        if kind == "turn":
            key = (event["dataset"], event["temperature"], event["number"], event["turn"])
            self.turns[key] = event
        elif kind == "skipped":
            self.skipped.append(event)
        elif kind == "pass":
            self.passes.append(event)
        elif kind == "ready":
            self.ready = event


def summarize(run: Run, reference: Run | None, cells: Iterable[Cell]) -> dict[str, Any]:
    """The figures of one run: tau of each cell, identity with ``reference``, vLLM's counters.

    A cell of which the run failed to answer every turn (its pass did not end) is left out.
    """
    finished = {event["temperature"] for event in run.passes}
    return {
        **account(run),
        "cells": [
            _cell(run, reference, dataset, temperature)
            for dataset, temperature in cells
            if temperature in finished
        ],
    }


def account(run: Run) -> dict[str, Any]:
    """What a run tells beside its answers: its error, its engine, skipped turns, counters."""
    return {
        "error": run.error,
        "engine": _without_kind(run.ready) if run.ready else None,
        "skipped": [_without_kind(event) for event in run.skipped],
        "passes": [_pass(run, event) for event in run.passes],
    }


def _cell(run: Run, reference: Run | None, dataset: str, temperature: float) -> dict[str, Any]:
    turns = {key: turn for key, turn in run.turns.items() if key[:2] == (dataset, temperature)}
    tally = Tally()
    for turn in turns.values():
        tally.add(turn["steps"])
    cell = {
        "dataset": dataset,
        "temperature": temperature,
        "turns": tally.turns,
        "output_tokens": tally.output_tokens,
        "forwards": tally.forwards,
        "tau": tally.tau,
        "tokens_per_forward": dict(sorted(tally.tokens_per_forward.items())),
    }
    if reference is not None and reference is not run:
        cell["identity"] = compare(turns, reference.turns)
    return cell


def compare(
    turns: Mapping[TurnKey, dict[str, Any]], reference: Mapping[TurnKey, dict[str, Any]]
) -> dict[str, Any]:
    """How many turns have the reference's very tokens, and where the others part from it.

    A later turn is compared only while the turns before it were identical: otherwise it
    answers another conversation. ``gap`` is the difference of the reference's two best logits
    where the outputs part, ``runner_up`` whether the run took the second best there.
    """
    compared = identical = 0
    divergences: list[dict[str, Any]] = []
    parted: set[tuple[str, float, int]] = set()
    for key in sorted(turns):
        if key not in reference or key[:3] in parted:
            continue
        compared += 1
        index = first_divergence(turns[key]["tokens"], reference[key]["tokens"])
        if index is None:
            identical += 1
            continue
        parted.add(key[:3])
        divergences.append(
            {"number": key[2], "turn": key[3], "index": index}
            | _near_tie(turns[key], reference[key], index)
        )
    return {"compared": compared, "identical": identical, "divergences": divergences}


def _near_tie(turn: dict[str, Any], reference: dict[str, Any], index: int) -> dict[str, Any]:
    runner_up = reference.get("runner_up", [])
    if index >= len(runner_up) or index >= len(turn["tokens"]):
        return {}
    other, gap = runner_up[index]
    return {"gap": gap, "runner_up": turn["tokens"][index] == other}


def _pass(run: Run, event: dict[str, Any]) -> dict[str, Any]:
    """vLLM's counters of a pass beside the count of the outputs, as a check of both."""
    tally = Tally()
    for key, turn in run.turns.items():
        if key[1] == event["temperature"]:
            tally.add(turn["steps"])
    counters = event["counters"]
    return {
        "temperature": event["temperature"],
        "seconds": event["seconds"],
        "tau": tally.tau,
        "vllm_tau": vllm_tau(counters["drafts"], counters["accepted_tokens"]),
        "forwards": tally.forwards,
        **counters,
    }


def _without_kind(event: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in event.items() if key != "event"}
