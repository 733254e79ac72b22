"""Tiny heads in each public layout, and a target of ten layers."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

HIDDEN, HEADS, KV_HEADS, MLP = 16, 4, 2, 24
VOCABULARY, DRAFTED, LAYERS = 64, 16, 10
ENTERED = (2, LAYERS // 2, LAYERS - 3)
LEFT = tuple(layer - 1 for layer in ENTERED)

LAYER = {
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": MLP,
    "num_hidden_layers": 1,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "hidden_act": "silu",
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}


def tensors(layer: str = "midlayer", captured: int = 3) -> dict[str, torch.Tensor]:
    """An EAGLE-3 head's; every fourth token is in the draft vocabulary."""
    generator = torch.Generator().manual_seed(0)

    def weight(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).bfloat16()

    ids = torch.arange(DRAFTED) * 4 + 1
    marks = torch.zeros(VOCABULARY, dtype=torch.bool)
    marks[ids] = True
    head_dim = HIDDEN // HEADS
    return {
        "fc.weight": weight(HIDDEN, captured * HIDDEN),
        f"{layer}.self_attn.q_proj.weight": weight(HIDDEN, 2 * HIDDEN),
        f"{layer}.self_attn.k_proj.weight": weight(KV_HEADS * head_dim, 2 * HIDDEN),
        f"{layer}.self_attn.v_proj.weight": weight(KV_HEADS * head_dim, 2 * HIDDEN),
        f"{layer}.self_attn.o_proj.weight": weight(HIDDEN, HIDDEN),
        f"{layer}.mlp.gate_proj.weight": weight(MLP, HIDDEN),
        f"{layer}.mlp.up_proj.weight": weight(MLP, HIDDEN),
        f"{layer}.mlp.down_proj.weight": weight(HIDDEN, MLP),
        f"{layer}.hidden_norm.weight": weight(HIDDEN),
        f"{layer}.input_layernorm.weight": weight(HIDDEN),
        f"{layer}.post_attention_layernorm.weight": weight(HIDDEN),
        "norm.weight": weight(HIDDEN),
        "lm_head.weight": weight(DRAFTED, HIDDEN),
        "d2t": ids - torch.arange(DRAFTED),
        "t2d": marks,
    }


def write(path: Path, config: dict[str, Any], weights: dict[str, torch.Tensor]) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config))
    save_file(weights, path / "model.safetensors")
    return path


def write_target(path: Path, embedding: torch.Tensor | None = None, **changes: Any) -> Path:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": HIDDEN,
        "vocab_size": VOCABULARY,
        "num_hidden_layers": LAYERS,
        "rope_theta": 500000.0,
    }
    weights = {} if embedding is None else {"model.embed_tokens.weight": embedding}
    return write(path, config | changes, weights)


def flat(ids: tuple[int, ...] | None = None, **changes: Any) -> dict[str, Any]:
    """The config that SpecForge writes."""
    config = {
        "architectures": ["LlamaForCausalLMEagle3"],
        **LAYER,
        "draft_vocab_size": DRAFTED,
        "rope_theta": 500000.0,
    }
    if ids is not None:
        config["eagle_config"] = {"eagle_aux_hidden_state_layer_ids": list(ids)}
    return config | changes


def eagle_repository(**changes: Any) -> dict[str, Any]:
    """The config that the EAGLE repository's trainer reads: no base, the target's name."""
    return {
        "architectures": ["LlamaForCausalLM"],
        **LAYER,
        "draft_vocab_size": DRAFTED,
        **changes,
    }


def speculators(**changes: Any) -> dict[str, Any]:
    return {
        "architectures": ["Eagle3DraftModel"],
        "speculators_model_type": "eagle3",
        "speculators_config": {},
        "transformer_layer_config": LAYER
        | {"rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"}},
        "draft_vocab_size": DRAFTED,
        "norm_before_residual": False,
        "eagle_aux_hidden_state_layer_ids": list(ENTERED),
        **changes,
    }


def read(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    config = json.loads((path / "config.json").read_text())
    return config, load_file(path / "model.safetensors")


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """The same names, types and bits."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].equal(tensor), name
