"""What goes wrong around training ends in one clear line, and nothing is lost."""

import json
from pathlib import Path

import pytest
import torch

from tests.full_disk import fill_disk_for, no_room
from tests.train import small
from vllm_eagle3 import cli
from vllm_eagle3.corpus import write_json, write_shard
from vllm_eagle3.train import trainer
from vllm_eagle3.train.export import export
from vllm_eagle3.train.logs import LOG_FILE, RunLog

OPTIONS = (
    *("--device", "cpu", "--draft-vocab-size", "80", "--batch-tokens", "512"),
    *("--num-ttt-steps", "2", "--eval-documents", "0", "--steps", "2"),
)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("target")
    small.llama().save_pretrained(path)
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    write_shard(tmp_path / "data" / "shard-00-00000.safetensors", small.documents(60))
    return tmp_path / "data"


def train(target: Path, data: Path, out: Path, *more: str) -> int:
    paths = ("--target", str(target), "--data", str(data), "--out", str(out))
    return cli.main(["train", *paths, *OPTIONS, *more])


def test_a_corrupt_shard_is_named(
    target: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = data / "shard-00-00001.safetensors"
    write_shard(shard, small.documents(4))
    shard.write_bytes(shard.read_bytes()[:-5])
    assert train(target, data, tmp_path / "out") == 2
    assert f"{shard} is not a shard of training data" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["mixtral", "qwen2"])
def test_a_target_that_is_no_llama_is_named(
    kind: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_json(tmp_path / "config.json", {"model_type": kind})
    assert train(tmp_path, data, tmp_path / "out") == 2
    assert f"is of type {kind!r}: heads can be trained for" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["config.json", "README.md", "training.json"])
def test_a_head_that_could_not_be_written_is_after_resuming(
    name: str, target: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    fill_disk_for(out / name)
    assert train(target, data, out) == 2
    error = capsys.readouterr().err
    assert f"{out / name} could not be written" in error
    assert "No space left" in error
    assert "--resume" in error
    written = {"training.json"} - {name}  # first of all; nothing of a head without the rest
    assert {p.name for p in out.iterdir() if p.suffix != ".pt"} == written | {LOG_FILE}
    assert torch.load(out / "training_state.pt", weights_only=True)["progress"]["step"] == 2
    assert train(target, data, out, "--resume") == 0
    assert {"model.safetensors", "config.json", "README.md"} <= {p.name for p in out.iterdir()}
    assert not list(out.glob(".*"))


@pytest.mark.parametrize("every", ["2", "500"])
def test_an_interruption_of_an_evaluation_loses_no_step(
    every: str, target: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the last one, or of one on the way."""

    def interrupted(*_arguments: object) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "evaluate", interrupted)
        options = ("--steps", "3", "--eval-every", every, "--save-every", "2")
        assert train(target, data, out, *options) == 130
    saved = torch.load(out / "training_state.pt", weights_only=True)["progress"]["step"]
    assert saved == (2 if every == "2" else 3)
    assert train(target, data, out, *options, "--resume") == 0
    assert (out / "model.safetensors").is_file()


def test_a_state_that_could_not_be_written_leaves_the_one_before(
    target: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert train(target, data, out, "--steps", "1") == 0
    fill_disk_for(out / "training_state.pt")
    assert train(target, data, out, "--resume") == 2
    assert "state of step 2; free some space" in capsys.readouterr().err
    assert torch.load(out / "training_state.pt", weights_only=True)["progress"]["step"] == 1
    assert train(target, data, out, "--resume") == 0


def test_a_gpu_with_too_little_memory_is_told_in_a_line(
    target: Path, data: Path, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def out_of_memory(*_arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(torch.Tensor, "backward", out_of_memory)
    assert train(target, data, tmp_path / "out") == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "too little memory (CUDA out of memory. Tried" in last
    assert "--recompute or a larger --accumulate" in last


def test_a_head_that_stood_there_outlives_a_full_disk(tmp_path: Path) -> None:
    _, head = small.pair(torch.float32)
    before = (export(head, tmp_path) / "model.safetensors").read_bytes()
    with torch.no_grad():
        head.norm.weight.add_(1)
    with no_room(), pytest.raises(ValueError, match=r"model\.safetensors could not be written"):
        export(head, tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert not list(tmp_path.glob(".*"))


def test_a_log_on_a_full_disk_says_so(tmp_path: Path) -> None:
    (tmp_path / "training_log.jsonl").symlink_to("/dev/full")
    with pytest.raises(ValueError, match=r"training_log\.jsonl could not be written.*--resume"):
        RunLog(tmp_path, resume=True).write("step", step=1)


def test_shards_and_figures_of_data_name_what_a_full_disk_kept_from_being_written(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = data / "shard-00-00001.safetensors"
    with no_room(), pytest.raises(ValueError, match=f"{shard.name} could not be written"):
        write_shard(shard, small.documents(4))
    fill_disk_for(data / "analysis.json")
    assert cli.main(["data", "analyse", str(data)]) == 2
    shown = capsys.readouterr()
    assert f"{data / 'analysis.json'} could not be written" in shown.err
    assert "documents" in shown.out  # the tables are printed before
    assert cli.main(["data", "analyse", str(data)]) == 0
    assert json.loads((data / "analysis.json").read_text())["documents"] == 60


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "config.json"])
def test_a_head_is_not_overwritten(
    name: str, target: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("another's")
    assert train(target, data, out) == 2
    assert f"{out} holds a checkpoint already: give another --out" in capsys.readouterr().err
    assert [(path.name, path.read_text()) for path in out.iterdir()] == [(name, "another's")]


def test_a_head_learns_from_several_folders(target: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    write_shard(tmp_path / "more" / "shard-00-00000.safetensors", small.documents(9))
    out = tmp_path / "out"
    paths = ("--target", str(target), "--data", str(data), str(tmp_path / "more"))
    assert cli.main(["train", *paths, "--out", str(out), *OPTIONS]) == 0
    state = torch.load(out / "training_state.pt", weights_only=True)
    assert state["inputs"]["data"].startswith("69 documents, ")
    assert train(target, data, out, "--resume") == 2  # other data


@pytest.mark.parametrize(
    ("device", "message"),
    [("gpu", "--device gpu: use cuda or cpu"), ("cuda:99", "--device cuda:99: torch sees ")],
)
def test_a_device_that_is_not_there_is_named(
    device: str, message: str, target: Path, data: Path, tmp_path: Path, capsys
) -> None:
    assert train(target, data, tmp_path / "out", "--device", device) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_conversations_are_no_shards_and_a_file_is_no_place_for_a_head(
    target: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chats = tmp_path / "chats.jsonl"
    chats.touch()
    assert train(target, chats, tmp_path / "out") == 2
    assert f"{chats} is a file: give a folder of shards" in capsys.readouterr().err
    assert train(target, data, chats) == 2
    assert f"--out {chats} is a file: give a folder" in capsys.readouterr().err
