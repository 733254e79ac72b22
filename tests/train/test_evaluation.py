"""Predicted acceptance against brute force: every path drafted and verified by itself."""

from pathlib import Path

import pytest
import torch

from tests.train import small
from tests.train.brute import steps_of_text, tree_of_paths
from vllm_eagle3.config import TreeConfig
from vllm_eagle3.corpus import Document, write_shard
from vllm_eagle3.train.evaluation import evaluate, predict
from vllm_eagle3.train.learner import Learner
from vllm_eagle3.train.objectives import LossSettings
from vllm_eagle3.train.objectives.eagle3 import ttt_loss
from vllm_eagle3.train.trainer import TrainConfig, train

TREE = TreeConfig(20, depth=3, top_k=8, verify_budget=None)
CHAIN = TreeConfig(3, depth=3, top_k=1, verify_budget=None)


def brute_force(head, target, document: Document, config: TreeConfig) -> dict:
    tokens = document.tokens.tolist()
    first = document.assistant.tolist().index(True)
    steps = steps_of_text(head, target, tokens, first, config)
    accepted = {"T=0": [0.0] * config.depth, "T=1": [0.0] * config.depth}
    for number in range(len(steps)):
        root = first + sum(steps[:number])
        paths = tree_of_paths(head, target, tokens, root, config)
        for path in paths:
            logits = target.model(torch.tensor([tokens[: root + 1] + path])).logits[0, root:-1]
            probs = logits.softmax(-1)[torch.arange(len(path)), torch.tensor(path)]
            greedy = logits.argmax(-1).tolist() == path
            ended = set(path) & set(target.end_token_ids)
            accepted["T=1"][len(path) - 1] += 0.0 if ended else float(probs.prod())
            accepted["T=0"][len(path) - 1] += 0.0 if ended else float(greedy)
    means = {name: [total / len(steps) for total in sums] for name, sums in accepted.items()}
    return {"roots": len(steps), "tau_of_text": sum(steps) / len(steps), "accepted": means}


@pytest.mark.parametrize("config", [TREE, CHAIN], ids=["tree", "chain"])
def test_predicted_acceptance_equals_brute_force(config: TreeConfig) -> None:
    target, head = small.pair(torch.float64)
    document = small.documents(9, longest=24)[7]
    got = predict(head, target, [document], {"it": config})["it"]
    with torch.no_grad():
        expected = brute_force(head, target, document, config)
    assert got.roots == expected["roots"] > 1
    assert got.tau_of_text == pytest.approx(expected["tau_of_text"])
    for name, accepted in expected["accepted"].items():
        assert got.accepted[name] == pytest.approx(accepted, rel=1e-4, abs=1e-9)
        assert got.tau[name] == pytest.approx(1 + sum(accepted), rel=1e-4)
    if config is TREE:
        assert got.tau["T=0"] > 1


def test_a_draft_that_ends_the_turn_counts_nothing_and_nothing_counts_below_it() -> None:
    target, head = small.pair(torch.float64)
    document = small.documents(9, longest=24)[7]
    target.model.generation_config.eos_token_id = list(range(0, small.VOCABULARY, 3))
    got = predict(head, target, [document], {"it": TREE})["it"]
    with torch.no_grad():
        expected = brute_force(head, target, document, TREE)
    assert got.accepted["T=1"] == pytest.approx(expected["accepted"]["T=1"], rel=1e-4)
    target.model.generation_config.eos_token_id = list(range(small.VOCABULARY))
    got = predict(head, target, [document], {"it": TREE})["it"]
    assert got.tau == {"T=0": 1.0, "T=1": 1.0}


def test_documents_without_an_answer_predict_nothing() -> None:
    target, head = small.pair(torch.float32)
    tokens = torch.arange(3, 9).numpy()
    assert predict(head, target, [Document(tokens, tokens < 0)], {"it": TREE}) == {}


def test_losses_are_the_same_in_parts_no_larger_than_those_of_a_step() -> None:
    """Some parts have no root: they count nothing."""
    target, head = small.pair(torch.float64)
    given = small.documents(24)
    unanswered = [Document(d.tokens, d.assistant & False) for d in small.documents(12)]
    sizes = []

    def forward(batch):
        sizes.append(batch.tokens_BT.numel())
        features = target.read(batch, head.draft_token_ids, head.t2d)
        return ttt_loss(head, features, LossSettings(1))

    def losses(documents: list[Document], num_parts: int) -> tuple[list[float], list[float]]:
        config = TrainConfig(batch_tokens=64 * 36, eval_batches=1, eval_documents=0)
        device = torch.device("cpu")
        found = evaluate(head, target, documents, config, device, forward, num_parts)
        return found.losses, found.accepted

    (whole, accepted), in_parts = losses(given, 1), losses([*given, *unanswered], 18)
    assert max(sizes[1:]) == 128
    assert len(sizes) == 1 + 18
    # By roots, the drafted token covered or not: not quite the mean over what is covered.
    assert in_parts[0] == pytest.approx(whole, rel=0.02)
    assert in_parts[1] == pytest.approx(accepted)


@pytest.mark.parametrize("every", [1, 500])
def test_a_run_measures_once_a_step_in_the_parts_that_it_trains_in(
    every: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small.llama().save_pretrained(tmp_path / "target")
    write_shard(tmp_path / "shard-0.safetensors", small.documents(80))
    measure, sizes = Learner.measure, []

    def noted(self: Learner, batch):
        sizes.append(batch.tokens_BT.numel())
        return measure(self, batch)

    monkeypatch.setattr(Learner, "measure", noted)
    settings = {"batch_tokens": 512, "accumulate": 4, "steps": 1, "held_out": 0.5}
    settings |= {"draft_vocab_size": 80, "eval_every": every}
    config = TrainConfig(**settings, eval_batches=2, eval_documents=0)
    train(tmp_path / "target", tmp_path, tmp_path / "out", config, "cpu")
    assert len(sizes) == 2 * 4
    assert max(sizes) <= 512 / 4
