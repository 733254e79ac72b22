"""Heads whose weights are pickled, as older ones are, and heads that vLLM has yet to download."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.engine import tiny
from tests.engine.engines import tree
from tests.engine.naive_head import write_head
from tests.engine.test_activation import configure
from vllm_eagle3.engine import head
from vllm_eagle3.train.objectives import OBJECTIVES

CONFIG = tiny.head_config()


def write_pickled(path: Path, weights: Any, config: dict[str, Any] = CONFIG, **saved: Any) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    torch.save(weights, path / "pytorch_model.bin", **saved)
    return path


def serve(pair: tiny.Pair, path: Path, **changes: Any) -> Any:
    return configure(pair, tree(tiny.Pair(pair.target, path), 12, depth=3, top_k=4) | changes)


@pytest.mark.parametrize("archive", [True, False])
def test_a_pickled_head_serves(pair, tmp_path, archive):
    path = write_pickled(
        tmp_path / "head", tiny.head_tensors(), _use_new_zipfile_serialization=archive
    )
    torch.save({"lr": 0.1}, path / "training_args.bin")
    serve(pair, path)


@pytest.mark.parametrize(
    ("weights", "config", "message"),
    [
        (
            tiny.head_tensors(hidden_size=64),
            tiny.head_config(hidden_size=64),
            "hidden size 64, .*has 128: use the head of this target",
        ),
        (
            tiny.head_tensors(vocab_size=640),
            tiny.head_config(vocab_size=640),
            "vocabulary of 640 tokens, .*has 512: use the head of this target",
        ),
        ({"fc.weight": torch.zeros(4, 4)}, CONFIG, "not an EAGLE-3 head"),
        ({"state_dict": tiny.head_tensors()}, CONFIG, "no dictionary of tensors"),
        ({"fc.weight": Path("/")}, CONFIG, "no PyTorch file of weights alone"),
    ],
)
def test_a_wrong_pickled_head(pair, tmp_path, weights, config, message):
    path = write_pickled(tmp_path / "head", weights, config)
    with pytest.raises(ValueError, match=message) as error:
        serve(pair, path)
    assert str(path) in str(error.value)


def test_a_truncated_pickled_head(pair, tmp_path):
    path = write_pickled(tmp_path / "head", tiny.head_tensors())
    file = path / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is truncated"):
        serve(pair, path)


def test_a_pickled_head_by_the_wrong_method(pair, tmp_path):
    path = write_pickled(tmp_path / "head", tiny.head_tensors())
    with pytest.raises(ValueError, match=r'is an EAGLE-3 head: set "method": "eagle3"'):
        serve(pair, path, method="eagle")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (tiny.head_config(hidden_size=64), "hidden size 64, .*has 128: use the head of this"),
        (tiny.head_config(vocab_size=640), "vocabulary of 640 tokens, .*has 512: use the head"),
        (CONFIG | {"target_hidden_size": 96}, "hidden size 96, .*has 128: use the head of this"),
    ],
)
def test_the_config_tells_of_a_head_that_is_not_here(pair, tmp_path, monkeypatch, config, message):
    """Of a name that vLLM downloads, its config comes first and its weights with the engine."""
    monkeypatch.setattr(head, "check_files", lambda path, method: None)
    path = write_pickled(tmp_path / "head", {}, config)
    with pytest.raises(ValueError, match=message):
        serve(pair, path)
    fits = write_pickled(tmp_path / "fits", {}, config | CONFIG | {"target_hidden_size": 128})
    serve(pair, fits)


def test_a_pickled_eagle_1_head(pair, tmp_path, monkeypatch):
    """By its files and, as if it were yet to be downloaded, by its config."""
    write_head(tmp_path / "saved", pair.target, OBJECTIVES["eagle1"])
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    weights = load_file(tmp_path / "saved" / "model.safetensors")
    path = write_pickled(tmp_path / "head", weights, config)
    with pytest.raises(ValueError, match='set "method": "eagle" in the speculative config'):
        serve(pair, path)
    serve(pair, path, method="eagle")
    other = write_pickled(tmp_path / "other", weights, config | {"vocab_size": 640})
    monkeypatch.setattr(head, "check_files", lambda path, method: None)
    serve(pair, path, method="eagle")
    with pytest.raises(ValueError, match=r"vocabulary of 640 tokens, .*has 512"):
        serve(pair, other, method="eagle")
