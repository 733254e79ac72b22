"""Which method of vLLM a head is asked for by."""

import pytest
import torch

from tests.heads import checkpoints
from tests.train import small
from vllm_eagle3.heads.method import method_of
from vllm_eagle3.train.export import export
from vllm_eagle3.train.objectives import OBJECTIVES


@pytest.mark.parametrize("name", ["eagle3", "eagle3.1", "eagle1", "hass"])
def test_the_method_of_what_training_writes(name, tmp_path):
    objective = OBJECTIVES[name]
    _, head = small.head_for(objective, torch.float32)
    assert method_of(export(head, tmp_path)) == objective.method


def test_a_name_that_vllm_downloads_counts_as_eagle3():
    assert method_of("somebody/EAGLE3-head") == "eagle3"


def test_a_path_is_no_name_to_download(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "heads").mkdir()
    for mistyped in ("./nope", "../nope", "~/nope", "/nope", "a/b/nope"):
        with pytest.raises(ValueError, match=f"{mistyped}: no such folder"):
            method_of(mistyped)
    with pytest.raises(ValueError, match="no such folder in heads; to download"):
        method_of("heads/nope")


def test_a_folder_without_a_head_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no config\.json"):
        method_of(tmp_path)
    other = {"lm_head.weight": checkpoints.tensors()["lm_head.weight"]}
    path = checkpoints.write(tmp_path / "other", checkpoints.flat(), other)
    with pytest.raises(ValueError, match="no EAGLE head"):
        method_of(path)
