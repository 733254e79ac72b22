"""Events of a worker that served some answers, and predicted rounds for them."""

from typing import Any

from vllm_eagle3.bench.prediction import Prediction
from vllm_eagle3.bench.results import Run
from vllm_eagle3.bench.rounds import PredictedRound


def turn(number: int, steps: list[int], **changes: Any) -> dict[str, Any]:
    """A turn of set ``mine`` after a prompt of ten tokens, cut at its longest."""
    return {
        "event": "turn",
        "dataset": "mine",
        "number": number,
        "turn": 0,
        "temperature": 0.0,
        "prompt": list(range(10)),
        "tokens": list(range(sum(steps))),
        "steps": steps,
        "finish_reason": "length",
    } | changes


def end_of_pass(temperature: float = 0.0) -> dict[str, Any]:
    counters = {"drafts": 0, "draft_tokens": 0, "accepted_tokens": 0}
    return {"event": "pass", "temperature": temperature, "seconds": 1.0, "counters": counters}


def run_of(*events: dict[str, Any]) -> Run:
    run = Run()
    for event in ({"event": "ready", "device": "CPU", "vllm": "x", "dtype": "float32"}, *events):
        run.receive(event)
    return run


def predicted(name: str, run: Run, depth: int, likelihood: float = 1.0) -> Prediction:
    """Exactly what was served, all drafts being ``likelihood`` times as likely."""
    found = Prediction()
    for key, answered in run.turns.items():
        context, rounds = len(answered["prompt"]) + answered["steps"][0], []
        for tokens in answered["steps"][1:]:
            exceeds = [likelihood * (tokens > d) for d in range(1, depth + 1)]
            rounds.append(PredictedRound(context, tokens, exceeds))
            context += tokens
        found.rounds[name, key] = rounds
    return found
