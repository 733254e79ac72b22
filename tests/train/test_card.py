"""The model card says what was trained, and how."""

from pathlib import Path

import pytest

from vllm_eagle3.corpus import write_json
from vllm_eagle3.train.card import model_card

EVALUATION = {
    "losses": [1.0],
    "accuracy": [0.5],
    "accepted": [0.5],
    "chain_tau": 1.5,
    "predicted": {},
}


def card(method: str, coverage: float, *folders: Path, **config: object) -> str:
    shared = {
        "learning_rate": 1e-4,
        "clip": 0.5,
        "batch_tokens": 1024,
        "seed": 0,
        "data_share": 1.0,
    }
    numbers = ("documents", "tokens", "assistant_tokens", "steps", "tokens_seen", "seconds")
    facts = dict.fromkeys(numbers, 60) | {
        "target": "target",
        "title": "A",
        "method": method,
        "coverage": coverage,
        "draft_vocab_size": 8192,
        "device": "CPU",
        "processes": 1,
        "config": shared | {"top_k_from": 0.5} | config,
        "evaluation": EVALUATION,
    }
    return " ".join(model_card(facts, folders).split())


@pytest.mark.parametrize(
    ("objective", "method", "num_steps", "decay", "expected"),
    [
        ("eagle3", "eagle3", 7, 0.8, "Training-time test with 7 steps, decay 0.8; AdamW"),
        ("eagle3.1", "eagle3", 1, 0.8, "Training-time test with one step; AdamW"),
        ("eagle1", "eagle", 1, 0.0, "in one step: feature regression and token cross-entropy;"),
        ("eagle1", "eagle", 5, 0.0, "in one step: feature regression and token cross-entropy;"),
        ("hass", "eagle", 3, 1.0, "in 3 steps, decay 1: feature regression and token cross-"),
    ],
)
def test_the_objective_is_named_as_it_was_trained(
    tmp_path: Path, objective: str, method: str, num_steps: int, decay: float, expected: str
) -> None:
    settings = {"objective": objective, "num_ttt_steps": num_steps, "ttt_decay": decay}
    text = card(method, 0.9, tmp_path, **settings)
    assert expected in text
    assert ("top-K distillation from 50 % of the run" in text) == (objective == "hass")
    assert ("Training-time test" in text) == (method == "eagle3")


def test_a_vocabulary_that_covers_all_is_not_called_the_most_frequent(tmp_path: Path) -> None:
    settings = {"objective": "eagle3", "num_ttt_steps": 7, "ttt_decay": 0.8}
    part, whole = (card("eagle3", coverage, tmp_path, **settings) for coverage in (0.9587, 1.0))
    assert "the 8,192 most frequent of those, 95.87 % of what it wrote" in part
    assert "8,192 tokens, among them all that the assistant wrote" in whole
    assert "most frequent" not in whole


def test_a_share_of_the_documents_is_said_to_be_one() -> None:
    settings = {"objective": "eagle3", "num_ttt_steps": 7, "ttt_decay": 0.8}
    assert "60 documents, 60 tokens" in card("eagle3", 1.0, **settings)
    share = card("eagle3", 1.0, data_share=0.125, **settings)
    assert "60 documents (12.5 % of those that are not held out), 60 tokens" in share


def test_the_accounts_of_several_folders_are_added_up(tmp_path: Path) -> None:
    accounts = {
        "a": {"description": "user turns.", "documents_by_kind": {"chat": 3}, "dropped": {"x": 1}},
        "b": {"description": "a log.", "documents_by_kind": {"chat": 1, "code": 2}},
        "c": {"description": "a log.", "documents_by_kind": {}, "dropped": {"x": 2}},
    }
    for name, account in accounts.items():
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / "metadata.json", account)
    folders = [tmp_path / name for name in accounts]
    text = card("eagle3", 1.0, *folders, objective="eagle3", num_ttt_steps=1, ttt_decay=1.0)
    assert "Of this kind: user turns. And: a log. 60 documents" in text
    assert "Documents by kind: chat 4, code 2. Dropped: x 3." in text
