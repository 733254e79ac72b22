"""A small random target and its EAGLE-3 head, and both widened."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.bench.chat import write_tokenizer
from tests.train.small import llama
from vllm_eagle3.bench import widen_writer
from vllm_eagle3.bench.llama_shape import LlamaShape
from vllm_eagle3.bench.widen import widen
from vllm_eagle3.bench.widen_writer import Written
from vllm_eagle3.train.export import export
from vllm_eagle3.train.model import Eagle3Head, HeadConfig

# As SmolLM2 in Llama-3.1-8B: RMSNorm's factor is 3/8, groups of three heads go into groups of
# four, a head's dimension doubles, and there are two more layers.
VOCABULARY, H = 320, 72
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": H,
    "intermediate_size": 96,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-3,  # large enough to show
}
WIDE = LlamaShape(
    hidden_size=512,
    num_layers=10,
    num_heads=16,
    num_kv_heads=4,
    head_dim=32,
    intermediate_size=256,
)
CAPTURED = (2, 4, 5)


class Pair(NamedTuple):
    target: Path
    head: Path


class Pairs(NamedTuple):
    small: Pair
    wide: Pair
    written: tuple[Written, Written]


def random_weights(module: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for weight in module.parameters():
        noise = torch.randn(weight.shape, generator=generator)
        weight.data.copy_(1 + 0.3 * noise if weight.dim() == 1 else 0.2 * noise)


def make_small(path: Path, eagle31: bool = False, **changes: Any) -> Pair:
    model = llama(**SMALL | changes)
    random_weights(model, 1)
    model.save_pretrained(path / "small")
    write_tokenizer(path / "small", VOCABULARY)
    ids = torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(2))[:100]
    embedding = model.get_input_embeddings().weight.detach()
    norms = {"fc_norm": eagle31, "norm_output": eagle31}
    config = HeadConfig.from_target(model.config, 100, **norms)
    head = Eagle3Head(config, embedding, ids.sort().values)
    random_weights(head, 3)
    return Pair(path / "small", export(head, path / "small-head", dtype="float32"))


def make_pairs(path: Path, **changes: Any) -> Pairs:
    """In float32, two layers to a file."""
    small = make_small(path, **changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(widen_writer, "_FILE_BYTES", 9 << 20)
        written = widen(*small, path / "wide", WIDE, "float32")
    return Pairs(small, Pair(*(made.path for made in written)), written)


def model_of(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()


class States(NamedTuple):
    """What a target computes, in float64: logits, the stream before each layer, embedding."""

    logits: torch.Tensor
    hidden: tuple[torch.Tensor, ...]
    embedding: torch.Tensor


@torch.no_grad()
def states(path: Path, tokens: torch.Tensor, dtype: torch.dtype = torch.float32) -> States:
    model = model_of(path, dtype)
    out = model(tokens, output_hidden_states=True)
    hidden = tuple(state.double() for state in out.hidden_states)
    return States(out.logits.double(), hidden, model.get_input_embeddings().weight.double())


def error(value: torch.Tensor, expected: torch.Tensor) -> float:
    """Root mean square of the difference, relative to that of what is expected."""
    return float((value - expected).norm() / expected.norm())
