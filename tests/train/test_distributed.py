"""Two processes equal one that reads the same step in two parts."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.train import small
from vllm_eagle3.corpus import write_shard
from vllm_eagle3.train.distributed import World
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


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def steps_of(out: Path) -> list[dict]:
    entries = map(json.loads, (out / "training_log.jsonl").read_text().splitlines())
    kept = ("step", "loss", "losses", "accuracy", "accepted", "grad_norm")
    return [{name: e[name] for name in kept} for e in entries if e["event"] == "step"]


def test_two_processes_train_the_same_head_as_one(tmp_path: Path) -> None:
    small.llama().save_pretrained(tmp_path / "target")
    (tmp_path / "data").mkdir()
    write_shard(tmp_path / "data" / "shard-00-00000.safetensors", small.documents(120))
    command = [sys.executable, "-m", "vllm_eagle3.cli", "train"]
    command += ["--target", str(tmp_path / "target"), "--data", str(tmp_path / "data")]
    command += ["--out", str(tmp_path / "two"), "--device", "cpu"]
    command += [f"--{name.replace('_', '-')}={value}" for name, value in OPTIONS.items()]
    # What torchrun sets.
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = [
        subprocess.Popen(
            command,
            env=os.environ | shared | {"RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in ("0", "1")
    ]
    try:
        paths = tmp_path / "target", tmp_path / "data"
        train(*paths, tmp_path / "one", TrainConfig(**OPTIONS, accumulate=2), "cpu")
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs
    alone, together = steps_of(tmp_path / "one"), steps_of(tmp_path / "two")
    assert len(alone) == len(together) == 4
    for one, two in zip(alone, together, strict=True):
        for name, value in one.items():
            assert two[name] == pytest.approx(value, rel=1e-3), name
    states = [
        torch.load(tmp_path / name / "training_state.pt", weights_only=True)
        for name in ("one", "two")
    ]
    for name, weight in states[0]["head"].items():
        torch.testing.assert_close(states[1]["head"][name], weight, msg=name)
    assert len(states[1]["random"]) == 2


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
        seen += sum(int(b.assistant_BT.sum()) for b, _ in part.parts)
    assert seen == 2 * sum(int(d.assistant.sum()) for d in documents)
    later = steps(1, 3, start=2)
    for (a, _), (b, _) in zip(later[0].parts, ranks[1][2].parts, strict=True):
        assert torch.equal(a.tokens_BT, b.tokens_BT)


def test_a_step_too_small_for_its_parts_is_refused() -> None:
    with pytest.raises(ValueError, match="raise batch_tokens"):
        Loader(small.documents(4), TrainConfig(batch_tokens=3, accumulate=4), World())
