"""The objectives by name."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from vllm_eagle3.train.data import TokenBatch
from vllm_eagle3.train.features import FeatureBatch, Target, TTTBatch
from vllm_eagle3.train.initialise import initialise_eagle3
from vllm_eagle3.train.model import Eagle3Head, HeadConfig
from vllm_eagle3.train.objectives.eagle3 import ttt_loss
from vllm_eagle3.train.objectives.result import LossResult, LossSettings


@dataclass(frozen=True)
class Objective:
    """What a training loop needs to train one kind of head.

    Attributes:
        name: as in ``OBJECTIVES``.
        title: of the head, for a reader.
        method: vLLM's speculative method that serves it, ``"eagle3"`` or ``"eagle"``.
        settings: the paper's.
        head_config: (Transformers config of the target, size of the draft vocabulary).
        make_head: (config, target, int64 [V] ids of the draft vocabulary, rising).
        initialise: writes the weights that training starts from, given a batch as read.
        read: runs the target over a batch of tokens; without gradient.
        loss: with its gradient, and the measures.
    """

    name: str
    title: str
    method: str
    settings: LossSettings
    head_config: Callable[[Any, int], HeadConfig]
    make_head: Callable[[HeadConfig, Target, torch.Tensor], Any]
    initialise: Callable[[Any, Target, Any], None]
    read: Callable[[Target, TokenBatch, Any], FeatureBatch]
    loss: Callable[[Any, Any, LossSettings], LossResult]


def _make_eagle3(config: HeadConfig, target: Target, ids: torch.Tensor) -> Eagle3Head:
    return Eagle3Head(config, target.embedding, ids)


def _read_logits(target: Target, batch: TokenBatch, head: Eagle3Head) -> TTTBatch:
    return target.read(batch, head.draft_token_ids, head.t2d)


_EAGLE3 = Objective(
    name="eagle3",
    title="EAGLE-3",
    method="eagle3",
    settings=LossSettings(),
    head_config=HeadConfig.from_target,
    make_head=_make_eagle3,
    initialise=initialise_eagle3,
    read=_read_logits,
    loss=ttt_loss,
)

OBJECTIVES: Mapping[str, Objective] = MappingProxyType(
    {objective.name: objective for objective in (_EAGLE3,)}
)
