"""Training data written by the target itself, through vLLM's offline engine.

A small target is bound by the scheduler, not by the device: several replicas, each an
engine of its own in a process of its own, share one device. Every replica writes its own
shards, so an interrupted run goes on where the last shard ended.
"""

import argparse
import json
import multiprocessing
import os
import sys
import time
import traceback
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vllm_eagle3.corpus import METADATA_FILE, read_shard, shard_paths, write_json, write_shard
from vllm_eagle3.engine.conversation import read_questions
from vllm_eagle3.engine.replica import Replica
from vllm_eagle3.engine.synth_config import SynthConfig, add_arguments, config_from_arguments

_GRACE = 60  # seconds for a replica to stop after the time limit

__all__ = ["SynthConfig", "add_arguments", "run", "synthesize"]


def run(args: argparse.Namespace) -> None:
    """The command ``vllm-eagle3 data synth``."""
    synthesize(args.target, args.out, config_from_arguments(args))


def synthesize(target: str, out_dir: Path, config: SynthConfig | None = None) -> dict[str, Any]:
    """Let ``target`` write conversations into shards of ``out_dir``.

    Existing shards of an interrupted run are kept and counted.

    Returns:
        The content of ``metadata.json``: documents, tokens, what was dropped, speed.

    Raises:
        ValueError: an unsuitable tokenizer, or an unreadable file of questions.
        RuntimeError: a replica failed.
    """
    config, out_dir = config or SynthConfig(), Path(out_dir)
    for path in (*config.prompts, *config.exclude):
        read_questions(path)  # fails here, before any engine starts
    out_dir.mkdir(parents=True, exist_ok=True)
    started = time.time()
    failed: list[int] = []
    if config.replicas == 1:
        _replica(target, out_dir, config, 0, started)
    else:
        failed = _run_replicas(target, out_dir, config, started)
    metadata = _finish(target, out_dir, config, time.time() - started)
    if failed:
        raise RuntimeError(
            f"replicas {failed} of the synthesis failed (their messages are above); what was "
            "written is kept: fix the cause and run the same command again"
        )
    return metadata


def _run_replicas(target: str, out_dir: Path, config: SynthConfig, started: float) -> list[int]:
    """Run all replicas to their ends; returns the indices of those that failed."""
    from tqdm import tqdm

    # spawn: a forked child could not start CUDA once anything here has touched it.
    context = multiprocessing.get_context("spawn")
    workers = [
        context.Process(target=_replica_process, args=(target, out_dir, config, index, started))
        for index in range(config.replicas)
    ]
    for worker in workers:
        worker.start()
    bar = tqdm(total=config.tokens, unit="tok", unit_scale=True, desc="synthesis")
    while any(worker.is_alive() for worker in workers):
        time.sleep(1)
        done = sum(status.get("tokens", 0) for status in _statuses(out_dir))
        bar.update(done - bar.n)
        if config.minutes is not None and time.time() > started + 60 * config.minutes + _GRACE:
            for worker in workers:
                worker.kill()  # shards are written whole or not at all
    bar.close()
    return [i for i, worker in enumerate(workers) if worker.exitcode != 0]


def _replica(target: str, out_dir: Path, config: SynthConfig, index: int, started: float) -> None:
    Replica(target, out_dir, config, index, started).run()


def _replica_process(*args: Any) -> None:
    """A replica in a process of its own, ended at once when its shards are written.

    Interpreter shutdown waits for the engine's threads and children, which can take longer
    than the work.
    """
    import psutil

    try:
        _replica(*args)
    except BaseException:
        traceback.print_exc()
        code = 1
    else:
        code = 0
    for child in psutil.Process().children(recursive=True):
        child.kill()
    sys.stderr.flush()
    os._exit(code)


def _statuses(out_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(out_dir.glob("replica-*.json"))]


def _finish(target: str, out_dir: Path, config: SynthConfig, seconds: float) -> dict[str, Any]:
    """Drop what two replicas wrote alike, and write ``metadata.json``."""
    seen: set[bytes] = set()
    documents = tokens = assistant = duplicates = 0
    for path in shard_paths(out_dir):
        shard = read_shard(path)
        kept = []
        for document in shard:
            if document.tokens.tobytes() not in seen:
                seen.add(document.tokens.tobytes())
                kept.append(document)
        if not kept:
            path.unlink()
        elif len(kept) < len(shard):
            write_shard(path, kept)
        duplicates += len(shard) - len(kept)
        documents += len(kept)
        tokens += sum(len(d.tokens) for d in kept)
        assistant += int(sum(d.assistant.sum() for d in kept))
    kinds, dropped = Counter(), Counter({"duplicate across replicas": duplicates})
    for status in _statuses(out_dir):
        kinds.update(status["documents_by_kind"])
        dropped.update(status["dropped"])
    settings = asdict(config) | {
        "prompts": [path.name for path in map(Path, config.prompts)],
        "exclude": [path.name for path in map(Path, config.exclude)],
    }
    given = ", and answers to " + ", ".join(settings["prompts"]) if config.prompts else ""
    metadata = {
        "description": f"user turns from the bare chat header, their answers{given}.",
        "target": Path(target).name,
        "documents": documents,
        "tokens": tokens,
        "assistant_tokens": assistant,
        "documents_by_kind": dict(kinds.most_common()),
        "dropped": dict(dropped),
        "seconds": round(seconds, 1),
        "tokens_per_second": round(tokens / max(seconds, 1e-9)),
        "config": settings,
    }
    write_json(out_dir / METADATA_FILE, metadata)
    print(f"{documents:,} documents, {tokens:,} tokens in {seconds:.0f} s", file=sys.stderr)
    return metadata
