import json

import torch

from tests.tree.golden import PATH, build


def test_the_tree_is_the_one_on_file():
    golden = json.loads(PATH.read_text())
    levels = [
        (torch.tensor(level["log_probs"]), torch.tensor(level["tokens"]))
        for level in golden["levels"]
    ]
    assert build(levels) == golden["tree"]
