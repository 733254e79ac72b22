"""A head may learn from a share of the documents."""

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from tests.train import small
from vllm_eagle3 import cli
from vllm_eagle3.corpus import Document, write_shard
from vllm_eagle3.train import trainer
from vllm_eagle3.train.distributed import World
from vllm_eagle3.train.settings import TrainConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a target and data, in shards of very different sizes."""
    root = tmp_path_factory.mktemp("share")
    small.llama().save_pretrained(root / "target")
    (root / "data").mkdir()
    documents = small.documents(200)
    for number, part in enumerate((documents[:9], documents[9:190], documents[190:])):
        write_shard(root / "data" / f"shard-00-{number:05d}.safetensors", part)
    return root


Texts = set[tuple[int, ...]]


def drawn(folder: Path, out: Path, **settings: float) -> tuple[Texts, Texts]:
    """What a run trains on, and what it holds out."""
    config = TrainConfig(draft_vocab_size=80, **settings)
    paths = folder / "target", (folder / "data",), out
    run = trainer._Trainer(*paths, config, torch.device("cpu"), World())
    return texts(run.documents), texts(run.held_out)


def texts(documents: Sequence[Document]) -> Texts:
    return {tuple(document.tokens.tolist()) for document in documents}


def test_shares_are_nested_and_nothing_else_changes(folder: Path, tmp_path: Path) -> None:
    shares = (1.0, 0.5, 0.25, 0.01, 1e-9)
    found = [drawn(folder, tmp_path, data_share=share) for share in shares]
    assert [len(documents) for documents, _ in found] == [198, 99, 50, 2, 1]
    for (larger, _), (smaller, _) in pairwise(found):
        assert smaller < larger
    assert all(held_out == found[0][1] for _, held_out in found)
    assert drawn(folder, tmp_path)[0] == found[0][0]
    other, _ = drawn(folder, tmp_path, data_share=0.25, seed=1)
    assert other != found[2][0]


def test_a_head_of_a_share_says_so_and_goes_on_with_no_other(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def train(*more: str) -> int:
        paths = ("--target", str(folder / "target"), "--data", str(folder / "data"))
        sizes = ("--draft-vocab-size", "80", "--batch-tokens", "512", "--num-ttt-steps", "2")
        fixed = ("--out", str(tmp_path), "--device", "cpu", "--eval-documents", "0")
        return cli.main(["train", *paths, *sizes, *fixed, *more])

    assert train("--data-share", "0.25", "--steps", "1") == 0
    facts = json.loads((tmp_path / "training.json").read_text())
    documents, _ = drawn(folder, tmp_path, data_share=0.25)
    assert (facts["config"]["data_share"], facts["documents"]) == (0.25, len(documents))
    assert facts["tokens"] == sum(map(len, documents))
    assert "25 % of those that are not held out" in (tmp_path / "README.md").read_text()
    assert train("--data-share", "0.5", "--steps", "2", "--resume") == 2
    assert "was written with another data_share: give the same" in capsys.readouterr().err
    assert train("--data-share", "0.25", "--steps", "2", "--resume") == 0


@pytest.mark.parametrize("share", ["0", "-0.5", "1.01", "nan"])
def test_a_share_that_is_none_is_refused(
    share: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = ("--target", str(folder / "target"), "--data", str(folder / "data"))
    out = tmp_path / "out"
    assert cli.main(["train", *paths, "--out", str(out), "--data-share", share]) == 2
    error = capsys.readouterr().err
    assert f"data_share={float(share)} must be above 0 and at most 1" in error
    assert not out.exists()
