"""What a training run needs to go on after an interruption."""

import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from vllm_eagle3.train.model import Eagle3Head
from vllm_eagle3.train.settings import TrainConfig

# These may change between the parts of a run; what shapes the weights may not.
_FREE = {"epochs", "steps", "minutes", "log_every", "eval_every", "save_every", "eval_batches"}


@dataclass(frozen=True)
class Progress:
    """How far a run is: optimiser steps, tokens read (padding included), seconds."""

    step: int
    tokens_seen: int
    seconds: float


def save(
    path: Path,
    config: TrainConfig,
    head: Eagle3Head,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
) -> None:
    """Replace ``path`` in one step."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    torch.save(
        {
            "config": asdict(config),
            "head": head.state_dict(),
            "feature_scale": head.feature_scale_F,
            "optimizer": optimizer.state_dict(),
            "progress": asdict(progress),
        },
        scratch,
    )
    os.replace(scratch, path)


def load(
    path: Path, config: TrainConfig, head: Eagle3Head, optimizer: torch.optim.Optimizer
) -> Progress:
    """Restore head and optimiser.

    Raises:
        ValueError: there is no state, or it is of another configuration or other data.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist: start without resume")
    stored = torch.load(path, map_location=head.d2t.device, weights_only=True)
    now = asdict(config)
    changed = [k for k in now if k not in _FREE and stored["config"].get(k) != now[k]]
    if changed:
        raise ValueError(
            f"{path} was written with another {', '.join(changed)}: give the same, or "
            "start without resume"
        )
    if not torch.equal(stored["head"]["d2t"], head.d2t):
        raise ValueError(f"{path} was trained on other data: start without resume")
    head.load_state_dict(stored["head"])
    head.feature_scale_F.copy_(stored["feature_scale"])
    optimizer.load_state_dict(stored["optimizer"])
    return Progress(**stored["progress"])
