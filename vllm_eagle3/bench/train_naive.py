"""EAGLE-3's training-time test as a short Hugging Face loop: what ``bench train`` compares with.

The same head, weights, optimiser and precision as :mod:`vllm_eagle3.train`, and the same loss on
the same documents, written the way one would without a thought of cost:

    target     all hidden states and all logits of ``LlamaForCausalLM``, documents in random
               order, padded to the longest of their batch, with an attention mask
    attention  the keys of all draft steps side by side, under a mask of T x (k+1) T
    loss       the draft's and the target's logits of every slot in float32, for all draft
               steps, until the backward pass

Shape suffixes: B documents of a batch, T slots, N heads, D head dimension, V draft vocabulary.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F

from vllm_eagle3.corpus import Document
from vllm_eagle3.train.learner import Learner
from vllm_eagle3.train.norms import restore_norms
from vllm_eagle3.train.objectives import LossSettings


def steps(
    learner: Learner, documents: Sequence[Document], rows: int, max_length: int, batch_tokens: int
) -> Iterator[tuple[int, list[int]]]:
    """Optimiser steps without end, each over ``batch_tokens`` tokens of documents or a few more.

    Args:
        rows: documents of a forward pass; their gradients add up.

    Yields:
        tokens of the assistant, and the slots of each forward, padding included.
    """
    # What a model without this package has: Transformers' own attention and norms.
    learner.target.model.set_attn_implementation("sdpa")
    restore_norms(learner.target.model)
    batches = _batches(documents, rows, max_length)
    while True:
        parts, read = [], 0
        while read < batch_tokens:
            parts.append(next(batches))
            read += int(parts[-1][1].sum())
        roots = [num_roots(assistant_BT) for _, _, assistant_BT in parts]
        for part, count in zip(parts, roots, strict=True):
            tensors = [tensor.to(learner.device) for tensor in part]
            with torch.autocast(learner.device.type, learner.dtype, learner.dtype != torch.float32):
                part_loss = loss(learner, *tensors, learner.settings)
            (part_loss * count / sum(roots)).backward()
        torch.nn.utils.clip_grad_norm_(learner.head.parameters(), learner.config.clip)
        learner.optimizer.step()
        learner.optimizer.zero_grad()
        yield (
            sum(int(assistant_BT.sum()) for _, _, assistant_BT in parts),
            [tokens_BT.numel() for tokens_BT, _, _ in parts],
        )


def loss(
    learner: Learner,
    tokens_BT: torch.Tensor,
    mask_BT: torch.Tensor,
    assistant_BT: torch.Tensor,
    settings: LossSettings,
) -> torch.Tensor:
    """The sum over draft steps of decay^k times the slots' cross-entropies, over the roots.

    Args:
        mask_BT: bool, True for tokens of a document.
        assistant_BT: bool, tokens that the assistant wrote.
    """
    head, model = learner.head, learner.target.model
    with torch.no_grad():
        output = model(
            input_ids=tokens_BT, attention_mask=mask_BT.long(), output_hidden_states=True
        )
    features = torch.cat([output.hidden_states[i] for i in learner.target.aux_layer_ids], -1)
    target_BTV = output.logits[..., head.draft_token_ids].float().softmax(-1)
    covered_BT = head.t2d[output.logits.argmax(-1)]
    positions_1T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device).unsqueeze(0)
    attend, hidden = _Attention(), head.fuse(features)
    prepared = head.prepared(hidden.dtype)
    total = torch.zeros((), device=tokens_BT.device)
    for step in range(settings.num_steps):
        tokens = _later(tokens_BT, 1 + step)
        out = head.step(tokens, hidden, positions_1T + step, attend, prepared)
        hidden = head.feedback(out)
        log_q_BTV = head.logits(out).float().log_softmax(-1)
        counted_BT = _later(assistant_BT, 1) & _later(assistant_BT, 2 + step)
        counted_BT &= _later(covered_BT, 1 + step)
        losses_BT = -(_later(target_BTV, 1 + step) * log_q_BTV).sum(-1)
        total = total + settings.decay**step * (losses_BT * counted_BT).sum()
    return total / num_roots(assistant_BT)


def num_roots(assistant_BT: torch.Tensor) -> int:
    """Slots whose root and first predicted token are the assistant's; at least 1."""
    return max(1, int((assistant_BT[:, 1:-1] & assistant_BT[:, 2:]).sum()))


def _later(x: torch.Tensor, by: int) -> torch.Tensor:
    """x[:, t + by] at slot t, zeros behind the end."""
    return F.pad(x[:, by:], (0, 0) * (x.dim() - 2) + (0, min(by, x.shape[1])))


class _Attention:
    """All keys of earlier steps side by side, under one mask."""

    def __init__(self) -> None:
        self._keys: list[torch.Tensor] = []
        self._values: list[torch.Tensor] = []

    def __call__(self, q_BNTD, k_BNTD, v_BNTD) -> torch.Tensor:
        self._keys.append(k_BNTD)
        self._values.append(v_BNTD)
        T, later = q_BNTD.shape[2], len(self._keys) - 1
        causal_TT = torch.ones(T, T, dtype=torch.bool, device=q_BNTD.device).tril()
        own_TT = torch.eye(T, dtype=torch.bool, device=q_BNTD.device)
        mask = torch.cat([causal_TT, *[own_TT] * later], 1)
        keys, values = torch.cat(self._keys, 2), torch.cat(self._values, 2)
        return F.scaled_dot_product_attention(q_BNTD, keys, values, mask)


def _batches(
    documents: Sequence[Document], rows: int, max_length: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Tokens, mask and assistant, each [B, T]; epoch after epoch, shuffled anew."""
    rng = np.random.default_rng(0)
    while True:
        order = rng.permutation(len(documents))
        for start in range(0, len(order), rows):
            chosen = [documents[i] for i in order[start : start + rows]]
            columns = [
                [np.array(array[:max_length]) for array in arrays]
                for arrays in (
                    [d.tokens.astype(np.int64) for d in chosen],
                    [np.ones(len(d.tokens), bool) for d in chosen],
                    [d.assistant for d in chosen],
                )
            ]
            yield tuple(
                torch.nn.utils.rnn.pad_sequence(list(map(torch.from_numpy, column)), True)
                for column in columns
            )
