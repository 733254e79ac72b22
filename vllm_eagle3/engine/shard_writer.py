"""Shards that data making adds to a folder; a full disk ends in one clear message."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from vllm_eagle3.corpus import Document, write_shard


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
    with writing(path):
        write_shard(path, documents)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what goes wrong in writing ``path`` into a ValueError, and leave no half file."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        for scratch in path.parent.glob(f".{path.name}.*"):
            scratch.unlink(missing_ok=True)
        raise ValueError(
            f"cannot write {path} ({error}): the shards written before are whole; free space and"
            " run the same command again, it goes on from them"
        ) from error
