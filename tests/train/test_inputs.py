"""What a run reads and where it writes: which targets, data and folders it takes."""

import json
from pathlib import Path

import pytest

from tests.train import small
from vllm_eagle3.corpus import write_shard
from vllm_eagle3.train.trainer import TrainConfig, train

OPTIONS = {"draft_vocab_size": 80, "batch_tokens": 512, "num_ttt_steps": 2, "eval_documents": 0}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    write_shard(tmp_path / "data" / "shard-00-00000.safetensors", small.documents(60))
    return tmp_path / "data"


def test_a_target_with_a_scaled_rotary_embedding_is_trained_for_and_the_log_says_so_once(
    data: Path, tmp_path: Path
) -> None:
    small.llama(rope_parameters=small.LLAMA3_ROPE).save_pretrained(tmp_path / "target")
    out = tmp_path / "out"
    train(tmp_path / "target", data, out, TrainConfig(**OPTIONS, steps=1), "cpu")
    log = [json.loads(line) for line in (out / "training_log.jsonl").read_text().splitlines()]
    (said,) = [entry for entry in log if entry["event"] == "rotary embedding"]
    assert (said["target"], said["head"], said["rope_theta"]) == ("llama3", "not scaled", 5e5)
    assert json.loads((out / "config.json").read_text())["rope_theta"] == 5e5
