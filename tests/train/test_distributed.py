"""Several processes: they equal one that reads the same step in as many parts."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.train import small
from tests.train.processes import Pair, pair
from vllm_eagle3.corpus import write_shard
from vllm_eagle3.train.distributed import World, failing_once, joined
from vllm_eagle3.train.loader import Loader
from vllm_eagle3.train.settings import TrainConfig
from vllm_eagle3.train.trainer import train

OPTIONS = {
    "draft_vocab_size": 80,
    "batch_tokens": 1024,
    "num_ttt_steps": 3,
    "steps": 4,
    "log_every": 1,
    "eval_documents": 0,
}


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A target and data."""
    root = tmp_path_factory.mktemp("distributed")
    small.llama().save_pretrained(root / "target")
    (root / "data").mkdir()
    write_shard(root / "data" / "shard-00-00000.safetensors", small.documents(120))
    return root / "target", root / "data"


def two(paths: tuple[Path, Path], out: Path, *flags: str, **options: object):
    """Two processes that train."""
    target, data = map(str, paths)
    given = [f"--{name.replace('_', '-')}={value}" for name, value in (OPTIONS | options).items()]
    return pair(["--target", target, "--data", data, "--out", str(out), *flags, *given], out)


def wait_for_a_step(out: Path, both: Pair) -> None:
    log, deadline = out / "training_log.jsonl", time.monotonic() + 60
    while not log.is_file() or '"step"' not in log.read_text():
        assert time.monotonic() < deadline
        assert both.alive
        time.sleep(0.02)


def entries(out: Path, event: str) -> list[dict]:
    lines = map(json.loads, (out / "training_log.jsonl").read_text().splitlines())
    return [entry for entry in lines if entry["event"] == event]


def assert_steps_alike(one: Path, other: Path, rel: float = 1e-3) -> None:
    pairs = list(zip(entries(one, "step"), entries(other, "step"), strict=True))
    assert len(pairs) >= 4
    for a, b in pairs:
        for name in ("step", "loss", "losses", "accuracy", "accepted", "grad_norm"):
            assert a[name] == pytest.approx(b[name], rel=rel), name


def state(out: Path) -> dict:
    return torch.load(out / "training_state.pt", weights_only=True)


def assert_heads_alike(one: Path, other: Path) -> None:
    for name, weight in state(one)["head"].items():
        torch.testing.assert_close(state(other)["head"][name], weight, msg=name)


def test_two_processes_train_the_same_head_as_one_and_one_goes_on_from_them(
    paths: tuple[Path, Path], tmp_path: Path
) -> None:
    alone, together = tmp_path / "one", tmp_path / "two"
    with two(paths, together, "--recompute", accumulate=2) as both:
        train(*paths, alone, TrainConfig(**OPTIONS, accumulate=4), "cpu")
        both.end()
    assert_steps_alike(alone, together)
    assert_heads_alike(alone, together)
    assert len(state(together)["random"]) == 2
    longer = OPTIONS | {"steps": 6}
    with pytest.raises(ValueError, match="give --accumulate 4"):
        train(*paths, together, TrainConfig(**longer), "cpu", resume=True)
    for out in (alone, together):
        train(*paths, out, TrainConfig(**longer, accumulate=4), "cpu", resume=True)
    assert_steps_alike(alone, together)
    assert_heads_alike(alone, together)
    (noted,) = entries(together, "other processes")
    assert (noted["step"], noted["before"], noted["now"]) == (4, 2, 1)


def test_a_sharded_target_gives_the_same_losses_and_predictions(
    paths: tuple[Path, Path], tmp_path: Path
) -> None:
    alone, together = tmp_path / "one", tmp_path / "two"
    # One epoch to its end, where one of the two has nothing left to read.
    options = {"steps": 100, "epochs": 1, "eval_documents": 2, "eval_chain": 2}
    # A time limit, which all take from the clock of the first.
    flags = ("--shard-target", "--no-packing", "--eval-tree", "6/2/4", "--minutes", "1000")
    with two(paths, together, *flags, **options) as both:
        settings = OPTIONS | options | {"eval_tree": (6, 2, 4), "packing": False}
        train(*paths, alone, TrainConfig(**settings, accumulate=2), "cpu")
        both.end()
    assert_steps_alike(alone, together)
    facts = [json.loads((out / "training.json").read_text()) for out in (alone, together)]
    assert facts[0]["tokens_seen"] == facts[1]["tokens_seen"]
    assert facts[0]["tokens_seen"] < 2 * 512 * facts[0]["steps"]
    held = [entries(out, "start")[0]["target_parameters"] for out in (alone, together)]
    assert held[1] < 0.7 * held[0]
    predicted = [entries(out, "evaluation")[-1]["predicted"] for out in (alone, together)]
    for name, prediction in predicted[0].items():
        assert predicted[1][name]["roots"] == prediction["roots"] > 0
        assert predicted[1][name]["tau"] == pytest.approx(prediction["tau"], rel=1e-3)


@pytest.mark.parametrize(("device", "current"), [("cuda:1", ["cuda:1"]), ("cuda", [])])
def test_a_gpu_that_is_named_is_where_kernels_run(
    device: str, current: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton launches on the current GPU, whichever one the tensors are on."""
    made: list[str] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda chosen: made.append(str(chosen)))
    monkeypatch.delenv("RANK", raising=False)
    with joined(device) as (_, chosen):
        assert str(chosen) == device
        assert made == current


def test_a_target_is_not_sharded_over_one_process(paths: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="use torchrun"):
        train(*paths, tmp_path, TrainConfig(**OPTIONS, shard_target=True), "cpu")


def test_a_signal_ends_both_after_the_same_step_and_both_go_on_bit_by_bit(
    paths: tuple[Path, Path], tmp_path: Path
) -> None:
    # A loss with noise, of which each process draws its own.
    options = {"objective": "eagle1", "steps": 40, "epochs": 40}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    with two(paths, whole, **options) as both:
        both.end()
    with two(paths, broken, **options) as both:
        wait_for_a_step(broken, both)
        both.interrupt()
        both.interrupt()  # as torchrun passes on what the terminal has sent
        both.end(130)
    saved = state(broken)
    assert 0 < saved["progress"]["step"] == entries(broken, "interrupted")[-1]["step"] < 40
    first, second = (states["torch"] for states in saved["random"])
    assert not torch.equal(first, second)
    with two(paths, broken, "--resume", **options) as both:
        both.end()
    for name, weight in state(whole)["head"].items():
        assert torch.equal(state(broken)["head"][name], weight), name
    assert_steps_alike(whole, broken, rel=0)


def test_a_failure_of_one_ends_both_at_once_and_is_named(
    paths: tuple[Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with two(paths, out, steps=5000, epochs=5000, save_every=50) as both:
        wait_for_a_step(out, both)
        # Nothing can take the place of a folder: what the main process alone writes fails.
        (out / "training_state.pt").mkdir()
        started = time.monotonic()
        both.end(2, 1)
    assert time.monotonic() - started < 30
    assert "training_state.pt could not be written" in (out / "rank0.txt").read_text()


def test_a_failure_leaves_the_group_without_waiting_for_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(OSError, match="full"), joined("cpu"):
        raise OSError("full")
    assert dist.is_initialized()  # leaving it is where NCCL waits
    dist.destroy_process_group()
    with joined("cpu") as (world, _):
        assert world.gather("here") == ["here"]
    assert not dist.is_initialized()


def test_every_batch_is_read_by_one_process_and_shares_add_up() -> None:
    documents = small.documents(100)
    config = TrainConfig(batch_tokens=768, accumulate=2, epochs=2)

    def steps(rank: int, size: int, start: int = 0) -> list:
        return list(Loader(documents, config, World(rank, size)).steps(start, torch.device("cpu")))

    ranks = [steps(rank, 3) for rank in range(3)]
    assert len(ranks[0]) == Loader(documents, config, World(0, 3)).num_steps()
    seen = 0
    for parts in zip(*(r[:-1] for r in ranks), strict=True):
        assert sum(share for part in parts for _, share in part.parts) == pytest.approx(1)
        assert all(len(part.parts) == 2 for part in parts)
        tokens = sum(b.tokens_BT.numel() for part in parts for b, _ in part.parts)
        assert {part.num_tokens for part in parts} == {tokens}
    for part in (p for r in ranks for p in r):
        seen += sum(int(b.assistant_BT.sum()) for b, share in part.parts if share)
    last = [r[-1].parts for r in ranks]
    assert len({len(parts) for parts in last}) == 1
    assert sum(share for parts in last for _, share in parts) == pytest.approx(1)
    assert seen == 2 * sum(int(d.assistant.sum()) for d in documents)
    later = steps(1, 3, start=2)
    for (a, _), (b, _) in zip(later[0].parts, ranks[1][2].parts, strict=True):
        assert torch.equal(a.tokens_BT, b.tokens_BT)


def test_a_step_whose_parts_would_cut_a_document_is_refused() -> None:
    documents = small.documents(4)
    longest = max(len(d.tokens) for d in documents)
    few = {"batch_tokens": 4 * longest - 1, "accumulate": 2}
    with pytest.raises(ValueError, match=rf"--batch-tokens to {4 * longest}.*--accumulate"):
        Loader(documents, TrainConfig(**few), World(1, 2))
    for enough in (few | {"batch_tokens": 4 * longest}, few | {"max_length": longest - 1}):
        for packing in (True, False):
            Loader(documents, TrainConfig(**enough, packing=packing), World(1, 2)).first()


def test_a_mistake_is_reported_by_one_of_the_processes(paths: tuple[Path, Path]) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "vllm_eagle3.cli", "train", "--target", str(paths[0]), "--data", "nowhere"]
    ended = subprocess.run(
        [*command, "--out", str(paths[0]), "--device", "cpu"],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert ended.returncode != 0
    assert ended.stderr.count("vllm-eagle3: ") == 1, ended.stderr
    assert "holds a checkpoint already" in ended.stderr


@pytest.mark.parametrize(("rank", "waited"), [("0", []), ("1", [15.0])])
def test_what_fails_in_one_process_alone_is_reported_too(
    rank: str, waited: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    monkeypatch.setenv("LOCAL_RANK", rank)
    monkeypatch.setattr(time, "sleep", slept.append)
    with pytest.raises(ValueError, match="mine"), failing_once():
        raise ValueError("mine")
    assert slept == waited
