"""The format of training data: token shards that synthesis writes and training reads.

A shard is one safetensors file of D documents and T tokens:

    tokens     int32 [T]    the documents one after another
    offsets    int64 [D+1]  document d is tokens[offsets[d]:offsets[d + 1]]
    assistant  uint8 [T]    1 where the assistant wrote the token
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from vllm_eagle3.files import DEFAULT_REMEDY, replacing

METADATA_FILE = "metadata.json"


@dataclass(frozen=True)
class Document:
    """One conversation: token ids and, of the same length, what the assistant wrote."""

    tokens: np.ndarray
    assistant: np.ndarray


def write_shard(path: Path, documents: Sequence[Document], remedy: str = DEFAULT_REMEDY) -> None:
    """Write a shard; ``path`` never holds half of one.

    Args:
        remedy: what the user can do where it cannot be written.

    Raises:
        ValueError: the disk is full or not writable.
    """
    from safetensors.numpy import save_file

    lengths = [len(document.tokens) for document in documents]
    arrays = {
        "tokens": np.concatenate([d.tokens for d in documents]).astype(np.int32),
        "offsets": np.concatenate(([0], np.cumsum(lengths))).astype(np.int64),
        "assistant": np.concatenate([d.assistant for d in documents]).astype(np.uint8),
    }
    with replacing(path, remedy) as scratch:
        save_file(arrays, scratch)


def read_shard(path: Path) -> list[Document]:
    """Read a shard.

    Raises:
        ValueError: the file is truncated, or is not a shard.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        arrays = load_file(path)
        tokens, offsets = arrays["tokens"], arrays["offsets"]
        assistant = arrays["assistant"].astype(bool)
    except (SafetensorError, KeyError, OSError) as error:
        raise ValueError(f"{path} is not a shard of training data ({error}): delete it") from error
    whole = (
        len(offsets) > 0
        and offsets[0] == 0
        and offsets[-1] == len(tokens) == len(assistant)
        and (np.diff(offsets) > 0).all()
        and tokens.min(initial=0) >= 0
    )
    if not whole:
        raise ValueError(f"the arrays of {path} do not match: delete it")
    return [Document(tokens[start:end], assistant[start:end]) for start, end in pairwise(offsets)]


def read_corpus(*data_dirs: Path) -> list[Document]:
    """All documents of ``data_dirs``, folder by folder, in the order of the shards' names.

    Raises:
        ValueError: a folder is missing, has no shard, or is given twice, or it is a file.
    """
    documents: list[Document] = []
    known: set[Path] = set()
    for data_dir in map(Path, data_dirs):
        if data_dir.is_file():
            raise ValueError(
                f"{data_dir} is a file: give a folder of shards; `vllm-eagle3 data convert` makes "
                "one of conversations"
            )
        if not data_dir.is_dir():
            raise ValueError(f"{data_dir}: no such folder")
        if data_dir.resolve() in known:
            raise ValueError(f"{data_dir} is given twice")
        known.add(data_dir.resolve())
        found = [d for path in shard_paths(data_dir) for d in read_shard(path)]
        if not found:
            raise ValueError(
                f"{data_dir} holds no training data: make some with `vllm-eagle3 data synth`, "
                "`data regenerate` or `data convert`"
            )
        documents += found
    return documents


def shard_paths(data_dir: Path) -> Iterator[Path]:
    """The shards of ``data_dir``, sorted by name."""
    yield from sorted(Path(data_dir).glob("shard-*.safetensors"))


def write_json(path: Path, content: dict[str, Any], remedy: str = DEFAULT_REMEDY) -> None:
    """Replace ``path`` in one step.

    Args:
        remedy: what the user can do where it cannot be written.

    Raises:
        ValueError: the disk is full or not writable; ``path`` is as it was.
    """
    with replacing(path, remedy) as scratch:
        scratch.write_text(json.dumps(content, indent=2) + "\n")
