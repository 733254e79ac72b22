import subprocess
import sys

import pytest
import torch

from vllm_eagle3.config import TreeConfig
from vllm_eagle3.tree.draw import draw_mask, draw_tree, example_tree, main
from vllm_eagle3.tree.types import DraftTree


def test_draws_each_node_below_its_parent():
    tree = DraftTree(
        tokens_BN=torch.tensor([[0, 1, 2, 3]]),
        parents_BN=torch.tensor([[-1, 0, 0, 1]]),
        depths_BN=torch.tensor([[0, 1, 1, 2]]),
        ancestor_bits_BN=torch.tensor([[0b1, 0b11, 0b101, 0b1011]]),
        scores_BN=torch.tensor([[0.0, -0.5, -1.0, -1.5]]),
    )
    assert draw_tree(tree, ["once", "upon", "more", "a"]).splitlines() == [
        "token    node  depth   score  reached",
        "once        0      0    0.00  100.0%",
        "├─ upon     1      1   -0.50   60.7%",
        "│  └─ a     3      2   -1.50   22.3%",
        "└─ more     2      1   -1.00   36.8%",
    ]
    assert draw_mask(tree).splitlines() == [
        "     0 1 2 3",
        "   0 ■ · · ·",
        "   1 ■ ■ · ·",
        "   2 ■ · ■ ·",
        "   3 ■ ■ · ■",
    ]


def test_the_module_draws_in_the_terminal():
    command = [sys.executable, "-m", "vllm_eagle3.tree.mask", "--nodes", "64", "--depth", "9"]
    run = subprocess.run(
        [*command, "--top-k", "8"], capture_output=True, encoding="utf-8", check=False
    )
    assert run.returncode == 0, run.stderr
    tree = example_tree(TreeConfig(63, depth=9, top_k=8), seed=0)
    assert draw_mask(tree) in run.stdout
    assert run.stdout.count("├─ ") + run.stdout.count("└─ ") == 63


def test_seed_and_size_are_options(capsys):
    outputs = []
    for seed in ("1", "1", "2"):
        main(["--nodes", "9", "--depth", "3", "--top-k", "3", "--seed", seed])
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] != outputs[2]


def test_an_impossible_size_is_an_error_of_usage(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["--nodes", "40", "--depth", "2", "--top-k", "3"])
    assert "raise tree.depth or tree.top_k" in capsys.readouterr().err
