"""Results of a benchmark in files: JSON, and the tables beside it."""

import json
from pathlib import Path
from typing import Any

from vllm_eagle3.files import replacing, writing

_REMEDY = "free some space, or name another --output, and run the command again"
PLOTS_REMEDY = "run pip install '.[bench]' in a checkout of the repository"


def write_results(path: Path, data: dict[str, Any], text: str) -> None:
    """Write ``path`` as JSON and ``text`` beside it, with the suffix ``.md``.

    Folders are made. Each file is replaced whole, so that no end of the command leaves half of
    one: a long benchmark may write after every measurement.

    Raises:
        ValueError: the disk is full or not writable; the file that is named is as it was.
    """
    with writing(path, _REMEDY):
        path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, json.dumps(data, indent=1) + "\n")
    write_tables(path, text)


def make_log_folder(path: Path) -> Path:
    """Make the folder for logs beside the results in ``path``, with the suffix ``.logs``.

    Raises:
        ValueError: it cannot be made, or ``path`` is a folder.
    """
    if path.is_dir():
        raise ValueError(f"--output {path} is a folder: name a JSON file in it")
    folder = path.with_suffix(".logs")
    with writing(path, _REMEDY):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_tables(path: Path, text: str) -> None:
    """Write ``text`` alone, beside the results in ``path``; raises as :func:`write_results`."""
    _write(path.with_suffix(".md"), text)


def _write(path: Path, text: str) -> None:
    with replacing(path, _REMEDY) as scratch:
        scratch.write_text(text, encoding="utf-8")
