"""Heads on disk: the flat checkpoint that vLLM and SGLang load."""

import json
from pathlib import Path
from typing import Any

import torch

from vllm_eagle3.corpus import write_json
from vllm_eagle3.train.model import Eagle3Head, HeadConfig

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def export(
    head: Eagle3Head, out_dir: Path, card: str | None = None, dtype: str = "bfloat16"
) -> Path:
    """Write ``config.json``, ``model.safetensors`` and, given a card, ``README.md``.

    Args:
        dtype: of the weights, ``"bfloat16"`` or ``"float32"``.
    """
    from safetensors.torch import save_file

    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    weights = {
        name: weight.detach().cpu().contiguous().to(_DTYPES[dtype])
        if weight.is_floating_point()
        else weight.cpu()
        for name, weight in head.state_dict().items()
    }
    scaled = head.fc.weight.detach() * head.feature_scale_F
    weights["fc.weight"] = scaled.cpu().to(_DTYPES[dtype])
    save_file(weights, out_dir / "model.safetensors", metadata={"format": "pt"})
    write_json(out_dir / "config.json", checkpoint_config(head.config, dtype))
    if card is not None:
        (out_dir / "README.md").write_text(card)
    return out_dir


def checkpoint_config(config: HeadConfig, dtype: str) -> dict[str, Any]:
    """The ``config.json`` of a head."""
    return {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "draft_vocab_size": config.draft_vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": 1,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        # Counted as the layer entered, which is how vLLM reads it.
        "eagle_config": {
            "eagle_aux_hidden_state_layer_ids": list(config.aux_layer_ids),
            "use_aux_hidden_state": True,
        },
    }


def load_head(path: Path, embedding: torch.Tensor) -> Eagle3Head:
    """Read a checkpoint written by :func:`export`, in float32.

    Raises:
        ValueError: a file is missing, or the head is for another hidden size or vocabulary.
    """
    from safetensors.torch import load_file

    path = Path(path)
    if not (path / "config.json").is_file() or not (path / "model.safetensors").is_file():
        raise ValueError(f"{path} is not a head: it needs config.json and model.safetensors")
    stored = json.loads((path / "config.json").read_text())
    expected = (stored["vocab_size"], stored["hidden_size"])
    if expected != tuple(embedding.shape):
        raise ValueError(
            f"the head {path} is for a target with (vocabulary, hidden size) {expected}, this "
            f"target has {tuple(embedding.shape)}"
        )
    weights = load_file(path / "model.safetensors")
    ids = weights["d2t"] + torch.arange(len(weights["d2t"]))
    config = HeadConfig(
        **{
            key: stored[key]
            for key in HeadConfig.__dataclass_fields__
            if key not in ("num_heads", "num_kv_heads", "aux_layer_ids")
        },
        num_heads=stored["num_attention_heads"],
        num_kv_heads=stored["num_key_value_heads"],
        aux_layer_ids=tuple(stored["eagle_config"]["eagle_aux_hidden_state_layer_ids"]),
    )
    head = Eagle3Head(config, embedding, ids)
    head.load_state_dict({n: w.float() if w.is_floating_point() else w for n, w in weights.items()})
    return head
