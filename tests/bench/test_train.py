"""The naive loop computes what the trainer does, and both are measured."""

import json
from operator import truediv
from pathlib import Path

import pytest
import torch

from tests.train import small
from vllm_eagle3 import cli
from vllm_eagle3.bench import train_naive
from vllm_eagle3.bench.train import SIDES, Job, measure, render
from vllm_eagle3.corpus import write_shard
from vllm_eagle3.train.data import epoch_batches
from vllm_eagle3.train.distributed import World
from vllm_eagle3.train.learner import Learner
from vllm_eagle3.train.settings import TrainConfig

SETTINGS = {"batch_tokens": 1024, "draft_vocab_size": 64, "num_ttt_steps": 3, "max_length": 64}


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("bench_train")
    small.llama().save_pretrained(root / "target")
    (root / "data").mkdir()
    write_shard(root / "data" / "shard-00-00000.safetensors", small.documents(60))
    return root / "target", root / "data"


def learner(target: Path) -> Learner:
    torch.manual_seed(0)
    config = TrainConfig(**SETTINGS)
    made = Learner(target, small.documents(60), config, torch.device("cpu"), World())
    made.initialise(next(epoch_batches(small.documents(60), 1024, 64, seed=0)))
    return made


def test_the_naive_loss_and_its_gradients_are_the_trainers(paths: tuple[Path, Path]) -> None:
    made = learner(paths[0])
    given = small.documents(9)
    batch = next(epoch_batches(given, 9 * 64, 64, seed=0))
    weights = list(made.head.parameters())
    expected = made.objective.loss(made.head, made.read(batch), made.settings)
    gradients = torch.autograd.grad(expected.loss, weights)
    made.target.model.set_attn_implementation("sdpa")
    mask_BT = torch.ones_like(batch.assistant_BT)
    loss = train_naive.loss(made, batch.tokens_BT, mask_BT, batch.assistant_BT, made.settings)
    torch.testing.assert_close(loss, expected.loss)
    torch.testing.assert_close(torch.autograd.grad(loss, weights), gradients, rtol=1e-3, atol=1e-6)


def test_naive_steps_read_every_document_and_lower_the_loss(paths: tuple[Path, Path]) -> None:
    made, given = learner(paths[0]), small.documents(60)
    batch = next(epoch_batches(given, 1024, 64, seed=0))
    before = made.measure(batch).loss
    steps = train_naive.steps(made, given, rows=7, max_length=64, batch_tokens=1)
    read = [next(steps) for _ in range(9)]  # 60 documents, 7 at a time
    assert sum(tokens for tokens, _ in read) == sum(int(d.assistant.sum()) for d in given)
    assert all(sum(slots) >= tokens for tokens, slots in read)
    assert made.measure(batch).loss < before


def test_the_command_measures_both_in_processes_of_their_own(
    paths: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "train.json"
    command = ["bench", "train", "--target", str(paths[0]), "--data", str(paths[1])]
    command += ["--sides", "packed", "naive", "--steps", "2", "--warmup", "1", "--device", "cpu"]
    command += [f"--{name.replace('_', '-')}={value}" for name, value in SETTINGS.items()]
    assert cli.main([*command, "--output", str(out)]) == 0
    sides = json.loads(out.read_text())["sides"]
    for side in sides.values():
        assert sum(side["step_tokens"]) < sum(side["step_slots"])
        assert 0 < side["forward_slots"] <= max(side["step_slots"])
        first, second = map(truediv, side["step_tokens"], side["step_seconds"])
        assert side["tokens_per_second"] == pytest.approx((first + second) / 2)
        assert side["peak_memory_gib"] > 0.1
    assert out.with_suffix(".md").read_text() in capsys.readouterr().out


@pytest.mark.parametrize("name", ["recomputed", "padded"])
def test_the_other_sides_are_settings_of_the_trainer(paths: tuple[Path, Path], name: str) -> None:
    config = SETTINGS | SIDES[name]
    assert measure(Job(str(paths[0]), [paths[1]], config, "cpu", 0, 1, None))["step_tokens"][0] > 0


def test_a_side_without_enough_memory_is_told_apart() -> None:
    side = {"device": "X", "step_seconds": [0.5], "step_tokens": [10], "step_slots": [20]}
    side |= {"forward_slots": 20, "tokens_per_second": 20.0, "peak_memory_gib": 1.5}
    sides = {"packed": side, "naive": {"error": "CUDA out of memory"}}
    text = render({"target": "t", "settings": {"steps": 1}, "sides": sides})
    assert "| packed | 20 | - | 500 | 50 % | 20 | 1.50 |" in text
    assert "`naive` failed" in text
