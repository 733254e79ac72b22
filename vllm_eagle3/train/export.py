"""Heads on disk, as vLLM loads them: EAGLE-3's flat format, and EAGLE-1's."""

import json
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from vllm_eagle3.files import replacing, writing
from vllm_eagle3.heads.checkpoint import CONVENTIONS_KEY, OUR_CONVENTIONS, unread_switches
from vllm_eagle3.heads.conventions import LAYER_IDS
from vllm_eagle3.heads.target import default_layers
from vllm_eagle3.train.eagle1 import Eagle1Head
from vllm_eagle3.train.model import DraftHead, Eagle3Head, HeadConfig, captured_layers

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_EAGLE1_ARCHITECTURE = "EagleLlamaForCausalLM"
_EAGLE3_ARCHITECTURE = "LlamaForCausalLMEagle3"
_CONVERT = ": write the head anew with `vllm-eagle3 convert-head`"
_OTHERS = ("norm_before_fc", "norm_before_residual", "rope_scaling")  # not trained here
_RENAMED = {"num_heads": "num_attention_heads", "num_kv_heads": "num_key_value_heads"}


def export(
    head: DraftHead,
    out_dir: Path,
    card: str | None = None,
    dtype: str = "bfloat16",
    num_target_layers: int | None = None,
) -> Path:
    """Write ``config.json``, ``model.safetensors`` and, given a card, ``README.md``.

    All of them are written before the first takes the place of what was there: a full disk
    leaves the head that was.

    Args:
        dtype: of the weights, ``"bfloat16"`` or ``"float32"``.
        num_target_layers: as :func:`checkpoint_config` takes it.

    Raises:
        ValueError: the disk is full or not writable.
    """
    from safetensors.torch import save_file

    out_dir = Path(out_dir)
    with writing(out_dir):
        out_dir.mkdir(parents=True, exist_ok=True)
    weights = {
        name: weight.detach().cpu().contiguous().to(_DTYPES[dtype])
        if weight.is_floating_point()
        else weight.cpu()
        for name, weight in head.state_dict().items()
    }
    scaled = head.fc.weight.detach() * head.feature_scale_F
    weights["fc.weight"] = scaled.cpu().to(_DTYPES[dtype])
    if isinstance(head, Eagle1Head):
        del weights["d2t"], weights["t2d"]  # the vocabulary is the target's
        config = eagle1_config(head.config, dtype)
    else:
        config = checkpoint_config(head.config, dtype, num_target_layers)
    with ExitStack() as files:

        def scratch(name: str) -> Path:
            return files.enter_context(replacing(out_dir / name))

        save_file(weights, scratch("model.safetensors"), metadata={"format": "pt"})
        scratch("config.json").write_text(json.dumps(config, indent=2) + "\n")
        if card is not None:
            scratch("README.md").write_text(card)
    return out_dir


def checkpoint_config(
    config: HeadConfig, dtype: str, num_target_layers: int | None = None
) -> dict[str, Any]:
    """The ``config.json`` of an EAGLE-3 head.

    Args:
        num_target_layers: given, the layer ids are left out where they are the default of every
            engine (2, L//2, L-3): vLLM counts ids as the layer entered, SGLang as the layer left,
            so only a head without ids serves in both.
    """
    captured: dict[str, Any] = {}
    if num_target_layers is None or config.aux_layer_ids != default_layers(num_target_layers):
        # vLLM's runner looks for them at the top, its head for their number in eagle_config.
        captured = {LAYER_IDS: list(config.aux_layer_ids)}
    return {
        "architectures": [_EAGLE3_ARCHITECTURE],
        "draft_vocab_size": config.draft_vocab_size,
        **_layer_config(config, dtype),
        # EAGLE-3.1, as vLLM reads it: SpecForge gives norm_output another meaning.
        **{name: True for name in ("fc_norm", "norm_output") if getattr(config, name)},
        **captured,
        "eagle_config": {
            CONVENTIONS_KEY: OUR_CONVENTIONS,
            **captured,
            "use_aux_hidden_state": True,
        },
    }


def eagle1_config(config: HeadConfig, dtype: str) -> dict[str, Any]:
    """The ``config.json`` of an EAGLE-1 head."""
    return {
        "architectures": [_EAGLE1_ARCHITECTURE],
        **_layer_config(config, dtype),
        "eagle_config": {CONVENTIONS_KEY: OUR_CONVENTIONS},
    }


def _layer_config(config: HeadConfig, dtype: str) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "vocab_size": config.vocab_size,
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
    }


def load_head(
    path: Path,
    embedding: torch.Tensor,
    output_matrix: torch.Tensor | None = None,
    num_target_layers: int | None = None,
) -> DraftHead:
    """Read a head of the layouts that :func:`export` writes, as vLLM reads it, in float32.

    Args:
        embedding, output_matrix: the target's, [vocab, H]; an EAGLE-1 head needs both.
        num_target_layers: given, the captured layers are those that vLLM's runner captures: the
            ids at the top of the config, else 2, L//2, L-3, whatever ``eagle_config`` says.

    Returns:
        An ``Eagle3Head`` or an ``Eagle1Head``.

    Raises:
        ValueError: a file is missing, the head is for another hidden size or vocabulary, or it
            has parts that these two do not have.
    """
    from safetensors.torch import load_file

    path = Path(path)
    if not (path / "config.json").is_file() or not (path / "model.safetensors").is_file():
        raise ValueError(f"{path} is not a head: it needs config.json and model.safetensors")
    stored = json.loads((path / "config.json").read_text())
    if absent := {"architectures", "vocab_size", "hidden_size"} - stored.keys():
        raise ValueError(f"{path}: config.json has no {', '.join(sorted(absent))}{_CONVERT}")
    expected = (stored["vocab_size"], stored["hidden_size"])
    if expected != tuple(embedding.shape):
        raise ValueError(
            f"the head {path} is for a target with (vocabulary, hidden size) {expected}, this "
            f"target has {tuple(embedding.shape)}"
        )
    weights = {
        name: weight.float() if weight.is_floating_point() else weight
        for name, weight in load_file(path / "model.safetensors").items()
    }
    nested = stored.get("eagle_config") or {}
    if stored["architectures"] == [_EAGLE1_ARCHITECTURE]:
        if output_matrix is None:
            raise ValueError(f"{path} is an EAGLE-1 head: it needs the target's output matrix")
        head = Eagle1Head(_head_config(path, stored, ()), embedding, output_matrix)
    else:
        if num_target_layers is None:
            layers = stored.get(LAYER_IDS) or nested.get(LAYER_IDS)
        else:
            layers = stored.get(LAYER_IDS) or captured_layers(num_target_layers)
        if not layers:
            raise ValueError(
                f"{path}: config.json does not name the layers that the head captures, and without "
                "num_target_layers the default is not known"
            )
        num_drafted = len(weights.get("lm_head.weight", ()))
        offsets = weights.get("d2t", torch.zeros(num_drafted, dtype=torch.int64))
        ids = offsets + torch.arange(num_drafted)
        head = Eagle3Head(_head_config(path, stored, tuple(layers)), embedding, ids)
    _check_parts(path, stored, weights, head.state_dict())
    head.load_state_dict({"d2t": head.d2t, "t2d": head.t2d} | weights)
    return head


def _check_parts(
    path: Path,
    config: dict[str, Any],
    found: dict[str, torch.Tensor],
    known: dict[str, torch.Tensor],
) -> None:
    """Refuse what would be computed differently from what vLLM does with the same files."""
    nested = config.get("eagle_config") or {}
    wrong = [
        f"{name} stands in eagle_config, where vLLM does not look{_CONVERT}"
        for name in unread_switches(config)
    ]
    switches = {"norm_before_fc": nested.get("norm_before_fc", config.get("norm_before_fc"))}
    wrong += [f"{name} not known" for name in _OTHERS if (config | switches).get(name)]
    wrong += [f"{name} not known" for name in sorted(found.keys() - known.keys())]
    wrong += [f"{name} missing" for name in sorted(known.keys() - found.keys() - {"d2t", "t2d"})]
    wrong += [
        f"{name} of shape {tuple(found[name].shape)}, not {tuple(tensor.shape)}"
        for name, tensor in known.items()
        if name in found and found[name].shape != tensor.shape
    ]
    if wrong:
        raise ValueError(f"{path} is no head that PyTorch can draft with here: {', '.join(wrong)}")


def _head_config(path: Path, stored: dict[str, Any], aux_layer_ids: tuple[int, ...]) -> HeadConfig:
    sizes = {"draft_vocab_size": stored["vocab_size"]}
    for field in fields(HeadConfig):
        key = _RENAMED.get(field.name, field.name)
        if key in stored:
            sizes[field.name] = stored[key]
    sizes["aux_layer_ids"] = aux_layer_ids
    try:
        return HeadConfig(**sizes)
    except TypeError as error:  # it names what is missing
        raise ValueError(f"{path}: config.json is not whole ({error}){_CONVERT}") from error
