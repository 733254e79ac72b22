"""The whole loop on a small target: it learns, resumes, and exports what it trained."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.train import small
from vllm_eagle3.corpus import write_shard
from vllm_eagle3.train import trainer
from vllm_eagle3.train.data import epoch_batches
from vllm_eagle3.train.export import export, load_head
from vllm_eagle3.train.model import HeadConfig, captured_layers
from vllm_eagle3.train.trainer import TrainConfig, train
from vllm_eagle3.train.ttt import ttt_loss

CONFIG = {
    "draft_vocab_size": 80,
    "batch_tokens": 512,
    "num_ttt_steps": 3,
    "learning_rate": 3e-3,
    "eval_documents": 0,
}


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a target and data."""
    root = tmp_path_factory.mktemp("training")
    small.llama().save_pretrained(root / "target")
    (root / "data").mkdir()
    write_shard(root / "data" / "shard-00-00000.safetensors", small.documents(200))
    return root


def log(out: Path, event: str) -> list[dict]:
    lines = (out / "training_log.jsonl").read_text().splitlines()
    return [entry for entry in map(json.loads, lines) if entry["event"] == event]


def test_training_lowers_the_held_out_loss_of_every_step(setup: Path, tmp_path: Path) -> None:
    config = TrainConfig(**CONFIG, epochs=8, eval_every=1)
    train(str(setup / "target"), setup / "data", tmp_path, config, "cpu")
    evaluations = log(tmp_path, "evaluation")
    for first, last in zip(evaluations[0]["losses"], evaluations[-1]["losses"], strict=True):
        assert last < first - 0.3
    weights = load_file(tmp_path / "model.safetensors")
    assert all(w.dtype == torch.bfloat16 for w in weights.values() if w.is_floating_point())
    card = (tmp_path / "README.md").read_text()
    assert "license: apache-2.0" in card
    assert f"{evaluations[-1]['step']:,} steps" in card


def test_a_resumed_run_ends_where_an_unbroken_one_does(
    setup: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(out: Path, resume: bool = False) -> dict[str, torch.Tensor]:
        config = TrainConfig(**CONFIG, steps=6, save_every=1)
        train(str(setup / "target"), setup / "data", out, config, "cpu", resume)
        return torch.load(out / "training_state.pt", weights_only=True)

    whole = run(tmp_path / "whole")
    optimise = trainer._Trainer._optimise

    def killed_at_the_fourth_step(self, batches, progress):
        if self.step == 3:
            raise KeyboardInterrupt
        return optimise(self, batches, progress)

    with monkeypatch.context() as patch:
        patch.setattr(trainer._Trainer, "_optimise", killed_at_the_fourth_step)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "broken")
    resumed = run(tmp_path / "broken", resume=True)
    assert resumed["progress"]["step"] == whole["progress"]["step"] == 6
    for name, weight in whole["head"].items():
        assert torch.equal(weight, resumed["head"][name]), name


def test_a_state_of_another_shape_is_refused(setup: Path, tmp_path: Path) -> None:
    config = TrainConfig(**CONFIG, steps=1)
    train(str(setup / "target"), setup / "data", tmp_path, config, "cpu")
    other = TrainConfig(**CONFIG | {"num_ttt_steps": 2}, steps=2)
    with pytest.raises(ValueError, match="num_ttt_steps"):
        train(str(setup / "target"), setup / "data", tmp_path, other, "cpu", True)


def test_the_time_limit_ends_the_run(setup: Path, tmp_path: Path) -> None:
    config = TrainConfig(**CONFIG, epochs=10_000, minutes=0.02)
    train(str(setup / "target"), setup / "data", tmp_path, config, "cpu")
    assert (tmp_path / "model.safetensors").is_file()


def test_an_exported_head_computes_what_the_trained_one_did(tmp_path: Path) -> None:
    target, head = small.pair(torch.float32)
    tokens = next(epoch_batches(small.documents(4), 512, 64, seed=0))
    batch = target.read(tokens, head.draft_token_ids, head.t2d)
    loaded = load_head(export(head, tmp_path, dtype="float32"), target.embedding)
    torch.testing.assert_close(
        ttt_loss(loaded, batch, 3).losses_K, ttt_loss(head, batch, 3).losses_K
    )
    weights = load_file(tmp_path / "model.safetensors")
    ids = weights["d2t"] + torch.arange(64)
    assert weights["t2d"].nonzero().flatten().tolist() == ids.tolist()


def test_captured_states_are_the_inputs_of_layers_2_half_and_3_from_the_end() -> None:
    target, head = small.pair(torch.float32)
    assert captured_layers(30) == (2, 15, 27)
    tokens = next(epoch_batches(small.documents(4), 512, 64, seed=0))
    states = target.model.model(tokens.tokens_BT, output_hidden_states=True).hidden_states
    target._captured.clear()
    batch = target.read(tokens, head.draft_token_ids, head.t2d)
    torch.testing.assert_close(batch.features_BTF, torch.cat([states[i] for i in (2, 4, 5)], -1))
    logits = target.model(tokens.tokens_BT).logits
    torch.testing.assert_close(batch.target_logits_BTV, logits[..., head.draft_token_ids])
    assert torch.equal(batch.covered_BT, head.t2d[logits.argmax(-1)])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 5}, "at least 8 layers"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "linear"),
    ],
)
def test_unsuitable_targets_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HeadConfig.from_target(small.llama(**changes).config, 64)
