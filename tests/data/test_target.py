"""A target that Transformers cannot read is told in one line that names the option."""

import pytest
import torch

from vllm_eagle3.bench.llm import kv_bytes_per_token
from vllm_eagle3.data.target import load_tokenizer
from vllm_eagle3.train.features import load_target


@pytest.mark.parametrize(
    "read",
    [
        load_tokenizer,
        lambda target: load_target(target, torch.float32),
        lambda target: kv_bytes_per_token({"model": target, "dtype": "auto"}),
    ],
    ids=["tokenizer", "weights", "sizes"],
)
def test_a_target_that_is_not_there(tmp_path, monkeypatch, read):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"^--target \./nope: [^\n]+$"):
        read("./nope")


def test_a_target_without_weights(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match=r"^--target [^\n]+no file named[^\n]+$"):
        load_target(tmp_path, torch.float32)
