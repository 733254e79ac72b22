"""Disks that are full."""

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def fill_disk_for(path: Path) -> None:
    """Let the next replacement of ``path`` by Python's own files end in a real ENOSPC.

    What is written beside ``path`` goes to Linux's device that is always full.
    """
    path.with_name(f".{path.name}.{os.getpid()}.partial").symlink_to("/dev/full")


@contextmanager
def no_room(num_bytes: int = 100) -> Iterator[None]:
    """While this lasts, every file that grows beyond ``num_bytes`` ends in a real EFBIG."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
