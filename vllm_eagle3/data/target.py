"""What Transformers reads of a target; what cannot be read is told in one line."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def reading_target(target: str | Path) -> Iterator[None]:
    """Within it Transformers reads the target.

    Raises:
        ValueError: there is no such model, or one of its files is missing.
    """
    try:
        yield
    except OSError as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(f"--target {target}: {reason}") from error


def load_tokenizer(target: str | Path) -> Any:
    """The target's tokenizer, from a folder or a hub name.

    Raises:
        ValueError: as :func:`reading_target`.
    """
    from transformers import AutoTokenizer

    with reading_target(target):
        return AutoTokenizer.from_pretrained(target)
