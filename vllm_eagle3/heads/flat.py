"""The flat format, which vLLM and SGLang load: one config, tensors named ``midlayer.*``."""

import re
from typing import Any

from vllm_eagle3.heads.checkpoint import CONVENTIONS_KEY, OUR_CONVENTIONS
from vllm_eagle3.heads.conventions import LAYER_IDS
from vllm_eagle3.heads.description import HeadDescription
from vllm_eagle3.heads.target import TargetShape

# Of the decoder layer's model type: the name that vLLM knows (the first one SGLang, too).
ARCHITECTURES = {"llama": "LlamaForCausalLMEagle3", "qwen3": "Eagle3Qwen3ForCausalLM"}
# Of the checkpoint that was read, not of the head: written anew or not at all.
_BOOKKEEPING = (
    "_name_or_path",
    "architectures",
    "auto_map",
    "draft_vocab_size",
    "dtype",
    "eagle_config",
    "fc_norm",
    LAYER_IDS,
    "model_type",
    "norm_before_fc",
    "norm_before_residual",
    "norm_output",
    "rope_parameters",
    "target_hidden_size",
    "torch_dtype",
    "transformers_version",
)
_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


def layer_config(head: HeadDescription) -> dict[str, Any]:
    """The settings of the decoder layer, with every value that served engines would guess.

    Raises:
        ValueError: the rotary base cannot be told, or vLLM has no such layer.
    """
    stored = head.checkpoint.model_config
    config = {key: value for key, value in stored.items() if key not in _BOOKKEEPING}
    scaling = {
        key: value
        for key, value in (stored.get("rope_parameters") or {}).items()
        if key != "rope_theta"
    }
    if scaling.get("rope_type", "default") != "default":
        config["rope_scaling"] = scaling
    if head.num_captured != 3:  # vLLM's default, whatever the ids
        config["num_aux_hidden_states"] = head.num_captured
    config |= {
        "hidden_size": head.hidden_size,
        "vocab_size": head.vocab_size,
        "num_hidden_layers": head.num_layers,
        "num_key_value_heads": head.num_kv_heads,
        "head_dim": _head_dim(head),
        "rope_theta": head.rotary.require("the rotary base"),
        "tie_word_embeddings": False,
    }
    return {"model_type": _model_type(head), **dict(sorted(config.items()))}


def flat_config(head: HeadDescription, target: TargetShape) -> dict[str, Any]:
    """``config.json`` of a flat head.

    vLLM takes layer ids for layers entered, SGLang for layers left, so the ids are left out
    where they are the default that both take: only then the same files serve in both.

    Raises:
        ValueError: a convention cannot be told; the message names the option.
    """
    entered = captured_layers(head)
    captured = {} if entered == target.default_layers else {LAYER_IDS: list(entered)}
    layer = layer_config(head)
    config = {
        "architectures": [ARCHITECTURES[layer["model_type"]]],
        **layer,
        "torch_dtype": torch_dtype(head),
        "draft_vocab_size": head.vocabulary.size,
        **{name: True for name, on in norm_flags(head).items() if on},
        **captured,
    }
    if head.target_hidden_size != head.hidden_size:
        config["target_hidden_size"] = head.target_hidden_size
    eagle_config = {CONVENTIONS_KEY: OUR_CONVENTIONS, "use_aux_hidden_state": True, **captured}
    return config | {"eagle_config": eagle_config}


def captured_layers(head: HeadDescription) -> tuple[int, ...]:
    """The layers entered.

    Raises:
        ValueError: the ids' convention cannot be told.
    """
    head.convention.require("what the layer ids count")
    assert head.layers_entered is not None
    return head.layers_entered


def norm_flags(head: HeadDescription) -> dict[str, bool]:
    """The switches of a head's norms as vLLM reads them.

    Raises:
        ValueError: one cannot be told.
    """
    return {
        "fc_norm": head.fc_norm,
        "norm_before_fc": head.norm_before_fc,
        "norm_before_residual": head.norm_before_residual.require("the residual's start"),
        "norm_output": head.norm_output.require("which state is fed back"),
    }


def torch_dtype(head: HeadDescription) -> str:
    """The type of most weights, by torch's name."""
    return _DTYPES.get(head.dtype, head.dtype)


def flat_name(name: str) -> str:
    """A tensor's name in the flat format: the first layer is ``midlayer``."""
    return re.sub(r"^layers\.0\.", "midlayer.", name)


def _model_type(head: HeadDescription) -> str:
    stored = head.checkpoint.model_config.get("model_type", "llama")
    normed = any(name.endswith("self_attn.q_norm.weight") for name in head.checkpoint.entries)
    expected = "qwen3" if normed else "llama"
    if stored != expected:
        raise ValueError(
            f"{head.checkpoint.path}: model_type={stored!r}, but {'a' if normed else 'no'} norm of "
            f"the queries as in {expected!r}: vLLM has EAGLE-3 layers of Llama and Qwen3 only"
        )
    return stored


def _head_dim(head: HeadDescription) -> int:
    checkpoint = head.checkpoint
    stored = checkpoint.model_config.get("head_dim")
    if stored is not None:
        return stored
    query = next(
        entry for name, entry in checkpoint.entries.items() if name.endswith("q_proj.weight")
    )
    return query.shape[0] // (head.num_heads or 1)
