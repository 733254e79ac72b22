"""Drafting rounds for the tests of the growing ops, and where those ops run."""

from dataclasses import dataclass, field

import pytest
import torch

from tests.tree.naive import Levels, random_levels
from vllm_eagle3 import ops
from vllm_eagle3.config import TreeConfig
from vllm_eagle3.tree.expand import Expansion, grow, start
from vllm_eagle3.tree.static import StaticTree
from vllm_eagle3.tree.types import GrowthBuffers, TreeBuffers

DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
WHERE = [
    pytest.param(impl, device, id=f"{impl}-{device}", marks=[pytest.mark.gpu] * (device == "cuda"))
    for device in DEVICES
    for impl in ("torch", "extension")
]
# EAGLE-1's, the smallest, one whose better parents come last, and those with the most nodes.
STATIC = {
    "published": TreeConfig.static("mc_sim_7b_63"),
    "smallest": TreeConfig.static([[0]]),
    "any order": TreeConfig.static([[0], [1], [1, 0], [0, 0], [1, 1], [1, 0, 0], [2]]),
    "longest": TreeConfig.static([[0] * length for length in range(1, 64)]),
    "widest": TreeConfig.static([[rank] for rank in range(63)]),
    "wide and deep": TreeConfig.static(
        [[0], [1], *([i % 2, i // 2] for i in range(60)), [1, 9, 0]]
    ),
}
SENTINEL = 77  # in memory that no op may touch
MAX_POSITION = 40


def spoil(levels: Levels) -> Levels:
    """What a draft may offer at its worst: NaN, infinities, log-probabilities above 0."""
    spoiled = []
    for number, (log_probs, tokens) in enumerate(levels):
        log_probs = log_probs.clone().flatten(0, -2)
        last = log_probs.shape[0] - 1
        log_probs[last] = float("nan")
        log_probs[last // 2, 1:] = float("-inf")
        log_probs[0, 0] = (1e-6, float("inf"), float("nan"))[number % 3]
        spoiled.append((log_probs.view(tokens.shape), tokens))
    return spoiled


@dataclass
class Round:
    """A drafting round through the ops, in buffers with room for more than the batch."""

    config: TreeConfig
    levels: Levels
    impl: str
    device: str
    spare: int = 2
    ids_dtype: torch.dtype = torch.int32
    growth: GrowthBuffers = field(init=False)

    def __post_init__(self) -> None:
        self.num_reqs = self.levels[0][0].shape[0]
        self.growth = GrowthBuffers(self.num_reqs + self.spare, self.config, self.device)
        for rows in self.buffers():
            rows.fill_(SENTINEL)
        num_rows = (self.num_reqs + self.spare) * self.config.top_k
        self.input_ids_M = torch.full((num_rows,), SENTINEL, dtype=self.ids_dtype).to(self.device)
        self.positions_M = torch.full((num_rows,), SENTINEL).to(self.device)
        # The last requests are at the end of the draft's positions.
        roots = MAX_POSITION - 5 + torch.arange(self.num_reqs)
        self.root_positions_B = roots.to(self.device)

    def buffers(self) -> list[torch.Tensor]:
        """All that the round carries from level to level."""
        return [value for value in vars(self.growth).values() if isinstance(value, torch.Tensor)]

    def offer(self, level: int) -> None:
        K = self.config.top_k
        log_probs, tokens = (values.reshape(-1, K) for values in self.levels[level - 1])
        # One row more than the batch has, as in a padded graph.
        log_probs = torch.cat([log_probs, log_probs[:1]]).to(self.device)
        tokens = torch.cat([tokens, tokens[:1]]).to(self.device)
        ops.expand_tree(
            self.growth,
            log_probs,
            tokens,
            level,
            self.num_reqs,
            self.root_positions_B,
            MAX_POSITION,
            self.input_ids_M,
            self.positions_M,
            impl=self.impl,
        )

    def offer_all(self) -> "Round":
        for level in range(1, len(self.levels) + 1):
            self.offer(level)
        return self

    def expected(self, level: int) -> Expansion:
        fixed = StaticTree.of(self.config)
        expansion = start(*self.levels[0], fixed and fixed.frontier(1))
        for number, children in enumerate(self.levels[1:level], start=2):
            expansion = grow(expansion, *children, fixed and fixed.frontier(number))
        return expansion

    def build(
        self, slots: list[int], chain_only: list[bool], num_nodes: int, level: int | None = None
    ) -> tuple[TreeBuffers, torch.Tensor]:
        """The slots' trees and the draft tokens, in memory that held the sentinel."""
        buffers = TreeBuffers(len(chain_only), num_nodes, torch.device(self.device))
        for name in ("tokens", "parents", "depths", "ancestor_bits", "scores"):
            getattr(buffers, f"{name}_RN").fill_(SENTINEL)
        # Rows further apart than the tree needs, as vLLM's may be.
        drafts = torch.full((self.num_reqs + 1, num_nodes + 3), SENTINEL).to(self.device)
        ops.build_tree(
            self.growth,
            len(self.levels) if level is None else level,
            self.num_reqs,
            torch.tensor(slots, dtype=self.ids_dtype).to(self.device),
            torch.tensor(chain_only).to(self.device),
            buffers,
            drafts,
            impl=self.impl,
        )
        return buffers, drafts


def random_round(
    config: TreeConfig,
    impl: str,
    device: str,
    *,
    batch: int = 3,
    seed: int = 0,
    step: float | None = None,
    spoiled: bool = False,
    **settings: object,
) -> Round:
    vocab = max(50, config.top_k)
    levels = random_levels(seed, batch, config.depth, config.top_k, vocab=vocab, step=step)
    return Round(config, spoil(levels) if spoiled else levels, impl, device, **settings)
