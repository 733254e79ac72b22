"""What a run tells: JSON lines, a progress bar, and TensorBoard where it is asked for."""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from vllm_eagle3.files import replacing, writing

LOG_FILE = "training_log.jsonl"
_REMEDY = "free some space, and go on from the last state with --resume"


class RunLog:
    """The log of one run. Of several processes only the main one writes.

    Args:
        active: False for a log that ignores everything.
        resume: keep the lines of the part before.
    """

    def __init__(
        self, out_dir: Path, active: bool = True, tensorboard: bool = False, resume: bool = False
    ) -> None:
        self.path, self.active = out_dir / LOG_FILE, active
        self._events = out_dir / "tensorboard"
        self._writer = _tensorboard(self._events) if tensorboard and active else None
        self._bar: Any = None
        if active and not resume:
            self.path.unlink(missing_ok=True)

    def rewind(self, step: int) -> None:
        """Drop the lines of steps after ``step``, which are run again."""
        if not self.active or not self.path.is_file():
            return
        lines = self.path.read_text().splitlines()
        kept = [line for line in lines if _step_of(line) <= step]
        with replacing(self.path, _REMEDY) as scratch:
            scratch.write_text("".join(line + "\n" for line in kept))

    def write(self, event: str, **entry: Any) -> None:
        """One line; numbers that are not whole are rounded to four places.

        Raises:
            ValueError: the disk is full or not writable.
        """
        if not self.active:
            return
        line = json.dumps({"event": event} | {k: rounded(v) for k, v in entry.items()})
        with writing(self.path, _REMEDY), self.path.open("a") as file:
            file.write(line + "\n")
        if self._bar is None or self._bar.disable:
            print(line, flush=True)
        if self._writer is not None and "step" in entry:
            with writing(self._events, _REMEDY):
                for name, value in _scalars(event, entry):
                    self._writer.add_scalar(name, value, entry["step"])

    def advance(self, progress: float, tokens: int, **shown: str) -> None:
        """Move the progress bar to a share ``progress`` of the run."""
        if not self.active:
            return
        if self._bar is None:
            from tqdm import tqdm

            form = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
            self._bar = tqdm(
                total=1.0, desc="training", bar_format=form, disable=not sys.stderr.isatty()
            )
        self._bar.update(min(1.0, progress) - self._bar.n)
        if shown:
            self._bar.set_postfix(tokens=f"{tokens:,}", **shown)

    def close(self) -> None:
        """Flush TensorBoard and end the bar."""
        if self._bar is not None:
            self._bar.close()
        if self._writer is not None:
            with writing(self._events, _REMEDY):
                self._writer.close()


def peak_memory_gib(device: torch.device) -> float:
    """Most memory that this process held: of the GPU, or of the machine without one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def rounded(value: Any) -> Any:
    """Floats to four places, at any depth; small ones keep four digits."""
    if isinstance(value, dict):
        return {name: rounded(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item) for item in value]
    if isinstance(value, float):
        return round(value, 4) if abs(value) >= 1 else float(f"{value:.4g}")
    return value


def _scalars(prefix: str, entry: dict[str, Any]) -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for name, value in entry.items():
        if name == "step" or isinstance(value, (str, bool)):
            continue
        if isinstance(value, dict):
            found += _scalars(f"{prefix}/{name}", value)
        elif isinstance(value, (list, tuple)):
            found += [(f"{prefix}/{name}/{i}", float(v)) for i, v in enumerate(value, 1)]
        elif value is not None:
            found.append((f"{prefix}/{name}", float(value)))
    return found


def _step_of(line: str) -> int:
    try:
        return json.loads(line).get("step", 0)
    except ValueError:  # the last line of a killed process
        return sys.maxsize


def _tensorboard(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(
            "tensorboard is not installed: pip install '.[train]' in a checkout, or leave "
            f"--tensorboard out ({LOG_FILE} holds the same numbers)"
        ) from error
    with writing(folder, _REMEDY):
        return SummaryWriter(str(folder))
