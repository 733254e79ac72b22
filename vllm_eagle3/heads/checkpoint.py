"""A head as it lies on disk, and which of the public layouts that is."""

import pickle
import zipfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_eagle3.heads.files import (
    TensorEntry,
    download_remedy,
    pickled_files,
    read_config,
    read_entries,
    safetensors_files,
)

if TYPE_CHECKING:
    import torch

SPECULATORS, EAGLE_REPOSITORY, FLAT = "speculators", "EAGLE repository", "flat"
# What `convert-head` writes into a flat head's `eagle_config`: the layer ids count the layer
# entered and `norm_output` means that the normed state is fed back, as vLLM reads both.
CONVENTIONS_KEY, OUR_CONVENTIONS = "conventions", "vllm"
_SAFETENSORS = ".safetensors"
# vLLM's heads read these at the top of a config only; `norm_before_fc` in `eagle_config`, too.
_TOP_ONLY = ("fc_norm", "norm_before_residual", "norm_output")


@dataclass(frozen=True)
class Checkpoint:
    """A head's files.

    Attributes:
        path: the directory.
        config: ``config.json`` as stored.
        files: its weights, safetensors or PyTorch's pickles.
    """

    path: Path
    config: dict[str, Any]
    files: tuple[Path, ...]

    @classmethod
    def open(cls, path: str | Path) -> "Checkpoint":
        """Read the config and find the weights.

        Raises:
            ValueError: no such directory, no config, no weights, or a shard is missing.
        """
        root = Path(path).expanduser()
        if not root.is_dir():
            remedy = f"give the folder of a head{download_remedy(root)}"
            raise ValueError(f"{path}: no such directory: {remedy}")
        config = read_config(root)
        files = safetensors_files(root) or pickled_files(root)
        if not files:
            raise ValueError(f"{root}: no weights (*.safetensors, *.bin or *.pt) in it")
        return cls(root, config, tuple(files))

    @property
    def layout(self) -> str:
        """``SPECULATORS``, ``EAGLE_REPOSITORY`` or ``FLAT``.

        The EAGLE repository keeps the target's architecture; SpecForge, this project and
        everything else that vLLM and SGLang load name one of their own.
        """
        if "speculators_model_type" in self.config:
            return SPECULATORS
        named = " ".join(self.config.get("architectures") or ())
        return FLAT if "eagle" in named.lower() else EAGLE_REPOSITORY

    @property
    def follows_our_conventions(self) -> bool:
        return self.eagle_config.get(CONVENTIONS_KEY) == OUR_CONVENTIONS

    @property
    def eagle_config(self) -> dict[str, Any]:
        return self.config.get("eagle_config") or {}

    @property
    def model_config(self) -> dict[str, Any]:
        """The settings of the decoder layer, wherever the layout keeps them."""
        if self.layout == SPECULATORS:
            return self.config.get("transformer_layer_config") or {}
        return self.config

    def flag(self, name: str) -> bool | None:
        """A switch such as ``fc_norm``, wherever the config has it; None if absent."""
        value = self.eagle_config.get(name, self.config.get(name))
        return None if value is None else bool(value)

    @cached_property
    def entries(self) -> dict[str, TensorEntry]:
        """All tensors, names without a leading ``model.``.

        Raises:
            ValueError: a file is truncated, or holds something else than tensors.
        """
        if self.files[0].suffix != _SAFETENSORS:
            return {name: _entry(tensor) for name, tensor in self.load().items()}
        return {
            name.removeprefix("model."): entry
            for file in self.files
            for name, entry in read_entries(file).items()
        }

    def load(self, *names: str) -> "dict[str, torch.Tensor]":
        """The tensors of these names that exist, or all of them, on the CPU."""
        from safetensors import safe_open

        tensors: dict[str, torch.Tensor] = {}
        for file in self.files:
            if file.suffix != _SAFETENSORS:
                stored = _unpickle(file)
                tensors.update({key.removeprefix("model."): t for key, t in stored.items()})
                continue
            with safe_open(file, framework="pt") as reader:
                for key in reader.keys():  # noqa: SIM118 (not a mapping)
                    name = key.removeprefix("model.")
                    if not names or name in names:
                        tensors[name] = reader.get_tensor(key)
        return {name: tensor for name, tensor in tensors.items() if not names or name in names}


def unread_switches(config: dict[str, Any]) -> tuple[str, ...]:
    """Switches of a ``config.json`` that its ``eagle_config`` sets and vLLM reads otherwise."""
    nested = config.get("eagle_config") or {}
    return tuple(
        name
        for name in _TOP_ONLY
        if name in nested and bool(nested[name]) != bool(config.get(name))
    )


_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "int64": "I64", "bool": "BOOL"}


def _unpickle(file: Path) -> "dict[str, torch.Tensor]":
    """The tensors of a PyTorch file, on the CPU; nothing in it is executed."""
    import torch

    try:
        # torch maps its archives into memory, not the plain pickles that it wrote before 1.6.
        is_archive = zipfile.is_zipfile(file)
        stored = torch.load(file, map_location="cpu", weights_only=True, mmap=is_archive)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as error:
        raise ValueError(f"{file} is truncated or no PyTorch file of weights alone") from error
    if not isinstance(stored, dict) or not all(map(torch.is_tensor, stored.values())):
        raise ValueError(f"{file} is no dictionary of tensors, as torch.save(model.state_dict())")
    return stored


def _entry(tensor: "torch.Tensor") -> TensorEntry:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return TensorEntry(_DTYPES.get(dtype, dtype), tuple(tensor.shape), tensor.nbytes)
