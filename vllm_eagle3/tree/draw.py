"""Draws an example tree and its mask in the terminal: ``python -m vllm_eagle3.tree.mask``."""

import argparse
import math
from collections.abc import Iterator, Sequence

import torch

from vllm_eagle3.config import TreeConfig
from vllm_eagle3.tree import mask
from vllm_eagle3.tree.expand import Expansion, grow, start
from vllm_eagle3.tree.rerank import rerank
from vllm_eagle3.tree.types import DraftTree

_WORDS = (
    *("the", "a", "of", "to", "in", "and", "is", "that", "it", "for", "on", "with", "as"),
    *("tree", "leaf", "root", "branch", "bird", "sky", "rain", "wind", "sun", "sea", "stone"),
    *("old", "new", "small", "wide", "green", "blue", "dark", "light", "grows", "falls"),
    *("stands", "sings", "sees", "holds", "moves", "ends", "begins", "road", "house", "door"),
)


def draw_tree(tree: DraftTree, words: Sequence[str], request: int = 0) -> str:
    """One line for each node, children indented below their parents.

    Args:
        words: text of each token id.
        request: row of the batch.
    """
    tokens = tree.tokens_BN[request].tolist()
    parents = tree.parents_BN[request].tolist()
    scores = tree.scores_BN[request].tolist()
    depths = tree.depths_BN[request].tolist()
    children: list[list[int]] = [[] for _ in parents]
    for node, parent in enumerate(parents):
        if parent >= 0:
            children[parent].append(node)

    def lines(node: int, lead: str, branch: str) -> Iterator[tuple[str, int]]:
        yield lead + branch + words[tokens[node]], node
        below = lead + {"": "", "├─ ": "│  ", "└─ ": "   "}[branch]
        for child in children[node]:
            yield from lines(child, below, "└─ " if child == children[node][-1] else "├─ ")

    drawn = list(lines(0, "", ""))
    width = max(len(text) for text, _ in drawn)
    header = f"{'token':<{width}}  node  depth   score  reached"
    rows = [
        f"{text:<{width}}  {node:>4}  {depths[node]:>5}  {scores[node]:>6.2f}"
        f"  {math.exp(scores[node]):>6.1%}"
        for text, node in drawn
    ]
    return "\n".join([header, *rows])


def draw_mask(tree: DraftTree, request: int = 0) -> str:
    """One line for each node: a full square where it sees the node of that column."""
    num_nodes = tree.parents_BN.shape[1]
    sees_NN = mask.bits_to_mask(tree.ancestor_bits_BN[request], num_nodes)
    columns = "     " + " ".join(str(node % 10) for node in range(num_nodes))
    rows = [
        f"{node:>4} " + " ".join("■" if seen else "·" for seen in row)
        for node, row in enumerate(sees_NN.tolist())
    ]
    return "\n".join([columns, *rows])


def example_tree(config: TreeConfig, seed: int) -> DraftTree:
    """A tree of one request as a draft with random logits would grow it."""
    generator = torch.Generator().manual_seed(seed)

    def best_children(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
        # The factor makes some continuations much likelier than others, as in real text.
        logits = 2.5 * torch.randn(*shape, len(_WORDS), generator=generator)
        return logits.log_softmax(-1).topk(config.top_k)

    expansion: Expansion = start(*best_children(1))
    for _ in range(config.depth - 1):
        expansion = grow(expansion, *best_children(1, config.top_k))
    root_B = torch.randint(len(_WORDS), (1,), generator=generator)
    return rerank(expansion, config.num_nodes, root_B)


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line and print."""
    parser = argparse.ArgumentParser(
        prog="python -m vllm_eagle3.tree.mask",
        description="Draw a dynamic draft tree (EAGLE-2) of random drafts, and its mask.",
    )
    parser.add_argument("--nodes", type=int, default=16, help="nodes, root included (16)")
    parser.add_argument("--depth", type=int, default=4, help="levels below the root (4)")
    parser.add_argument("--top-k", type=int, default=4, help="children for each node (4)")
    parser.add_argument("--seed", type=int, default=0, help="of the random drafts (0)")
    args = parser.parse_args(argv)
    try:
        config = TreeConfig(args.nodes - 1, depth=args.depth, top_k=args.top_k)
        config.check_draft_vocabulary(len(_WORDS))
    except ValueError as error:
        parser.error(str(error))

    tree = example_tree(config, args.seed)
    expected = tree.scores_BN.exp().sum().item()
    print(
        f"The best {args.nodes - 1} of {config.num_candidates} candidates. Score: log-probability "
        "of the path from the root;\nreached: its exponential. Their sum, "
        f"{expected:.2f}, is the number of tokens that the draft expects\n"
        "the target to emit in one forward.\n"
    )
    print(draw_tree(tree, _WORDS))
    print(f"\nMask: row sees column ({args.nodes} nodes; all see the prefix)\n")
    print(draw_mask(tree))
