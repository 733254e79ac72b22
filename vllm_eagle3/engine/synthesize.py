"""Training data written by the target itself, through vLLM's offline engine.

A small target is bound by the scheduler, not by the device: several replicas, each an
engine of its own in a process of its own, share one GPU. Where there are several GPUs, the
replicas are spread over them. Every replica writes its own shards, so an interrupted run goes
on where the last shard ended.
"""

import argparse
import json
import sys
import time
from collections import Counter
from dataclasses import asdict
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from vllm_eagle3.corpus import METADATA_FILE, read_shard, shard_paths, write_json
from vllm_eagle3.data.duplicates import EvaluationSets
from vllm_eagle3.data.target import tokenizer_for_data
from vllm_eagle3.engine.conversation import given_questions
from vllm_eagle3.engine.replica_processes import Progress, raise_failed, run_replicas, statuses
from vllm_eagle3.engine.run_folder import claim_folder
from vllm_eagle3.engine.shard_writer import REMEDY, add_shard
from vllm_eagle3.engine.synth_config import SynthConfig, add_arguments, config_from_arguments
from vllm_eagle3.engine.synth_replica import SynthReplica

__all__ = ["SynthConfig", "add_arguments", "run", "synthesize"]

RUN_FILE = "synthesis.json"


def run(args: argparse.Namespace) -> None:
    """The command ``vllm-eagle3 data synth``."""
    synthesize(args.target, args.out, config_from_arguments(args))


def synthesize(target: str, out_dir: Path, config: SynthConfig | None = None) -> dict[str, Any]:
    """Let ``target`` write conversations into shards of ``out_dir``.

    Existing shards of an interrupted run are kept and counted.

    Returns:
        The content of ``metadata.json``: documents, tokens, what was dropped, speed.

    Raises:
        ValueError: no such target, an unsuitable tokenizer, an unreadable file of questions, a
            full disk, or a folder that holds other data: another target's, or of other kinds,
            prompts or replicas.
        RuntimeError: a replica failed.
    """
    config, out_dir = config or SynthConfig(), Path(out_dir)
    # These fail here, before anything is written and any engine starts.
    EvaluationSets.from_files(config.exclude)
    tokenizer_for_data(target)
    claim_folder(out_dir, RUN_FILE, _identity(target, config))
    started = time.time()
    deadline = None if config.minutes is None else started + 60 * config.minutes
    makers = [
        partial(SynthReplica, target, out_dir, config, index, started)
        for index in range(config.replicas)
    ]
    progress = Progress(out_dir, "synthesis", "tokens", config.tokens)
    failed = run_replicas(makers, progress, deadline, config.gpus_each)
    metadata = _finish(target, out_dir, config, time.time() - started)
    raise_failed(failed)
    return metadata


def _identity(target: str, config: SynthConfig) -> dict[str, Any]:
    """What must be equal for a rerun to go on; each replica counts its own share of the rest."""
    kinds = [asdict(kind) for kind in config.kinds]
    return {
        "target": Path(target).name,
        "replicas": config.replicas,
        "kinds": _digest(kinds),
        "prompts": _digest(given_questions(config.prompts)),
    }


def _digest(content: list[Any]) -> str:
    return sha256(json.dumps(content).encode()).hexdigest()


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
            add_shard(path, kept)
        duplicates += len(shard) - len(kept)
        documents += len(kept)
        tokens += sum(len(d.tokens) for d in kept)
        assistant += int(sum(d.assistant.sum() for d in kept))
    kinds, dropped = Counter(), Counter({"duplicate across replicas": duplicates})
    for status in statuses(out_dir):
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
    write_json(out_dir / METADATA_FILE, metadata, REMEDY)
    print(f"{documents:,} documents, {tokens:,} tokens in {seconds:.0f} s", file=sys.stderr)
    return metadata
