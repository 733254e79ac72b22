"""Drafts of oracle quality: random trees that hide tokens the target is known to emit.

A random head is never right, so its trees would exercise neither deep accepts nor the moving
of caches. The oracle replaces each drafted tree, at the point where it is published, by a
random one with some true tokens at random nodes.
"""

import random
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch

from tests.engine.engines import Engine, Tokens
from vllm_eagle3.tree import mask
from vllm_eagle3.tree.chain import best_chain
from vllm_eagle3.tree.types import NO_PARENT, DraftTree, GrowthBuffers


class Oracle:
    """Feeds an engine's verification and counts what it met.

    Args:
        max_true: at most so many tokens of the text are hidden in a tree.

    Attributes:
        count: ``steps`` verified trees, ``accepted`` draft tokens, ``moved`` trees whose
            path was not in place already, ``trimmed`` trees of fewer nodes than drafted,
            ``placeholders`` rows with drafts but without a tree, ``mixed`` batches with both
            trees and prompts, ``untreed`` decoding requests without drafts beside trees,
            ``preempted`` requests.
        lengths: number of trees for each number of scheduled drafts.
        drafted: the tree that the engine itself drew up after each text: one row of
            :class:`DraftTree` by field name.
    """

    def __init__(self, engine: Engine, monkeypatch: Any, seed: int = 0, max_true: int = 7) -> None:
        self.count: Counter[str] = Counter()
        self.lengths: Counter[int] = Counter()
        self.drafted: dict[Tokens, dict[str, torch.Tensor]] = {}
        self.texts: list[Tokens] = []
        self._rng = random.Random(seed)
        self._max_true = max_true
        self._states = engine.runner.req_states
        self._speculator = engine.runner.speculator
        self._vocab_size = engine.runner.vocab_size
        self._publish = self._speculator._publish
        self._commit = self._speculator._commit
        monkeypatch.setattr(self._speculator, "_publish", self._publish_oracle)
        monkeypatch.setattr(self._speculator, "_commit", self._count_commit)
        self._preempt = engine.core.scheduler._preempt_request
        monkeypatch.setattr(engine.core.scheduler, "_preempt_request", self._count_preempt)

    def know(self, prompts: Iterable[Tokens], outputs: Iterable[Tokens]) -> None:
        """Add texts to draft from."""
        self.texts += [
            tuple(prompt) + tuple(output) for prompt, output in zip(prompts, outputs, strict=True)
        ]

    def continuation(self, text: Tokens) -> Tokens:
        """The ``max_true`` tokens that follow ``text``, where it is known."""
        for known in self.texts if text else ():
            if known[: len(text)] == text:
                return known[len(text) : len(text) + self._max_true]
        return ()

    def _publish_oracle(self, growth: GrowthBuffers, reqs: slice, level: int) -> None:
        self._publish(growth, reqs, level)
        speculator, buffers = self._speculator, self._speculator.tree.buffers
        num_nodes = buffers.tokens_RN.shape[1]
        for row, slot in enumerate(speculator.idx_mapping[reqs].tolist(), start=reqs.start):
            if slot < 0:  # padded and dummy rows
                continue
            text = text_so_far(self._states, slot)
            self.drafted[text] = {
                name: getattr(buffers, f"{name[:-2]}RN")[slot].clone()
                for name in DraftTree.__annotations__
            }
            tokens, parents = self._random_tree(text, num_nodes)
            tree = draft_tree([tokens], [parents])
            if speculator.tree.chain_only_R[slot]:
                tree = best_chain(tree, num_nodes - 1)
            put_tree(speculator, row, slot, tree)

    def _random_tree(self, text: Tokens, num_nodes: int) -> tuple[list[int], list[int]]:
        future = self.continuation(text)
        true = future[: self._rng.randint(0, min(len(future), num_nodes - 1))]
        nodes = sorted(self._rng.sample(range(1, num_nodes), len(true)))
        hidden = dict(zip(nodes, true, strict=True))
        tokens, parents, last = [0], [NO_PARENT], 0
        for node in range(1, num_nodes):
            if node in hidden:
                tokens.append(hidden[node])
                parents.append(last)
                last = node
            else:
                # Half of the others are true tokens, too, at places where they do not belong.
                token = self._rng.randrange(self._vocab_size)
                if future and self._rng.random() < 0.5:
                    token = self._rng.choice(future)
                tokens.append(token)
                parents.append(self._rng.randrange(node))
        return tokens, parents

    def _count_commit(self, batch: Any, num_rows: int) -> torch.Tensor:
        buffers = self._speculator.tree.buffers
        drafts = batch.num_draft_tokens_per_req
        for row, slot in enumerate(batch.idx_mapping_np.tolist()):
            num_drafts = int(drafts[row])
            if not num_drafts:
                self.count["untreed"] += int(batch.num_scheduled_tokens[row]) == 1
                continue
            parents = buffers.parents_RN[slot, 1 : num_drafts + 1]
            if (parents == NO_PARENT).all():
                self.count["placeholders"] += 1
            path = buffers.path_RN[slot, : int(buffers.path_len_R[slot])].tolist()
            self.count["steps"] += 1
            self.count["accepted"] += len(path) - 1
            self.count["moved"] += path != list(range(len(path)))
            self.count["trimmed"] += num_drafts < buffers.parents_RN.shape[1] - 1
            self.lengths[num_drafts] += 1
        prompts = (drafts == 0) & (batch.num_scheduled_tokens > 1)
        self.count["mixed"] += bool(prompts.any())
        return self._commit(batch, num_rows)

    def _count_preempt(self, *args: Any, **kwargs: Any) -> None:
        self.count["preempted"] += 1
        self._preempt(*args, **kwargs)


def text_so_far(req_states: Any, slot: int) -> Tokens:
    """Prompt and output of the request in a slot; of none in a padded or dummy row."""
    if slot < 0:
        return ()
    length = int(req_states.total_len.gpu[slot])
    return tuple(req_states.all_token_ids.gpu[slot, :length].tolist())


def put_tree(speculator: Any, row: int, slot: int, tree: DraftTree) -> None:
    """Draft the only tree of ``tree`` for the request at ``row`` of the batch."""
    for name, values in vars(tree).items():
        getattr(speculator.tree.buffers, f"{name[:-2]}RN")[slot] = values[0]
    speculator.draft_tokens[row] = tree.tokens_BN[0, 1:]


def draft_tree(tokens: list[list[int]], parents: list[list[int]]) -> DraftTree:
    """Trees by node, the root first."""
    parents_BN = torch.tensor(parents, dtype=torch.int32)
    return DraftTree(
        tokens_BN=torch.tensor(tokens),
        parents_BN=parents_BN,
        depths_BN=mask.depths(parents_BN),
        ancestor_bits_BN=mask.ancestor_bits(parents_BN),
        scores_BN=torch.zeros(parents_BN.shape),
    )
