"""What a run takes: which settings, targets, data and folders to write to."""

import argparse
import json
import re
from math import nan
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.train import small
from vllm_eagle3.corpus import Document, write_json, write_shard
from vllm_eagle3.train import fingerprint
from vllm_eagle3.train.data import split_held_out
from vllm_eagle3.train.features import Target
from vllm_eagle3.train.packing import packed_batches
from vllm_eagle3.train.settings import add_arguments, config_from_arguments
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


@pytest.mark.parametrize(("made_for", "told"), [("llama", []), ("another", [["another"]])])
def test_data_of_another_target_is_told(
    made_for: str, told: list, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tokens may all be within the vocabulary."""
    small.llama().save_pretrained(tmp_path / "llama")
    write_json(data / "metadata.json", {"target": made_for})
    monkeypatch.chdir(tmp_path / "llama")
    out = tmp_path / "out"
    train(".", data, out, TrainConfig(**OPTIONS, steps=1), "cpu")
    log = [json.loads(line) for line in (out / "training_log.jsonl").read_text().splitlines()]
    assert [e["data"] for e in log if e["event"] == "data of other targets"] == told
    assert "head for llama\n" in (out / "README.md").read_text()


def test_a_run_does_not_go_on_with_other_data_or_another_target(data: Path, tmp_path: Path) -> None:
    """EAGLE-1's vocabulary is the target's: it is the same whatever the data."""
    small.llama().save_pretrained(tmp_path / "target")
    tuned = small.llama()
    with torch.no_grad():
        tuned.lm_head.weight[5, 7] += 0.5
    tuned.save_pretrained(tmp_path / "tuned")
    options = OPTIONS | {"objective": "eagle1", "num_ttt_steps": None}
    out = tmp_path / "out"

    def run(target: str, steps: int, resume: bool = True) -> None:
        config = TrainConfig(**options, steps=steps)
        train(tmp_path / target, data, out, config, "cpu", resume)

    run("target", 1, resume=False)
    with pytest.raises(ValueError, match="different target: give the same"):
        run("tuned", 2)
    run("target", 2)
    write_shard(data / "shard-00-00001.safetensors", small.documents(2))
    with pytest.raises(ValueError, match="different data: give the same"):
        run("target", 3)


def spoken(prompt: int, answer: int) -> Document:
    return Document(np.arange(3, 3 + prompt + answer), np.arange(prompt + answer) >= prompt)


@pytest.mark.parametrize("objective", ["eagle3", "hass"])
def test_weights_start_from_the_first_batch_that_has_an_answer(
    objective: str, data: Path, tmp_path: Path
) -> None:
    """Here that of the one document in eight whose answer begins before ``max_length``."""
    small.llama().save_pretrained(tmp_path / "target")
    answered, cut = spoken(4, 20), spoken(40, 20)
    write_shard(data / "shard-00-00000.safetensors", [answered, *[cut] * 7] * 2)
    sizes = {"batch_tokens": 32, "max_length": 32, "num_ttt_steps": None, "log_every": 1}
    config = TrainConfig(**OPTIONS | sizes, objective=objective, epochs=1)
    train(tmp_path / "target", data, tmp_path / "out", config, "cpu")
    lines = (tmp_path / "out" / "training_log.jsonl").read_text().splitlines()
    losses = [entry["loss"] for entry in map(json.loads, lines) if entry["event"] == "step"]
    assert len(losses) > 8
    assert 0 < losses.count(0.0) < len(losses)


def test_an_epoch_of_more_batches_than_the_first_is_read_to_its_end(
    data: Path, tmp_path: Path
) -> None:
    small.llama().save_pretrained(tmp_path / "target")
    corpus = small.documents(61, longest=60)
    write_shard(data / "shard-00-00000.safetensors", corpus)
    sizes = {"batch_tokens": 128, "max_length": 128, "seed": 2, "epochs": 3}
    config = TrainConfig(**OPTIONS | sizes)
    known, _ = split_held_out(corpus, config.held_out, config.seed)
    batches = [list(packed_batches(known, 128, 128, 2, 2000 + epoch)) for epoch in range(3)]
    assert [len(epoch) for epoch in batches] == [16, 16, 17]
    train(tmp_path / "target", data, tmp_path / "out", config, "cpu")
    facts = json.loads((tmp_path / "out" / "training.json").read_text())
    assert facts["steps"] == 49
    assert facts["tokens_seen"] == sum(b.tokens_BT.numel() for epoch in batches for b in epoch)


@pytest.mark.parametrize("document", [spoken(40, 20), spoken(4, 1), spoken(4, 0)])
def test_data_without_an_answer_to_learn_from_is_refused(
    document: Document, data: Path, tmp_path: Path
) -> None:
    small.llama().save_pretrained(tmp_path / "target")
    write_shard(data / "shard-00-00000.safetensors", [document] * 4)
    config = TrainConfig(**OPTIONS, max_length=32)
    with pytest.raises(ValueError, match=r"within the first 32 tokens no document has.*--max-leng"):
        train(tmp_path / "target", data, tmp_path / "out", config, "cpu")


def test_fingerprints_tell_documents_and_targets_apart_but_not_precisions() -> None:
    first, second, *_ = small.documents(2)
    joined = [*first.tokens, *second.tokens], [*first.assistant, *second.assistant]
    unlike = [
        [first, second],
        [second, first],
        [first],
        [Document(first.tokens, ~first.assistant), second],
        [Document(*map(np.array, joined))],
    ]
    assert len({fingerprint.of_documents(documents) for documents in unlike}) == len(unlike)

    def of(model: torch.nn.Module) -> str:
        return fingerprint.of_target(Target(model, ()))

    plain = of(small.llama())
    assert plain == of(small.llama().bfloat16())
    assert plain != of(small.llama(rope_parameters=small.LLAMA3_ROPE))
    assert plain != of(small.llama(initializer_range=0.1))


@pytest.mark.parametrize("left", ["training_state.pt", "training_state.previous.pt"])
def test_a_new_run_leaves_the_state_and_the_log_of_another_as_they_are(
    data: Path, tmp_path: Path, left: str
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    written = {left: "a state", "training_log.jsonl": "a log"}
    for name, text in written.items():
        (out / name).write_text(text)
    with pytest.raises(ValueError, match=r"with --resume, or start anew in another --out"):
        train(tmp_path / "target", data, out, TrainConfig(**OPTIONS), "cpu")
    assert {path.name: path.read_text() for path in out.iterdir()} == written


@pytest.mark.parametrize(
    ("setting", "refused", "accepted"),
    [
        ("clip", [0.0, -1.0, nan], [1e-3]),
        ("learning_rate", [0.0, -1e-4, nan], [1e-4]),
        ("warmup", [-0.1, 1.0, nan], [0.0, 0.99]),
        ("held_out", [-0.1, 1.0, nan], [0.0, 0.5]),
        ("ttt_decay", [0.0, -0.8, 1.1, nan], [0.1, 1.0]),
        ("minutes", [0.0, -1.0, nan], [0.1]),
        ("seed", [-1], [0, 7]),
    ],
)
def test_a_setting_out_of_its_range_is_named(
    setting: str, refused: list[float], accepted: list[float]
) -> None:
    for value in refused:
        with pytest.raises(ValueError, match=f"{setting}={value} must be"):
            TrainConfig(**{setting: value})
    for value in accepted:
        assert 0 < TrainConfig(**{setting: value}).rate(0.5) < 1e-3


@pytest.mark.parametrize("settings", [{"eval_chain": 64}, {"eval_tree": (64, 5, 16)}])
def test_a_chain_or_tree_that_cannot_be_grown_is_named(settings: dict) -> None:
    ((name, value),) = settings.items()
    with pytest.raises(ValueError, match=f"^{re.escape(f'{name}={value}: ')}.*at most 63"):
        TrainConfig(**settings)


@pytest.mark.parametrize(("text", "shape"), [("6/2/4", (6, 2, 4)), ("31", (31, 5, 16))])
def test_the_tree_of_the_evaluation_is_named_as_elsewhere(
    text: str, shape: tuple[int, int, int]
) -> None:
    assert parsed("--eval-tree", text).eval_tree == shape


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("6/2", "6/2: give the number"),
        ("6,2,4", "as in 31/5/16"),
        ("6/1/4", "argument --eval-tree: 6/1/4: "),
    ],
)
def test_a_tree_of_another_form_is_named(
    text: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parsed("--eval-tree", text)
    assert message in capsys.readouterr().err


def parsed(*options: str) -> TrainConfig:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    paths = ("--target", "target", "--data", "data", "--out", "out")
    return config_from_arguments(parser.parse_args([*paths, *options]))
