"""The training objectives: heads, and the losses that train them.

``OBJECTIVES`` maps the names of ``vllm-eagle3 train --objective`` to what the loop needs:

    objective = OBJECTIVES["eagle3"]
    config = objective.head_config(target_model.config, draft_vocab_size)
    target = Target(target_model, config.aux_layer_ids)
    ids, coverage = frequent_tokens(counts, config.draft_vocab_size, ...)
    head = objective.make_head(config, target, ids)
    objective.initialise(head, target, objective.read(target, token_batch, head))
    result = objective.loss(head, objective.read(target, token_batch, head), settings)

``config.draft_vocab_size`` is the whole vocabulary where the target's own output matrix is
used, whatever was asked for. ``settings`` starts from ``objective.settings``, the paper's.
"""

from vllm_eagle3.train.objectives.registry import OBJECTIVES, Objective
from vllm_eagle3.train.objectives.result import LossResult, LossSettings

__all__ = ["OBJECTIVES", "LossResult", "LossSettings", "Objective"]
