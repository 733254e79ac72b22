"""The objectives by name."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any

import torch

from vllm_eagle3.train.data import TokenBatch
from vllm_eagle3.train.eagle1 import Eagle1Head
from vllm_eagle3.train.features import FeatureBatch, Target, TTTBatch
from vllm_eagle3.train.initialise import initialise_eagle1, initialise_eagle3
from vllm_eagle3.train.model import Eagle3Head, HeadConfig
from vllm_eagle3.train.objectives.eagle3 import ttt_loss
from vllm_eagle3.train.objectives.hass import aligned_loss
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


def _make_eagle1(config: HeadConfig, target: Target, ids: torch.Tensor) -> Eagle1Head:
    assert len(ids) == config.vocab_size
    return Eagle1Head(config, target.embedding, target.output_matrix)


def _top_layer(target: Any, draft_vocab_size: int) -> HeadConfig:
    """One captured state, the last layer's output."""
    return HeadConfig.from_target(target, draft_vocab_size, (target.num_hidden_layers,))


def _last_hidden(target: Any, _draft_vocab_size: int) -> HeadConfig:
    """No captured states, and the whole vocabulary."""
    return HeadConfig.from_target(target, target.vocab_size, ())


def _read_logits(target: Target, batch: TokenBatch, head: Eagle3Head) -> TTTBatch:
    return target.read(batch, head.draft_token_ids, head.t2d)


def _read_features(target: Target, batch: TokenBatch, _head: Eagle1Head) -> FeatureBatch:
    return target.read_last_hidden(batch)


_EAGLE3 = Objective(
    name="eagle3",
    title="EAGLE-3",
    method="eagle3",
    settings=LossSettings(num_steps=7, decay=0.8),
    head_config=HeadConfig.from_target,
    make_head=_make_eagle3,
    initialise=initialise_eagle3,
    read=_read_logits,
    loss=ttt_loss,
)
_EAGLE31 = replace(
    _EAGLE3,
    name="eagle3.1",
    title="EAGLE-3.1",
    head_config=partial(HeadConfig.from_target, fc_norm=True, norm_output=True),
)
# The ablation of EAGLE-3's table 2: no loss on the features, but those of one layer only.
_EAGLE3_TOP = replace(
    _EAGLE3, name="eagle3-top", title="EAGLE-3 without fusion", head_config=_top_layer
)
_EAGLE1 = Objective(
    name="eagle1",
    title="EAGLE-1",
    method="eagle",
    settings=LossSettings(num_steps=1, decay=0.0, token_weight=0.1, feature_noise=0.1),
    head_config=_last_hidden,
    make_head=_make_eagle1,
    initialise=initialise_eagle1,
    read=_read_features,
    loss=aligned_loss,
)
_HASS = replace(
    _EAGLE1,
    name="hass",
    title="HASS",
    settings=replace(_EAGLE1.settings, num_steps=3, decay=1.0, top_k=10, top_k_weight=1.0),
)

OBJECTIVES: Mapping[str, Objective] = MappingProxyType(
    {o.name: o for o in (_EAGLE3, _EAGLE31, _EAGLE3_TOP, _EAGLE1, _HASS)}
)
