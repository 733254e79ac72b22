"""Shards that data making adds to a folder; a full disk ends in one clear message."""

from collections.abc import Sequence
from pathlib import Path

from vllm_eagle3.corpus import Document, write_shard

REMEDY = (
    "the shards written before are whole; free space and run the same command again, it goes on "
    "from them"
)


def next_shard_path(out_dir: Path, replica: int) -> Path:
    """A name that no shard of this replica has, nor any before it that was deleted."""
    names = [path.stem for path in out_dir.glob(f"shard-{replica:02d}-*.safetensors")]
    number = 1 + max((int(name.rpartition("-")[2]) for name in names), default=-1)
    return out_dir / f"shard-{replica:02d}-{number:05d}.safetensors"


def add_shard(path: Path, documents: Sequence[Document]) -> None:
    """Write a shard whole or not at all.

    Raises:
        ValueError: it cannot be written, most often because the disk is full.
    """
    write_shard(path, documents, REMEDY)
