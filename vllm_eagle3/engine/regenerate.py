"""Given conversations with the target's own answers, through vLLM's offline engine.

A head that learns from answers its target would not give proposes what the target refuses.
So only the user's side (and a system message) of the given conversations is kept; every
answer is the target's, after a history that holds its own answers.
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

from vllm_eagle3.corpus import METADATA_FILE, write_json
from vllm_eagle3.data.duplicates import EvaluationSets
from vllm_eagle3.data.formats import Chat, ChatFile, read_chats
from vllm_eagle3.data.target import tokenizer_for_data
from vllm_eagle3.engine.answered import read_answered
from vllm_eagle3.engine.regenerate_replica import RegenerateConfig, RegenerateReplica
from vllm_eagle3.engine.replica_config import (
    add_replica_arguments,
    add_setting,
    settings_from,
)
from vllm_eagle3.engine.replica_processes import Progress, raise_failed, run_replicas, statuses
from vllm_eagle3.engine.run_folder import claim_folder
from vllm_eagle3.engine.shard_writer import REMEDY
from vllm_eagle3.options import json_object

RUN_FILE = "regenerate.json"
_MOST_NAMES = 100  # of unreadable or skipped lines in the metadata; all of them are counted
REPEATED = "repeated prompt"

__all__ = ["RegenerateConfig", "add_arguments", "regenerate", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``vllm-eagle3 data regenerate``."""
    default = RegenerateConfig()
    parser.add_argument(
        "prompts", type=Path, nargs="+", metavar="PROMPTS.jsonl",
        help="conversations: ShareGPT, OpenAI messages, prompt and completion, or questions",
    )  # fmt: skip
    add_replica_arguments(parser, default)
    add_setting(parser, default, "max_turns", int, "user turns that are answered, at most")
    add_setting(parser, default, "top_p", float, "of answers")
    parser.add_argument(
        "--template", type=json_object, default={}, metavar="JSON",
        help="further variables of the chat template, such as '{\"enable_thinking\": false}'",
    )  # fmt: skip


def run(args: argparse.Namespace) -> None:
    """The command ``vllm-eagle3 data regenerate``."""
    config = RegenerateConfig(**settings_from(args, RegenerateConfig))
    regenerate(args.prompts, args.target, args.out, config)


def regenerate(
    prompts: list[Path], target: str, out_dir: Path, config: RegenerateConfig | None = None
) -> dict[str, Any]:
    """Let ``target`` answer the conversations of ``prompts`` into shards of ``out_dir``.

    What an interrupted run wrote is kept, and only what it lacks is answered.

    Returns:
        The content of ``metadata.json``: documents, tokens, what was left out and why.

    Raises:
        FileNotFoundError: no such file of prompts.
        ValueError: no such target, no readable prompt, an unsuitable chat template, a damaged
            shard, a full disk, or a folder that holds other data.
        RuntimeError: a replica failed.
    """
    config, out_dir = config or RegenerateConfig(), Path(out_dir)
    given = read_chats(prompts)
    for line in given.unreadable[:5]:
        print(f"left out: {line}", file=sys.stderr)
    wanted, left_out = _choose(given.chats, EvaluationSets.from_files(config.exclude))
    tokenizer_for_data(target)  # fails here, before anything is written
    claim_folder(out_dir, RUN_FILE, _identity(given.chats, target, config))
    answered = read_answered(out_dir)
    pending = [number for number in wanted if number not in answered.prompts]
    for path in out_dir.glob("replica-*.json"):  # of the earlier run
        path.unlink()
    started = time.time()
    failed: list[int] = []
    if pending:
        deadline = None if config.minutes is None else started + 60 * config.minutes
        shares = [pending[index :: config.replicas] for index in range(config.replicas)]
        makers = [
            partial(
                RegenerateReplica,
                target,
                out_dir,
                config,
                [(number, given.chats[number]) for number in share],
                index,
                started,
            )
            for index, share in enumerate(shares)
            if share
        ]
        progress = Progress(
            out_dir, "answering", "conversations", len(wanted), len(wanted) - len(pending)
        )
        failed = run_replicas(makers, progress, deadline, config.gpus_each)
    metadata = _finish(target, out_dir, config, given, left_out, time.time() - started)
    raise_failed(failed)
    return metadata


def _choose(chats: list[Chat], evaluation_sets: EvaluationSets) -> tuple[list[int], dict[int, str]]:
    """Numbers of the chats to answer, and of the others with the reason."""
    seen: set[tuple[str | None, tuple[str, ...]]] = set()
    left_out = {}
    for number, chat in enumerate(chats):
        prompt = chat.system, chat.users
        finding = REPEATED if prompt in seen else evaluation_sets.any_repeated_by(chat.users)
        if finding:
            left_out[number] = finding
        seen.add(prompt)
    return [number for number in range(len(chats)) if number not in left_out], left_out


def _identity(chats: list[Chat], target: str, config: RegenerateConfig) -> dict[str, Any]:
    """What must be equal for a rerun to go on."""
    digest = sha256()
    for chat in chats:
        digest.update(json.dumps([chat.system, chat.users]).encode())
    return {
        "target": Path(target).name,
        "prompts": digest.hexdigest(),
        "max_turns": config.max_turns,
        "template": config.template,
    }


def _finish(
    target: str,
    out_dir: Path,
    config: RegenerateConfig,
    given: ChatFile,
    left_out: dict[int, str],
    seconds: float,
) -> dict[str, Any]:
    """Write ``metadata.json``."""
    left_out = dict(left_out)
    new_tokens = 0
    for status in statuses(out_dir):
        left_out |= {int(number): why for number, why in status["skipped_prompts"].items()}
        new_tokens += status["tokens"]
    answered = read_answered(out_dir)
    unanswered = len(given.chats) - len(left_out) - len(answered.prompts)
    names = [f"{given.names[number]}: {why}" for number, why in sorted(left_out.items())]
    settings = asdict(config) | {"exclude": [path.name for path in map(Path, config.exclude)]}
    metadata = {
        "description": "the user's side of given conversations, its answers the target's.",
        "target": Path(target).name,
        "documents": answered.documents,
        "tokens": answered.tokens,
        "assistant_tokens": answered.assistant_tokens,
        "documents_by_kind": {
            f"{turns} turn{'s' * (turns > 1)}": count
            for turns, count in sorted(answered.turns.items())
        },
        "ends": dict(answered.ends.most_common()),
        "dropped": dict(Counter(left_out.values())),
        "dropped_lines": names[:_MOST_NAMES],
        "unreadable": len(given.unreadable),
        "unreadable_lines": given.unreadable[:_MOST_NAMES],
        "unanswered": unanswered,
        "seconds": round(seconds, 1),
        "tokens_per_second": round(new_tokens / max(seconds, 1e-9)),
        "config": settings,
    }
    write_json(out_dir / METADATA_FILE, metadata, REMEDY)
    print(
        f"{answered.documents:,} conversations, {answered.tokens:,} tokens; {unanswered:,} to be"
        f" answered yet, {len(left_out):,} left out, {len(given.unreadable):,} unreadable lines",
        file=sys.stderr,
    )
    return metadata
