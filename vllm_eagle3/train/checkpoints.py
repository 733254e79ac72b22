"""What a training run needs to go on after an interruption, and its place on the disk.

Two states are kept, ``training_state.pt`` and ``training_state.previous.pt``. A new one is
written beside them, flushed to the disk, and only then renamed: a full disk or a killed
process leaves the two as they were.
"""

import random
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from vllm_eagle3.files import replacing
from vllm_eagle3.train.settings import TrainConfig

STATE_FILE = "training_state.pt"
PREVIOUS_FILE = "training_state.previous.pt"

_CHECKPOINT_FILES = ("config.json", "model.safetensors", "pytorch_model.bin")

# These may change between the parts of a run; what shapes the weights may not. The learning
# rate is free because lowering it is the remedy for a loss that is no longer finite.
_FREE = {
    *("epochs", "steps", "minutes", "learning_rate", "clip", "recompute", "shard_target"),
    *("log_every", "eval_every", "save_every", "eval_batches"),
    *("eval_documents", "eval_chain", "eval_tree", "tensorboard"),
}


@dataclass(frozen=True)
class Progress:
    """How far a run is: optimiser steps, tokens read (padding included), seconds."""

    step: int = 0
    tokens_seen: int = 0
    seconds: float = 0.0


def random_state(device: torch.device) -> dict[str, Any]:
    """State of all generators that a process of training draws from."""
    state: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Undo what was drawn since :func:`random_state`."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    torch.set_rng_state(state["torch"].cpu())
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)


def refuse_overwriting(out_dir: Path) -> None:
    """A new run would replace the log and the states of the one before, or a finished head.

    Raises:
        ValueError: ``out_dir`` holds a state or a checkpoint.
    """
    for path in (out_dir / STATE_FILE, out_dir / PREVIOUS_FILE):
        if path.exists():
            raise ValueError(
                f"{path} is the state of a run: go on from it with --resume, or start anew in "
                "another --out"
            )
    if any((out_dir / name).exists() for name in _CHECKPOINT_FILES):
        raise ValueError(f"{out_dir} holds a checkpoint already: give another --out")


def save(
    out_dir: Path,
    config: TrainConfig,
    head: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    random_states: list[dict[str, Any]],
    inputs: dict[str, str],
) -> None:
    """Write the newest state; the newest before it becomes the previous one.

    Args:
        random_states: of every process, by rank.
        inputs: fingerprints of what is trained on, by name.

    Raises:
        ValueError: the disk is full or not writable; the states written before are intact.
    """
    newest, previous = out_dir / STATE_FILE, out_dir / PREVIOUS_FILE
    remedy = (
        f"it is the state of step {progress.step}; free some space, and go on from the state "
        "before with --resume"
    )
    with replacing(newest, remedy, previous) as scratch:
        torch.save(
            {
                "config": asdict(config),
                "head": head.state_dict(),
                "feature_scale": head.feature_scale_F,
                "optimizer": optimizer.state_dict(),
                "progress": asdict(progress),
                "random": random_states,
                "inputs": inputs,
            },
            scratch,
        )


def load(
    out_dir: Path,
    config: TrainConfig,
    head: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    inputs: dict[str, str],
    num_processes: int = 1,
) -> tuple[Progress, list[dict[str, Any]]]:
    """Restore head and optimiser from the newest state that can be read.

    On as many processes a run goes on bit by bit on the CPU, and up to the order of sums on a
    GPU, whose flash kernel does not fix it in its backward pass. On another number of them it
    reads the same batches in the same order, if processes x ``accumulate`` is what it was; but
    sums are rounded in another order, and noise is drawn anew.

    Args:
        inputs: as for :func:`save`, of this run.

    Returns:
        The progress and the random states, by the ranks of the processes that wrote them.

    Raises:
        ValueError: there is no state, or it is of another configuration, of other inputs, or
            of processes that read a step in another number of parts.
    """
    path, stored = _newest(out_dir, head.feature_scale_F.device)
    now = asdict(config)
    changed = [
        name
        for name in now
        if name not in {*_FREE, "accumulate"} and stored["config"].get(name) != now[name]
    ]
    if changed:
        raise ValueError(
            f"{path} was written with another {', '.join(changed)}: give the same, or "
            "start anew in another --out"
        )
    known = stored.get("inputs", {})
    if other := [name for name, value in inputs.items() if known.get(name) != value]:
        raise ValueError(
            f"{path} was trained with different {' and '.join(other)}: give the same, or "
            "start anew in another --out"
        )
    _check_parts(path, len(stored["random"]), stored["config"], num_processes, config)
    head.load_state_dict(stored["head"])
    head.feature_scale_F.copy_(stored["feature_scale"])
    fused = optimizer.defaults["fused"]
    optimizer.load_state_dict(stored["optimizer"])
    for group in optimizer.param_groups:  # how it is computed, no state
        group["fused"] = fused
    return Progress(**stored["progress"]), stored["random"]


def _check_parts(
    path: Path, before: int, stored: dict[str, Any], num_processes: int, config: TrainConfig
) -> None:
    """Refuse another number of parts of a step: other batches would be read, some of them twice."""
    parts = before * stored["accumulate"]
    if num_processes * config.accumulate == parts:
        return
    accumulate, rest = divmod(parts, num_processes)
    remedy = f"use {before} processes with --accumulate {stored['accumulate']}"
    if not rest:
        remedy = f"give --accumulate {accumulate}"
    raise ValueError(
        f"{path} was written by {before} processes with accumulate={stored['accumulate']}, "
        f"{parts} parts a step; this run has {num_processes} with accumulate={config.accumulate}, "
        f"which are other batches: {remedy}, or start anew in another --out"
    )


def _newest(out_dir: Path, device: torch.device) -> tuple[Path, dict[str, Any]]:
    unreadable = []
    for path in (out_dir / STATE_FILE, out_dir / PREVIOUS_FILE):
        if not path.is_file():
            continue
        try:
            return path, torch.load(path, map_location=device, weights_only=True)
        # A damaged archive surfaces as almost anything: zip, pickle, key and value errors.
        except Exception as error:
            unreadable.append(path.name)
            print(f"{path} cannot be read ({error}): trying the one before", file=sys.stderr)
    if unreadable:
        raise ValueError(
            f"{' and '.join(unreadable)} of {out_dir} cannot be read: start anew in another --out"
        )
    raise ValueError(f"{out_dir / STATE_FILE} does not exist: start without resume")
