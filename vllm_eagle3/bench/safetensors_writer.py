"""Safetensors files written tensor by tensor, so that one tensor of a file is in memory."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "int64": "I64", "bool": "BOOL"}
_ENTRY_BYTES = 160  # of a header, at least: dtype, shape and offsets of one tensor as JSON


def write_safetensors(
    path: Path, names: list[str], tensors: "Iterable[tuple[str, torch.Tensor]]"
) -> int:
    """Write a file and take each tensor from ``tensors`` only when its turn has come.

    The header stands first but needs the shapes, so room is left for it and filled with
    spaces, as the format allows.

    Args:
        path: replaced if it exists.
        names: of all tensors, in any order; reserves the room.
        tensors: names and dense tensors of bfloat16, float16, float32, int64 or bool, on any
            device.

    Returns:
        The bytes of the tensors, without the header.
    """
    room = sum(len(name) + _ENTRY_BYTES for name in [*names, "__metadata__"])
    room += -room % 8  # the format's alignment
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    with path.open("wb") as stream:
        stream.seek(8 + room)
        for name, tensor in tensors:
            dtype = _DTYPES[str(tensor.dtype).removeprefix("torch.")]
            start, end = end, end + tensor.nbytes
            header[name] = {
                "dtype": dtype,
                "shape": list(tensor.shape),
                "data_offsets": [start, end],
            }
            stream.write(_buffer(tensor))
        encoded = json.dumps(header).encode()
        assert len(encoded) <= room
        assert header.keys() - {"__metadata__"} == set(names)
        stream.seek(0)
        stream.write(room.to_bytes(8, "little") + encoded.ljust(room))
    return end


def _buffer(tensor: "torch.Tensor") -> memoryview:
    """The tensor's bytes; numpy, which lends them without a copy, has no bfloat16."""
    import torch

    return memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
