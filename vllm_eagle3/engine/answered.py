"""Which prompts the shards of a folder answer already, so that a rerun goes on.

Beside every shard lies a small JSON file with the numbers of its prompts. It is written
first: without its shard it means nothing, and a shard without it cannot be.
"""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from vllm_eagle3.corpus import read_shard, shard_paths, write_json
from vllm_eagle3.engine.shard_writer import REMEDY


class Answer(NamedTuple):
    """The label of a document: its prompt's number, its turns, and how it ended."""

    prompt: int
    turns: int
    end: str


class Answered(NamedTuple):
    """What a folder holds.

    Attributes:
        prompts: numbers of the answered prompts.
        turns, ends: documents by their number of turns and by how they ended.
        documents, tokens, assistant_tokens: in all shards.
    """

    prompts: set[int]
    turns: Counter
    ends: Counter
    documents: int
    tokens: int
    assistant_tokens: int


def write_answers(shard: Path, answers: Sequence[Answer]) -> None:
    """Note the prompts of a shard that is about to be written."""
    write_json(_notes(shard), {"answers": [list(answer) for answer in answers]}, REMEDY)


def read_answered(out_dir: Path) -> Answered:
    """What the shards of ``out_dir`` hold, each read whole.

    Raises:
        ValueError: a shard is damaged (delete it, and its prompts are answered again), or
            does not come from ``data regenerate``.
    """
    prompts: set[int] = set()
    turns, ends = Counter(), Counter()
    documents = tokens = assistant_tokens = 0
    for path in shard_paths(out_dir):
        shard = read_shard(path)
        try:
            answers = [Answer(*a) for a in json.loads(_notes(path).read_text())["answers"]]
        except FileNotFoundError:
            raise ValueError(
                f"{path} was not written by data regenerate: choose another folder for --out"
            ) from None
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{_notes(path)} is damaged: delete it and {path}") from error
        if len(answers) != len(shard):
            raise ValueError(f"{path} and {_notes(path)} do not match: delete both")
        prompts.update(answer.prompt for answer in answers)
        turns.update(answer.turns for answer in answers)
        ends.update(answer.end for answer in answers)
        documents += len(shard)
        tokens += sum(len(document.tokens) for document in shard)
        assistant_tokens += int(sum(document.assistant.sum() for document in shard))
    return Answered(prompts, turns, ends, documents, tokens, assistant_tokens)


def _notes(shard: Path) -> Path:
    return shard.with_suffix(".json")
