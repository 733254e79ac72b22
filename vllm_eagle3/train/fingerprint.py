"""What a run was trained on, in a few bytes: a state is resumed with the same data and target."""

import hashlib
import json
from collections.abc import Sequence

import torch

from vllm_eagle3.corpus import Document
from vllm_eagle3.train.features import Target

_CHUNK_ROWS = 4096
_CONFIG = (
    *("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "rms_norm_eps", "rope_parameters"),
)


def of_documents(documents: Sequence[Document]) -> str:
    """Their number, their tokens and a hash of both arrays, in order."""
    digest = hashlib.blake2b(digest_size=16)
    num_tokens = 0
    for document in documents:
        num_tokens += len(document.tokens)
        digest.update(len(document.tokens).to_bytes(8, "little"))
        digest.update(document.tokens.astype("<i4").tobytes())
        digest.update(document.assistant.astype(bool).tobytes())
    return f"{len(documents)} documents, {num_tokens} tokens, {digest.hexdigest()}"


def of_target(target: Target) -> str:
    """A hash of its shape, its embedding, its final norm and its output matrix.

    The weights count as bfloat16, so that it is the same on a CPU, which reads them in float32.
    The layers between are left out: they may be spread over processes.
    """
    shape = {name: getattr(target.config, name, None) for name in _CONFIG}
    digest = hashlib.blake2b(json.dumps(shape, sort_keys=True).encode(), digest_size=16)
    for weight in (target.embedding, target.final_norm, target.output_matrix):
        for rows in weight.detach().split(_CHUNK_ROWS):
            digest.update(rows.to(torch.bfloat16).view(torch.int16).cpu().contiguous().numpy())
    return digest.hexdigest()
