"""A folder holds the shards of one run, so that data of two targets or settings never mix."""

import json
from pathlib import Path
from typing import Any

from vllm_eagle3.corpus import shard_paths, write_json
from vllm_eagle3.engine.shard_writer import REMEDY
from vllm_eagle3.files import make_out_folder


def claim_folder(out_dir: Path, file_name: str, identity: dict[str, Any]) -> None:
    """Let ``out_dir`` hold the shards of this run, or see that it does already.

    A run that ended before its first shard leaves the folder to any other.

    Args:
        file_name: of the JSON file in ``out_dir`` that says whose folder it is.
        identity: what must be equal for a rerun to go on: settings as JSON values, by name.

    Raises:
        ValueError: it is a file or holds the shards of another run, or the JSON file cannot be
            read or written.
    """
    path = out_dir / file_name
    has_shards = any(shard_paths(out_dir))
    if has_shards and path.is_file():
        try:
            before = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}): choose another --out") from error
        for name, value in identity.items():
            if before.get(name) != value:
                raise ValueError(
                    f"{out_dir} was begun with another setting of {name} ({before.get(name)}, now"
                    f" {value}): give the same again, or another folder for --out"
                )
        return
    if has_shards:
        raise ValueError(f"{out_dir} holds other training data: choose another folder for --out")
    make_out_folder(out_dir, REMEDY)
    for status in out_dir.glob("replica-*.json"):  # of a run that wrote nothing
        status.unlink()
    write_json(path, identity, REMEDY)
