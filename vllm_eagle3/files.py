"""Files that are there whole, or as they were before."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

DEFAULT_REMEDY = (
    "free some space, or name a folder that can be written, and run the command again (a training "
    "with --resume)"
)
# What torch says where its archive cannot be written: a RuntimeError, as of all else in torch.
_FAILED_ARCHIVE = ("inline_container.cc", "iostream error", "Parent directory")


@contextmanager
def replacing(
    path: Path, remedy: str = DEFAULT_REMEDY, previous: Path | None = None
) -> Iterator[Path]:
    """Give a name beside ``path`` to write to; at the end that file takes the place of ``path``.

    It is flushed to the disk before, so that not even a power failure leaves half of it.

    Args:
        remedy: what the user can do where it cannot be written.
        previous: where the file that stood there is kept; None to let it go.

    Raises:
        ValueError: the disk is full or not writable; ``path`` is as it was.
    """
    scratch = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with writing(path, remedy):
            yield scratch
            _give_usual_mode(scratch)
            _flush(scratch)
            if previous is not None and path.is_file():
                os.replace(path, previous)
            os.replace(scratch, path)
            flush_folder(path.parent)
    finally:
        scratch.unlink(missing_ok=True)  # of what did not come to its end


@contextmanager
def writing(path: Path, remedy: str = DEFAULT_REMEDY) -> Iterator[None]:
    """Turn what goes wrong in writing ``path`` into a ValueError that names it and the remedy.

    Other errors, such as a device that is out of memory, pass as they are.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, RuntimeError) and not _is_failed_archive(error):
            raise
        raise ValueError(f"{path} could not be written ({error}): {remedy}") from error


def _is_failed_archive(error: RuntimeError) -> bool:
    return any(words in str(error) for words in _FAILED_ARCHIVE)


def _give_usual_mode(path: Path) -> None:
    """Let those read a file who may read any other file of this process.

    safetensors 0.8 makes its files the owner's alone, whatever the umask.
    """
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def flush_folder(folder: Path) -> None:
    """Make renames last through a power failure; a file system without it is left alone."""
    with suppress(OSError):
        _flush(folder)


def make_out_folder(path: Path, remedy: str = DEFAULT_REMEDY) -> None:
    """Make the folder of ``--out``, where there is none.

    Args:
        remedy: what the user can do where it cannot be made.

    Raises:
        ValueError: it is a file, or cannot be made.
    """
    if path.is_file():
        raise ValueError(f"--out {path} is a file: give a folder")
    with writing(path, remedy):
        path.mkdir(parents=True, exist_ok=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
