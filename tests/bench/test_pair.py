"""What is refused of a target and its head before any engine starts, whatever is measured."""

import argparse
import json

import pytest
import torch

from tests.heads import checkpoints
from tests.train import small
from vllm_eagle3 import cli
from vllm_eagle3.bench.configurations import PLAIN, chain, tree
from vllm_eagle3.bench.pair import check_context, check_pair, check_prediction
from vllm_eagle3.train.export import export

COMMANDS = ["eval", "bench acceptance", "bench speed", "bench serving", "bench memory"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A Llama and an EAGLE-3 head that training wrote, on disk."""
    folder = tmp_path_factory.mktemp("pair")
    target, head = small.pair(torch.float32)
    target.model.save_pretrained(folder / "target")
    export(head, folder / "head")
    return folder / "target", folder / "head"


def options(target, head):
    return argparse.Namespace(target=str(target), head=str(head))


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("target", "head", "message"),
    [
        ("somebody/target", "./nope", "--head ./nope: no such folder"),
        ("./nope", "somebody/head", "--target ./nope: no such folder"),
        (
            "somebody/target",
            "nope",
            "--head nope: no such folder (to download one, give OWNER/NAME)",
        ),
    ],
)
def test_every_command_looks_for_both(tmp_path, capsys, command, target, head, message):
    models = ["--target", target, "--head", head, "--chain", "3", "--tree"]
    out = ["--output", str(tmp_path / "r.json")]
    assert cli.main([*command.split(), *models, *out]) == 2
    assert capsys.readouterr().err == f"vllm-eagle3: {message}\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_asks_whether_the_head_fits(tmp_path, capsys, command):
    target = checkpoints.write_target(tmp_path / "target", hidden_size=8)
    head = checkpoints.write(tmp_path / "head", checkpoints.flat(), checkpoints.tensors())
    models = ["--target", str(target), "--head", str(head), "--chain", "3", "--tree"]
    assert cli.main([*command.split(), *models, "--output", str(tmp_path / "r.json")]) == 2
    assert "made for a target of hidden size 16" in capsys.readouterr().err


@pytest.mark.parametrize("command", [c for c in COMMANDS if c != "bench speed"])
def test_a_context_shorter_than_asked_for_is_refused(tmp_path, pair, capsys, command):
    target, head = map(str, pair)
    models = ["--target", target, "--head", head, "--chain", "3", "--tree"]
    models += ["--max-model-len", "4096", "--output", str(tmp_path / "r.json")]
    assert cli.main([*command.split(), *models]) == 2
    assert "4096 are asked for: lower --max-model-len" in capsys.readouterr().err


def test_the_context_is_that_which_vllm_grants(tmp_path, monkeypatch):
    def check(length, **config):
        (tmp_path / "config.json").write_text(json.dumps(config))
        check_context(str(tmp_path), length, "--max-tokens")

    check(512, max_position_embeddings=512)
    check(512)
    check(1024, max_position_embeddings=512, rope_scaling={"type": "linear", "factor": 2.0})
    llama3 = {"rope_type": "llama3", "factor": 8.0}
    for refused in (
        {"max_position_embeddings": 512},
        {"text_config": {"max_position_embeddings": 512}},
        {"max_position_embeddings": 512, "rope_parameters": llama3},
    ):
        with pytest.raises(ValueError, match=r"context of 512 tokens, 513 .* --max-tokens"):
            check(513, **refused)
    monkeypatch.setenv("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")
    check(513, max_position_embeddings=512)


def test_models_that_vllm_downloads_are_not_looked_at():
    check_pair(options("somebody/target", "somebody/head"), [chain(3), tree(8)], 10**6)


def test_plain_decoding_needs_no_head(pair):
    check_pair(options(pair[0], "./nope"), [PLAIN])


def test_what_can_be_predicted_passes(pair):
    check_prediction(options(*pair))


def test_what_cannot_be_predicted_names_the_way_out(tmp_path, pair):
    target, head = pair
    other = checkpoints.write_target(tmp_path / "qwen", model_type="qwen2")
    kept = tmp_path / "kept"
    config, weights = checkpoints.read(head)
    weights["embed_tokens.weight"] = torch.zeros(config["vocab_size"], config["hidden_size"])
    checkpoints.write(kept, config, weights)
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text(json.dumps(config))
    torch.save(weights, pickled / "pytorch_model.bin")
    for models, reason in [
        ((other, head), "of type 'qwen2'"),
        ((target, kept), "embed_tokens.weight not known"),
        ((target, pickled), "model.safetensors"),
        ((target, "somebody/head"), "no folder here"),
    ]:
        with pytest.raises(ValueError, match=rf"{reason}.*use --no-prediction"):
            check_prediction(options(*models))
