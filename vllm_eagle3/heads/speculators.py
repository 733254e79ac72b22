"""The speculators format: the decoder layer's settings nested, tensors named ``layers.0.*``."""

import re
from typing import Any

from vllm_eagle3.heads.conventions import LAYER_IDS
from vllm_eagle3.heads.description import HeadDescription
from vllm_eagle3.heads.flat import captured_layers, layer_config, norm_flags, torch_dtype
from vllm_eagle3.heads.target import TargetShape

_DRAFTS = 5


def speculators_config(head: HeadDescription, target: TargetShape, name: str) -> dict[str, Any]:
    """``config.json`` of a head in the speculators format.

    Args:
        name: of the target, as `vllm serve HEAD` will look for it.

    Raises:
        ValueError: a convention cannot be told, or vLLM has no such layer.
    """
    return {
        "architectures": ["Eagle3DraftModel"],
        "draft_vocab_size": head.vocabulary.size,
        LAYER_IDS: list(captured_layers(head)),
        **norm_flags(head),
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": _DRAFTS}],
            "verifier": {"architectures": list(target.architectures), "name_or_path": name},
        },
        "speculators_model_type": "eagle3",
        "target_hidden_size": head.target_hidden_size,
        "torch_dtype": torch_dtype(head),
        "transformer_layer_config": layer_config(head),
    }


def speculators_name(name: str) -> str:
    """A tensor's name in the speculators format."""
    return re.sub(r"^midlayer\.", "layers.0.", name)
