"""Drafting along a text by brute force: every path drafted by itself."""

import math

import torch

from tests.train import small
from vllm_eagle3.config import TreeConfig
from vllm_eagle3.train.features import Target
from vllm_eagle3.train.model import Eagle3Head


def draft(head: Eagle3Head, target: Target, tokens: list[int], root: int, path: list[int]):
    """Log-probabilities over the target's vocabulary after tokens[..root] and a path."""
    known = torch.tensor([tokens[: root + 1]])
    states = target.model.model(known, output_hidden_states=True).hidden_states
    features = torch.cat([states[i] for i in head.config.aux_layer_ids], -1)[:, :root]
    keys, values = [], []

    def attend(q, k, v):
        keys.append(k)
        values.append(v)
        causal = q.shape[2] > 1 or len(keys) == 1
        return torch.nn.functional.scaled_dot_product_attention(
            q, torch.cat(keys, 2), torch.cat(values, 2), is_causal=causal
        )

    out = head.step(known[:, 1:], head.fuse(features), torch.arange(root)[None], attend)
    for number, token in enumerate(path):
        out = head.step(
            torch.tensor([[token]]),
            head.feedback(out[:, -1:]),
            torch.tensor([[root + number]]),
            attend,
        )
    log_probs = torch.full((small.VOCABULARY,), -math.inf, dtype=out.dtype)
    log_probs[head.draft_token_ids] = head.lm_head(head.norm(out[0, -1])).log_softmax(-1)
    return log_probs


def tree_of_paths(head, target, tokens, root, config: TreeConfig) -> list[list[int]]:
    """The paths from the root to each node of the dynamic tree."""
    pool, frontier = [], [(0.0, [])]
    for _ in range(config.depth):
        offered = []
        for score, path in frontier:
            log_probs, children = draft(head, target, tokens, root, path).topk(config.top_k)
            scored = zip(log_probs.tolist(), children.tolist(), strict=True)
            offered += [(score + gain, [*path, child]) for gain, child in scored]
        pool += offered
        frontier = sorted(offered, key=lambda node: -node[0])[: config.top_k]
    return [path for _, path in sorted(pool, key=lambda n: -n[0])[: config.num_nodes - 1]]


@torch.no_grad()
def steps_of_text(
    head: Eagle3Head, target: Target, tokens: list[int], first: int, config: TreeConfig
) -> list[int]:
    """Tokens that each round emits of a text whose answer begins at ``first``, to its end."""
    steps, root = [], first
    while root < len(tokens) - 1:
        paths = tree_of_paths(head, target, tokens, root, config)
        fitting = [len(p) for p in paths if p == tokens[root + 1 : root + 1 + len(p)]]
        # The text's last token has none after it.
        steps.append(min(max(fitting, default=0) + 1, len(tokens) - root - 1))
        root += steps[-1]
    return steps
