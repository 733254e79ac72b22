"""Writes a wide checkpoint: each tensor is made, counted and written before the next."""

import os
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from vllm_eagle3.bench.safetensors_writer import write_safetensors
from vllm_eagle3.bench.widen_layout import Layout, Noise
from vllm_eagle3.corpus import write_json
from vllm_eagle3.heads.files import safetensors_files

_FILE_BYTES = 2 << 30  # of the largest file, roughly; files are written at once


@dataclass(frozen=True)
class Written:
    """A wide checkpoint.

    Attributes:
        path: its folder.
        parameters: numbers in its floating-point tensors.
        zeros: how many of them are zero.
    """

    path: Path
    parameters: int
    zeros: int

    def describe(self) -> str:
        share = 100 * self.zeros / self.parameters
        return f"{self.parameters / 1e9:.2f} billion parameters, {share:.1f} % of them zero"


@dataclass(frozen=True)
class Writer:
    """Writes checkpoints of one dtype, with random numbers of one seed made on one device."""

    dtype: torch.dtype
    seed: int
    device: torch.device

    def write(self, layout: Layout, source_dir: Path, out: Path) -> Written:
        """The weights of one checkpoint, in files written at once, and their index."""
        weights = _load(source_dir, self.device)
        layout.check_names(weights)
        origins = _origins(list(weights), layout.source.num_layers, layout.wide.num_layers)
        layer_bytes = layout.wide.layer_parameters * self.dtype.itemsize
        groups = _files(list(origins), max(1, _FILE_BYTES // layer_bytes))
        out.mkdir()
        counts: list[tuple[int, int]] = []

        def tensors(names: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
            for name in names:
                tensor = self._tensor(layout, name, weights[origins[name]], name not in weights)
                if tensor.is_floating_point():
                    counts.append((tensor.numel(), tensor.numel() - int(tensor.count_nonzero())))
                yield name, tensor

        with ThreadPoolExecutor(max_workers=min(len(groups), os.cpu_count() or 1)) as pool:
            sizes = pool.map(
                lambda item: write_safetensors(out / item[0], item[1], tensors(item[1])),
                groups.items(),
            )
            total = sum(sizes)
        if len(groups) > 1:
            places = {name: file for file, names in groups.items() for name in names}
            index = {"metadata": {"total_size": total}, "weight_map": places}
            write_json(out / "model.safetensors.index.json", index)
        return Written(out, sum(n for n, _ in counts), sum(zeros for _, zeros in counts))

    def _tensor(self, layout: Layout, name: str, weight: torch.Tensor, added: bool) -> torch.Tensor:
        # Of the name, so that the order of the threads does not matter.
        generator = torch.Generator(self.device)
        generator.manual_seed(zlib.crc32(f"{self.seed} {name}".encode()))
        std = float(weight.std()) if weight.is_floating_point() else 0.0
        return layout.widen(name, weight, Noise(generator, self.dtype, std), added=added)


def _load(source_dir: Path, device: torch.device) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {
        name: weight.to(device).float() if weight.is_floating_point() else weight
        for file in safetensors_files(source_dir)
        for name, weight in load_file(file).items()
    }


def _origins(names: list[str], num_layers: int, wide_layers: int) -> dict[str, str]:
    """The source's tensor behind each wide one; an added layer's is in the last layer."""
    origins = {name: name for name in names}
    last = f".{num_layers - 1}."
    for layer in range(num_layers, wide_layers):
        origins |= {name.replace(last, f".{layer}."): name for name in names if last in name}
    return origins


def _files(names: list[str], layers_per_file: int) -> dict[str, list[str]]:
    """File names and the tensors in them; what belongs to no layer has a file of its own."""
    groups: dict[int, list[str]] = {}
    for name in names:
        layer = name.removeprefix("model.layers.").split(".")[0]
        group = int(layer) // layers_per_file if layer.isdigit() else -1
        groups.setdefault(group, []).append(name)
    if len(groups) == 1:
        return {"model.safetensors": names}
    count = len(groups)
    return {
        f"model-{number:05d}-of-{count:05d}.safetensors": groups[group]
        for number, group in enumerate(sorted(groups), 1)
    }
