"""A checkpoint's config and its tensors' names, types and shapes; no tensor data is read."""

import json
import struct
from pathlib import Path
from typing import Any, NamedTuple

_INDEX = "model.safetensors.index.json"
_PICKLED_INDEX = "pytorch_model.bin.index.json"
_OF_A_TRAINER = ("training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt", "scaler.pt")


class TensorEntry(NamedTuple):
    """A tensor in a file's header. ``dtype`` is safetensors' name for it, such as ``BF16``."""

    dtype: str
    shape: tuple[int, ...]
    num_bytes: int


def download_remedy(path: Path) -> str:
    """How to get a model whose name on the hub was given for its folder; else nothing."""
    if len(path.parts) != 2 or path.is_absolute():
        return ""
    return f"; one of this name is downloaded by `hf download {path} --local-dir DIR`"


def read_config(root: Path) -> dict[str, Any]:
    """``config.json`` of a checkpoint.

    Raises:
        ValueError: there is none, or it is not a JSON object.
    """
    file = root / "config.json"
    if not file.is_file():
        raise ValueError(f"{root}: no config.json in it")
    try:
        config = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file} is not a JSON object")
    return config


def safetensors_files(root: Path) -> list[Path]:
    """The safetensors files of a checkpoint, by name.

    Raises:
        ValueError: the index names a file that is not there.
    """
    files = sorted(root.glob("*.safetensors"))
    _check_complete(files, root / _INDEX)
    return files


def pickled_files(root: Path) -> list[Path]:
    """The PyTorch files that vLLM loads where a checkpoint has no safetensors files, by name.

    ``*.bin``, or else ``*.pt``, without those in which trainers keep their own state.

    Raises:
        ValueError: the index names a file that is not there.
    """
    found = sorted(root.glob("*.bin")) or sorted(root.glob("*.pt"))
    files = [file for file in found if not file.name.endswith(_OF_A_TRAINER)]
    _check_complete(files, root / _PICKLED_INDEX)
    return files


def _check_complete(files: list[Path], index: Path) -> None:
    if index.is_file():
        named = set(json.loads(index.read_text())["weight_map"].values())
        missing = sorted(named - {file.name for file in files})
        if missing:
            raise ValueError(f"{index.parent}: {', '.join(missing)} is missing")


def read_entries(file: Path) -> dict[str, TensorEntry]:
    """The header of a safetensors file.

    Raises:
        ValueError: the file is shorter than its header says, or has no such header.
    """
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header: dict[str, Any] = json.loads(stream.read(length))
    except (struct.error, ValueError, OverflowError, MemoryError) as error:
        raise ValueError(f"{file} is truncated or no safetensors file") from error
    header.pop("__metadata__", None)
    end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if size < 8 + length + end:
        raise ValueError(f"{file} is truncated: {size} bytes of {8 + length + end}")
    return {
        name: TensorEntry(
            entry["dtype"],
            tuple(entry["shape"]),
            entry["data_offsets"][1] - entry["data_offsets"][0],
        )
        for name, entry in header.items()
    }
