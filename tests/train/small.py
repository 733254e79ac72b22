"""A small random target and head, and documents for them."""

from typing import Any

import numpy as np
import torch

from vllm_eagle3.corpus import Document
from vllm_eagle3.train.features import Target
from vllm_eagle3.train.model import Eagle3Head
from vllm_eagle3.train.objectives import OBJECTIVES, Objective

VOCABULARY = 96
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def llama(**changes: object) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "rope_theta": 20000.0,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**settings | changes)).eval()


def pair(dtype: torch.dtype, draft_vocab_size: int = 64) -> tuple[Target, Eagle3Head]:
    return head_for(OBJECTIVES["eagle3"], dtype, draft_vocab_size)


def head_for(
    objective: Objective, dtype: torch.dtype, draft_vocab_size: int = 64
) -> tuple[Target, Any]:
    """A target and a random head, every weight of which matters."""
    model = llama().to(dtype)
    config = objective.head_config(model.config, draft_vocab_size)
    target = Target(model, config.aux_layer_ids)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randperm(VOCABULARY, generator=generator)[: config.draft_vocab_size].sort().values
    head = objective.make_head(config, target, ids).to(dtype)
    with torch.no_grad():
        for weight in head.parameters():
            noise = torch.randn(weight.shape, generator=generator, dtype=dtype)
            weight.copy_(1 + 0.3 * noise if weight.dim() == 1 else 0.2 * noise)
        head.feature_scale_F.uniform_(0.5, 1.5, generator=generator)
    return target, head


def documents(count: int, longest: int = 40) -> list[Document]:
    """Prompts of 2 to 5 random tokens and answers that count upwards from the last one."""
    rng = np.random.default_rng(0)
    made = []
    for _ in range(count):
        prompt = rng.integers(3, VOCABULARY, rng.integers(2, 6))
        answer = (prompt[-1] - 3 + np.arange(1, rng.integers(4, longest))) % (VOCABULARY - 3) + 3
        tokens = np.concatenate([prompt, answer])
        made.append(Document(tokens, np.arange(len(tokens)) >= len(prompt)))
    return made
