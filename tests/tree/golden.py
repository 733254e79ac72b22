"""The golden tree: fixed inputs and what the package made of them.

Log-probabilities are multiples of 1/64, so float32 sums are exact and the file is the same
on every machine. `python -m tests.tree.golden` writes it anew: a change of it is a change of
the algorithm, to be explained in the commit.
"""

import json
from pathlib import Path

import torch

from tests.tree.naive import Levels, expand, random_levels
from vllm_eagle3.tree.rerank import rerank

PATH = Path(__file__).parent / "golden_tree.json"
NUM_NODES, DEPTH, TOP_K = 14, 4, 4


def build(levels: Levels) -> dict[str, list]:
    """The tree of the one request, as lists."""
    tree = rerank(expand(levels), NUM_NODES, torch.tensor([7]))
    return {name: field[0].tolist() for name, field in vars(tree).items()}


if __name__ == "__main__":
    levels = random_levels(seed=20, batch=1, depth=DEPTH, top_k=TOP_K, step=1 / 64)
    inputs = [
        {"log_probs": log_probs.tolist(), "tokens": tokens.tolist()} for log_probs, tokens in levels
    ]
    PATH.write_text(json.dumps({"levels": inputs, "tree": build(levels)}, indent=1) + "\n")
