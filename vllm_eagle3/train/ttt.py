"""The training-time test by its former names; :mod:`vllm_eagle3.train.objectives` has it."""

from vllm_eagle3.train.features import TTTBatch
from vllm_eagle3.train.model import Eagle3Head
from vllm_eagle3.train.objectives import eagle3
from vllm_eagle3.train.objectives.result import LossResult as TTTResult
from vllm_eagle3.train.objectives.result import LossSettings

__all__ = ["TTTBatch", "TTTResult", "ttt_loss"]


def ttt_loss(
    head: Eagle3Head,
    batch: TTTBatch,
    num_steps: int = 7,
    decay: float = 0.8,
    attention: str = "flash",
) -> TTTResult:
    return eagle3.ttt_loss(head, batch, LossSettings(num_steps, decay, attention))
