"""The whole loop on a small target: it learns, resumes, and exports what it trained."""

import json
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.train import small
from vllm_eagle3.corpus import Document, write_shard
from vllm_eagle3.heads.checkpoint import Checkpoint
from vllm_eagle3.heads.description import describe
from vllm_eagle3.heads.serving import serving
from vllm_eagle3.heads.target import TargetShape
from vllm_eagle3.train import trainer
from vllm_eagle3.train.data import epoch_batches
from vllm_eagle3.train.export import export, load_head
from vllm_eagle3.train.learner import Learner
from vllm_eagle3.train.objectives import OBJECTIVES, LossSettings
from vllm_eagle3.train.objectives.eagle3 import ttt_loss
from vllm_eagle3.train.trainer import TrainConfig, train

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
        config = TrainConfig(**CONFIG, steps=6, save_every=1, log_every=1)
        train(str(setup / "target"), setup / "data", out, config, "cpu", resume)
        return torch.load(out / "training_state.pt", weights_only=True)

    whole = run(tmp_path / "whole")
    step = trainer._Trainer._step

    def killed_at_the_fourth_step(self, batches, progress):
        if self.step == 3:
            raise KeyboardInterrupt
        return step(self, batches, progress)

    with monkeypatch.context() as patch:
        patch.setattr(trainer._Trainer, "_step", killed_at_the_fourth_step)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "broken")
    resumed = run(tmp_path / "broken", resume=True)
    assert resumed["progress"]["step"] == whole["progress"]["step"] == 6
    for name, weight in whole["head"].items():
        assert torch.equal(weight, resumed["head"][name]), name
    assert torch.equal(whole["random"][0]["torch"], resumed["random"][0]["torch"])
    # The log reads like that of an unbroken run, with one start more.
    steps = [entry["step"] for entry in log(tmp_path / "broken", "step")]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert len(log(tmp_path / "broken", "start")) == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_the_step_with_its_state_on_the_disk(
    setup: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    step = trainer._Trainer._step

    def signalled_in_the_second_step(self, batches, progress):
        if self.step == 1:
            os.kill(os.getpid(), number)
        return step(self, batches, progress)

    monkeypatch.setattr(trainer._Trainer, "_step", signalled_in_the_second_step)
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt):
        train(setup / "target", setup / "data", tmp_path, TrainConfig(**CONFIG, steps=6), "cpu")
    state = torch.load(tmp_path / "training_state.pt", weights_only=True)
    assert state["progress"]["step"] == 2
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("changes", [{"accumulate": 2}, {"recompute": True}])
def test_what_saves_memory_changes_no_result(setup: Path, tmp_path: Path, changes: dict) -> None:
    """Parts of equal batches add up to the same step; recomputed activations are the same."""

    def losses(name: str, **settings: object) -> list[float]:
        config = TrainConfig(**CONFIG | {"log_every": 1, "steps": 3} | settings)
        train(setup / "target", setup / "data", tmp_path / name, config, "cpu")
        return [entry["loss"] for entry in log(tmp_path / name, "step")]

    plain = losses("plain")
    assert len(plain) == 3
    if "accumulate" in changes:
        # Other batches, so other losses; what they learn is alike.
        assert losses("changed", **changes) == pytest.approx(plain, rel=0.15)
    else:
        assert losses("changed", **changes) == plain


def test_packed_documents_train_in_fewer_tokens(setup: Path, tmp_path: Path) -> None:
    tokens = {}
    for packing in (False, True):
        out = tmp_path / str(packing)
        settings = CONFIG | {"max_length": 128, "epochs": 4, "eval_documents": 1}
        train(
            setup / "target", setup / "data", out, TrainConfig(**settings, packing=packing), "cpu"
        )
        tokens[packing] = json.loads((out / "training.json").read_text())["tokens_seen"]
        evaluations = log(out, "evaluation")
        assert evaluations[-1]["losses"][0] < 4.5
    assert tokens[True] < 0.7 * tokens[False]


def test_a_loss_that_is_not_finite_stops_before_the_weights_are_touched(
    setup: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, calls = Learner._forward, []

    def broken_at_the_third_step(self, *args):
        result = forward(self, *args)
        calls.append(args)
        if len(calls) == 3:
            result.loss = result.loss * float("nan")
        return result

    config = TrainConfig(**CONFIG, steps=4, save_every=1)
    with monkeypatch.context() as patch:
        patch.setattr(Learner, "_forward", broken_at_the_third_step)
        with pytest.raises(ValueError, match=r"step 3 .*--learning-rate.*step 2 with --resume"):
            train(setup / "target", setup / "data", tmp_path, config, "cpu")
    lower = TrainConfig(**CONFIG | {"learning_rate": 1e-4}, steps=4, save_every=1)
    train(setup / "target", setup / "data", tmp_path, lower, "cpu", resume=True)
    state = torch.load(tmp_path / "training_state.pt", weights_only=True)
    assert state["progress"]["step"] == 4
    assert all(w.isfinite().all() for w in state["head"].values() if w.is_floating_point())


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_trains_resumes_and_is_written(
    setup: Path, tmp_path: Path, objective: str
) -> None:
    for steps in (1, 2):
        settings = CONFIG | {"num_ttt_steps": None, "log_every": 1, "eval_documents": 1}
        config = TrainConfig(**settings, objective=objective, steps=steps)
        train(setup / "target", setup / "data", tmp_path, config, "cpu", resume=steps > 1)
    assert [entry["step"] for entry in log(tmp_path, "step")] == [1, 2]
    assert OBJECTIVES[objective].title in (tmp_path / "README.md").read_text()
    target = TargetShape.read(setup / "target")
    found = serving(describe(Checkpoint.open(tmp_path), target), target)
    # Layer ids, which SGLang counts otherwise, only where they are not the default.
    assert (found.tree, found.warnings, len(found.notes)) == (True, (), objective == "eagle3-top")


def test_hass_may_begin_without_top_k_distillation(setup: Path, tmp_path: Path) -> None:
    losses = {}
    for share in (0.0, 0.5):
        settings = CONFIG | {"objective": "hass", "top_k_from": share, "log_every": 1}
        config = TrainConfig(**settings, steps=4)
        train(setup / "target", setup / "data", tmp_path / str(share), config, "cpu")
        losses[share] = [entry["loss"] for entry in log(tmp_path / str(share), "step")]
    # Cross-entropy adds to the loss, in the second half alone.
    assert losses[0.5][0] < losses[0.0][0] - 0.5
    assert losses[0.5][1] < losses[0.5][2] - 0.5


def test_top_k_distillation_is_refused_where_there_is_none() -> None:
    with pytest.raises(ValueError, match="'eagle1' has no top-K distillation"):
        TrainConfig(objective="eagle1", top_k_from=0.5)
    with pytest.raises(ValueError, match=r"top_k_from=1.0 must be .* below 1"):
        TrainConfig(objective="hass", top_k_from=1.0)


def test_an_unknown_objective_is_refused() -> None:
    with pytest.raises(ValueError, match=r"objective='eagle2'.*eagle3"):
        TrainConfig(objective="eagle2")


def test_ten_steps_give_the_stored_losses(setup: Path, tmp_path: Path) -> None:
    """A change of these numbers is a change of what training computes: say so in the commit."""
    config = TrainConfig(**CONFIG, steps=10, log_every=1, packing=False)
    train(setup / "target", setup / "data", tmp_path, config, "cpu")
    stored = json.loads((Path(__file__).parent / "golden_losses.json").read_text())
    assert [e["loss"] for e in log(tmp_path, "step")] == pytest.approx(stored["loss"], rel=2e-3)
    assert log(tmp_path, "evaluation")[-1]["losses"] == pytest.approx(stored["held_out"], rel=2e-3)


def test_the_log_tells_speed_memory_and_what_acceptance_to_expect(
    setup: Path, tmp_path: Path
) -> None:
    settings = CONFIG | {"eval_documents": 1, "eval_chain": 2, "eval_tree": (6, 2, 4)}
    config = TrainConfig(**settings, steps=2, log_every=1)
    train(setup / "target", setup / "data", tmp_path, config, "cpu")
    step = log(tmp_path, "step")[-1]
    assert step["tokens_per_second"] > 0
    assert step["eta_seconds"] == 0
    assert step["peak_memory_gib"] > 0
    predicted = log(tmp_path, "evaluation")[-1]["predicted"]
    assert set(predicted) == {"chain of 2", "tree of 6, 2, 4"}
    for prediction in predicted.values():
        assert set(prediction["tau"]) == {"T=0", "T=1"}
        assert len(prediction["accepted"]["T=1"]) == 2
    assert "tree of 6, 2, 4" in (tmp_path / "README.md").read_text()


def test_data_of_another_target_is_refused(setup: Path, tmp_path: Path) -> None:
    tokens = np.array([3, 4, small.VOCABULARY, 5])
    write_shard(tmp_path / "shard-0.safetensors", [Document(tokens, tokens > 3)] * 3)
    with pytest.raises(ValueError, match="written for another target"):
        train(setup / "target", tmp_path, tmp_path / "out", TrainConfig(**CONFIG), "cpu")


def test_tensorboard_is_written_or_its_absence_named(
    setup: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []

    class Writer:
        def __init__(self, folder: str) -> None:
            written.append(folder)

        def add_scalar(self, name: str, value: float, step: int) -> None:
            written.append((name, step))

        def close(self) -> None:
            written.append("closed")

    config = TrainConfig(**CONFIG, steps=1, log_every=1, tensorboard=True)
    monkeypatch.setitem(
        sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer)
    )
    train(setup / "target", setup / "data", tmp_path, config, "cpu")
    assert ("step/loss", 1) in written
    assert ("evaluation/losses/3", 1) in written
    assert written[-1] == "closed"
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match=r"pip install .*train"):
        train(setup / "target", setup / "data", tmp_path / "without", config, "cpu")


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
        ttt_loss(loaded, batch, LossSettings(3)).losses_K,
        ttt_loss(head, batch, LossSettings(3)).losses_K,
    )
    weights = load_file(tmp_path / "model.safetensors")
    ids = weights["d2t"] + torch.arange(64)
    assert weights["t2d"].nonzero().flatten().tolist() == ids.tolist()
