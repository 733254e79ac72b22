"""Heads without a cache: the whole text and path again for every node of a tree."""

import pathlib
from typing import Any, NamedTuple

import torch

from tests.engine import tiny
from tests.engine.engines import Tokens
from tests.tree import naive
from vllm_eagle3.paths import Path, Paths
from vllm_eagle3.train.data import TokenBatch
from vllm_eagle3.train.export import export, load_head
from vllm_eagle3.train.features import Target, load_target
from vllm_eagle3.train.model import DraftHead
from vllm_eagle3.train.objectives import OBJECTIVES, Objective
from vllm_eagle3.tree import mask
from vllm_eagle3.tree.rerank import rerank
from vllm_eagle3.tree.types import DraftTree

DRAFTED = 256


class NaiveHead:
    """A head of any kind and its target, in PyTorch."""

    def __init__(self, target: Target, head: DraftHead) -> None:
        self.target, self.head = target, head

    @torch.inference_mode()
    def log_probs(self, text: Tokens, path: Tokens) -> torch.Tensor:
        """Over the target's vocabulary, of the token that follows ``text + path``."""
        known = torch.tensor([text])
        nobody = torch.zeros_like(known, dtype=torch.bool)
        batch = self.target.read(
            TokenBatch(known, nobody), self.head.draft_token_ids, self.head.t2d
        )
        # Slot p takes the state of token p and the embedding of token p + 1.
        states = self.head.fuse(batch.features_BTF[:, :-1])
        tokens = text[1:]
        out = self._run(tokens, states)
        for token in path:
            tokens = (*tokens, token)
            states = torch.cat([states, self.head.feedback(out[:, -1:])], dim=1)
            out = self._run(tokens, states)
        log_probs = torch.full((self.head.config.vocab_size,), -torch.inf)
        log_probs[self.head.draft_token_ids] = self.head.logits(out)[0, -1].log_softmax(-1)
        return log_probs

    def _run(self, tokens: Tokens, states: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(len(tokens))[None]
        return self.head.step(torch.tensor([tokens]), states, positions, _causal)

    def tree(self, text: Tokens, depth: int, top_k: int, num_nodes: int) -> DraftTree:
        """EAGLE-2's tree below the last token of a text, one node at a time."""
        first = self.log_probs(text, ()).topk(top_k)
        levels = [(first.values[None], first.indices[None])]
        pool: list[Tokens] = [(int(token),) for token in first.indices]
        for _ in range(depth - 1):
            expansion = naive.expand(levels)
            paths = [pool[i] for i in expansion.frontier_index_BK[0].tolist()]
            best = [self.log_probs(text, path).topk(top_k) for path in paths]
            levels.append(
                (
                    torch.stack([b.values for b in best])[None],
                    torch.stack([b.indices for b in best])[None],
                )
            )
            pool += [
                (*path, int(token))
                for path, b in zip(paths, best, strict=True)
                for token in b.indices
            ]
        return rerank(naive.expand(levels), num_nodes)

    def static_tree(self, text: Tokens, paths: Paths) -> DraftTree:
        """The children of these ranks, one node at a time."""
        nodes: dict[Path, int] = {(): 0}
        drafted: dict[Path, Tokens] = {(): ()}
        scores: dict[Path, float] = {(): 0.0}
        for path in paths:
            *above, rank = path
            parent = tuple(above)
            best = self.log_probs(text, drafted[parent]).topk(rank + 1)
            drafted[path] = (*drafted[parent], int(best.indices[rank]))
            scores[path] = scores[parent] + float(best.values[rank])
            nodes[path] = len(nodes)
        parents_BN = torch.tensor([[-1, *(nodes[path[:-1]] for path in paths)]], dtype=torch.int32)
        return DraftTree(
            tokens_BN=torch.tensor([[0, *(drafted[path][-1] for path in paths)]]),
            parents_BN=parents_BN,
            depths_BN=mask.depths(parents_BN),
            ancestor_bits_BN=mask.ancestor_bits(parents_BN),
            scores_BN=torch.tensor([[0.0, *(scores[path] for path in paths)]]),
        )


def _causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


class ServedHead(NamedTuple):
    """A head on disk, its speculative method, and the same in PyTorch."""

    pair: tiny.Pair
    method: str
    naive: NaiveHead


def served_head(path: pathlib.Path, pair: tiny.Pair, name: str) -> ServedHead:
    """A head of the objective ``name`` for the pair's target, written to ``path``."""
    objective = OBJECTIVES[name]
    naive_head = write_head(path, pair.target, objective)
    return ServedHead(tiny.Pair(pair.target, path), objective.method, naive_head)


def write_head(path: pathlib.Path, target_path: pathlib.Path, objective: Objective) -> NaiveHead:
    """A random head as training with this objective exports it, written to ``path``."""
    model = load_target(target_path, torch.float32)
    config = objective.head_config(model.config, DRAFTED)
    target = Target(model, config.aux_layer_ids)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randperm(tiny.VOCABULARY, generator=generator)[: config.draft_vocab_size]
    head = objective.make_head(config, target, ids.sort().values)
    with torch.no_grad():
        for weight in head.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            # EAGLE-1's states pass from step to step without a norm: they must not grow.
            size = weight.shape[-1] ** -0.5
            weight.copy_(1 + 0.3 * noise if weight.dim() == 1 else size * noise)
        head.feature_scale_F.uniform_(0.5, 1.5, generator=generator)
    export(head, path, dtype="float32")
    return NaiveHead(target, load_head(path, target.embedding, target.output_matrix))


def assert_drafted(fields: dict[str, torch.Tensor], expected: DraftTree) -> None:
    """What an engine drafted, one row of each field, is the one tree of ``expected``."""
    found: dict[str, Any] = dict(fields)
    assert torch.equal(found["tokens_BN"][1:], expected.tokens_BN[0, 1:])
    for name in ("parents_BN", "depths_BN", "ancestor_bits_BN"):
        assert torch.equal(found[name], getattr(expected, name)[0])
    torch.testing.assert_close(found["scores_BN"], expected.scores_BN[0], rtol=1e-4, atol=1e-4)
