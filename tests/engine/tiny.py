"""A tiny Llama with random weights and a tokenizer, and a random EAGLE-3 head for it.

Random, so that nothing in a test depends on a download; sharp (large weights), so that the
text depends on every position of the cache and greedy choices are far from ties.
"""

import itertools
import json
import string
from dataclasses import dataclass
from pathlib import Path

import torch

HIDDEN = 128
HEADS = 4
KV_HEADS = 2
HEAD_DIM = 32
MLP = 192
LAYERS = 8
VOCABULARY = 512
MAX_POSITIONS = 512


@dataclass(frozen=True)
class Pair:
    """Directories of a target and of its head."""

    target: Path
    head: Path


def write_pair(root: Path, vocab_size: int = VOCABULARY, draft_vocab_size: int = 256) -> Pair:
    """Write ``root/target`` and ``root/head``, the same on every machine."""
    return Pair(
        write_target(root / "target", vocab_size),
        write_head(root / "head", vocab_size, draft_vocab_size),
    )


def write_target(path: Path, vocab_size: int = VOCABULARY) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=HIDDEN,
        intermediate_size=MLP,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=MAX_POSITIONS,
        initializer_range=0.12,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).float().save_pretrained(path)
    if vocab_size >= VOCABULARY:
        write_tokenizer(path, vocab_size)
    return path


def write_tokenizer(path: Path, vocab_size: int) -> None:
    """Bytes, and pairs of letters up to ``vocab_size``; a bare chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>"]
    pieces = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = list(itertools.product(string.ascii_lowercase, repeat=2))[: vocab_size - len(pieces)]
    vocabulary = pieces + [first + second for first, second in pairs]
    bpe = models.BPE({piece: i for i, piece in enumerate(vocabulary)}, pairs)
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=special[0], bos_token=special[1], eos_token=special[2]
    )
    fast.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    fast.save_pretrained(path)


def head_tensors(
    vocab_size: int = VOCABULARY, draft_vocab_size: int = 256, hidden_size: int = HIDDEN
) -> dict[str, torch.Tensor]:
    """The tensors of an EAGLE-3 checkpoint; every second token is in the draft vocabulary."""
    generator = torch.Generator().manual_seed(1)

    def weight(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) * 0.12

    def norm() -> torch.Tensor:
        return 1 + 0.2 * torch.randn(hidden_size, generator=generator)

    stride = vocab_size // draft_vocab_size
    drafted = torch.zeros(vocab_size, dtype=torch.bool)
    drafted[: draft_vocab_size * stride : stride] = True
    layer = "midlayer"
    return {
        "fc.weight": weight(hidden_size, 3 * hidden_size),
        f"{layer}.self_attn.q_proj.weight": weight(HEADS * HEAD_DIM, 2 * hidden_size),
        f"{layer}.self_attn.k_proj.weight": weight(KV_HEADS * HEAD_DIM, 2 * hidden_size),
        f"{layer}.self_attn.v_proj.weight": weight(KV_HEADS * HEAD_DIM, 2 * hidden_size),
        f"{layer}.self_attn.o_proj.weight": weight(hidden_size, HEADS * HEAD_DIM),
        f"{layer}.mlp.gate_proj.weight": weight(MLP, hidden_size),
        f"{layer}.mlp.up_proj.weight": weight(MLP, hidden_size),
        f"{layer}.mlp.down_proj.weight": weight(hidden_size, MLP),
        f"{layer}.hidden_norm.weight": norm(),
        f"{layer}.input_layernorm.weight": norm(),
        f"{layer}.post_attention_layernorm.weight": norm(),
        "norm.weight": norm(),
        "lm_head.weight": weight(draft_vocab_size, hidden_size),
        "d2t": drafted.nonzero()[:, 0] - torch.arange(draft_vocab_size),
        "t2d": drafted,
    }


def head_config(
    vocab_size: int = VOCABULARY, draft_vocab_size: int = 256, hidden_size: int = HIDDEN
) -> dict[str, object]:
    """The ``config.json`` of an EAGLE-3 checkpoint."""
    return {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "draft_vocab_size": draft_vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": MLP,
        "num_hidden_layers": 1,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": MAX_POSITIONS,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def write_head(
    path: Path,
    vocab_size: int = VOCABULARY,
    draft_vocab_size: int = 256,
    tensors: dict[str, torch.Tensor] | None = None,
) -> Path:
    """Write a head; ``tensors`` in place of its own make a broken one."""
    from safetensors.torch import save_file

    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(head_config(vocab_size, draft_vocab_size)))
    save_file(tensors or head_tensors(vocab_size, draft_vocab_size), path / "model.safetensors")
    return path
