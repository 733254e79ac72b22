"""Static trees: the same nodes by rank in every step, whatever the draft is sure of.

Source: EAGLE-1 (arXiv 2401.15077, section 3.1). The expansion is that of a dynamic tree
(:mod:`~vllm_eagle3.tree.expand`), but the nodes that go on are those with children in the tree,
and the candidates that are kept (:mod:`~vllm_eagle3.tree.rerank`) are its nodes. Where these
stand is known beforehand:

    pool index of the child of rank r = first of its level + K x (frontier row of its parent) + r
"""

from typing import Self

import torch

from vllm_eagle3.config import TreeConfig
from vllm_eagle3.paths import Path, Paths, expanded_nodes


class StaticTree:
    """Where the nodes of a static tree stand among the candidates of its expansion.

    Args:
        paths: of the nodes, as :func:`~vllm_eagle3.paths.read_paths` returns them.
        depth: levels of the expansion.
        top_k: K of the expansion, at least :func:`~vllm_eagle3.paths.width_of` the paths.
    """

    def __init__(
        self, paths: Paths, depth: int, top_k: int, device: torch.device | str | None = None
    ) -> None:
        self._lengths = [len(path) for path in paths]
        first, rows = 0, {(): 0}  # pool index of a level's first candidate; rows of its parents
        kept: dict[Path, int] = {}
        self._frontiers: list[torch.Tensor] = []
        for level in range(1, depth + 1):
            offered = top_k * (1 if level == 1 else top_k)
            place = {
                path: rows[path[:-1]] * top_k + path[-1] for path in paths if len(path) == level
            }
            kept |= {path: first + index for path, index in place.items()}
            expanded = [place[path] for path in expanded_nodes(paths, level)]
            # The draft runs K rows; rows that no node needs take candidates that nobody keeps.
            spare = [index for index in range(offered) if index not in expanded]
            frontier = (expanded + spare)[:top_k]
            self._frontiers.append(torch.tensor(frontier, device=device))
            rows = {path: frontier.index(place[path]) for path in expanded_nodes(paths, level)}
            first += offered
        self._kept_M = torch.tensor([kept[path] for path in paths], device=device)

    @classmethod
    def of(cls, config: TreeConfig, device: torch.device | str | None = None) -> Self | None:
        """The static tree that a config asks for; None where it asks for dynamic ones."""
        if config.paths is None:
            return None
        return cls(config.paths, config.depth, config.top_k, device)

    def frontier(self, level: int) -> torch.Tensor:
        """Which candidates of a level, counted from its first, go on: int64 [K]."""
        return self._frontiers[level - 1]

    def kept(self, level: int) -> torch.Tensor:
        """Pool indices of the nodes below the root, int64 [M], in the order of the paths.

        Of a tree that is grown down to ``level`` only: those before the first deeper one.
        """
        shallow = [length <= level for length in self._lengths]
        return self._kept_M[: shallow.index(False) if False in shallow else None]
