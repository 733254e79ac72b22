"""Results of ``bench speed`` made by hand."""

from vllm_eagle3.bench.ratios import summarize


def wave(seconds, tokens=20, requests=1, forwards=9, full_steps=8):
    return {
        "requests": requests,
        "seconds": seconds,
        "tokens": tokens,
        "steps": 10,
        "forwards": forwards,
        "prefill_seconds": seconds / 10,
        "decode_seconds": seconds * 0.9,
        "decode_tokens": tokens - requests,
        "full_seconds": seconds * 0.8,
        "full_tokens": tokens - 2 * requests,
        "full_steps": full_steps,
    }


def run(*seconds, **more):
    return {"waves": [wave(s, **more) for s in seconds], "counters": {"preemptions": 0}}


def cell(batch_size, temperature, repeats, round_number=0):
    """``repeats``: for each, the seconds of each configuration."""
    return {
        "batch_size": batch_size,
        "temperature": temperature,
        "round": round_number,
        "repeats": [
            {"order": list(runs), "runs": {name: run(s) for name, s in runs.items()}}
            for runs in repeats
        ],
    }


def results(*cells, profiles=(), notes=()):
    names = list(dict.fromkeys(n for c in cells for r in c["repeats"] for n in r["runs"]))
    engine = {"device": "a GPU", "vllm": "0.33.0", "torch": "2.13", "dtype": "bfloat16"}
    return {
        "kind": "speed",
        "settings": {"max_tokens": 20, "repeats": 2, "data": ["mine.jsonl"]},
        "notes": list(notes),
        "prompts": {"count": 3, "mean_tokens": 90.0, "max_tokens": 100},
        "step_cost": {
            "target": 4_300_000_000,
            "head": 430_000_000,
            "head_once": 0,
            "target_kv": 0,
            "head_kv": 0,
        },
        "configurations": [
            {
                "name": name,
                "num_speculative_tokens": None if name == "plain" else 5,
                "shape": None,
                "engine": engine,
                "error": None,
            }
            for name in names
        ],
        "cells": list(cells),
        "summary": [summarize(c) for c in cells],
        "profiles": list(profiles),
    }
