"""Heads of every public layout become the flat head that vLLM loads, or an error that asks."""

import filecmp
import re
from pathlib import Path

import pytest
import torch

import vllm_eagle3
from tests.heads import checkpoints
from tests.heads.checkpoints import ENTERED, LEFT
from vllm_eagle3 import cli
from vllm_eagle3.heads.convert import convert

DEMO = Path(vllm_eagle3.__file__).parent / "demo" / "head"


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return checkpoints.write_target(tmp_path / "target")


def converted(source: Path, target: Path, **options):
    out_dir = source.with_name(f"{source.name}-converted")
    convert(source, out_dir, target, **options)
    return checkpoints.read(out_dir)


def layer_ids(config) -> list[int] | None:
    """Where vLLM's runner reads them, and the same where its head and SGLang do."""
    ids = config.get("eagle_aux_hidden_state_layer_ids")
    assert config["eagle_config"].get("eagle_aux_hidden_state_layer_ids") == ids
    return ids


def test_the_shipped_head_there_and_back(tmp_path):
    target = checkpoints.write_target(
        tmp_path / "target", hidden_size=576, vocab_size=49152, num_hidden_layers=30
    )
    convert(DEMO, tmp_path / "speculators", target, to="speculators", target_name="SmolLM2")
    convert(tmp_path / "speculators", tmp_path / "flat", target)
    weights = "model.safetensors"
    assert filecmp.cmp(tmp_path / "flat" / weights, DEMO / weights, shallow=False)
    config, _ = checkpoints.read(tmp_path / "flat")
    original, _ = checkpoints.read(DEMO)
    # The ids are the default: left out, because SGLang would count them differently.
    assert layer_ids(config) is None
    assert config.items() >= original.items()


def test_flat_to_speculators_and_back_is_the_same_file(tmp_path, target):
    source = checkpoints.write(
        tmp_path / "head", checkpoints.flat((3, 5, 8)), checkpoints.tensors()
    )
    convert(source, tmp_path / "a", target, layer_ids_convention="entered")
    convert(tmp_path / "a", tmp_path / "b", target, to="speculators")
    convert(tmp_path / "b", tmp_path / "c", target)
    for name in ("config.json", "model.safetensors"):
        assert filecmp.cmp(tmp_path / "a" / name, tmp_path / "c" / name, shallow=False)
    config, weights = checkpoints.read(tmp_path / "b")
    assert config["eagle_aux_hidden_state_layer_ids"] == [3, 5, 8]
    assert config["speculators_config"]["verifier"]["name_or_path"] == str(target)
    assert config["transformer_layer_config"]["rope_theta"] == 500000.0
    checkpoints.assert_equal(weights, checkpoints.tensors("layers.0"))


@pytest.mark.parametrize("ids", [None, ENTERED, LEFT])
def test_default_layers_are_recognised_by_either_count(tmp_path, target, ids):
    source = checkpoints.write(tmp_path / "head", checkpoints.flat(ids), checkpoints.tensors())
    config, weights = converted(source, target)
    assert layer_ids(config) is None
    assert config["rope_theta"] == 500000.0
    checkpoints.assert_equal(weights, checkpoints.tensors())


def test_other_layers_are_asked_for(tmp_path, target):
    source = checkpoints.write(
        tmp_path / "head", checkpoints.flat((1, 4, 8)), checkpoints.tensors()
    )
    with pytest.raises(ValueError, match="--layer-ids-convention"):
        converted(source, target)
    config, _ = converted(source, target, layer_ids_convention="left")
    assert layer_ids(config) == [2, 5, 9]


def test_the_eagle_repository_trained_with_its_own_base(tmp_path, target):
    source = checkpoints.write(
        tmp_path / "head", checkpoints.eagle_repository(), checkpoints.tensors()
    )
    config, _ = converted(source, target)
    assert config["rope_theta"] == 10000.0
    assert config["architectures"] == ["LlamaForCausalLMEagle3"]


def test_a_base_that_contradicts_the_trainer_is_asked_for(tmp_path, target):
    source = checkpoints.write(
        tmp_path / "head", checkpoints.eagle_repository(rope_theta=5e5), checkpoints.tensors()
    )
    with pytest.raises(ValueError, match="--rope-theta"):
        converted(source, target)
    assert converted(source, target, rope_theta=1e4)[0]["rope_theta"] == 1e4


def test_pickled_weights_with_the_targets_embedding(tmp_path):
    embedding = torch.randn(checkpoints.VOCABULARY, checkpoints.HIDDEN)
    target = checkpoints.write_target(tmp_path / "target", embedding)
    source = checkpoints.write(tmp_path / "head", checkpoints.eagle_repository(), {})
    (source / "model.safetensors").unlink()
    weights = checkpoints.tensors() | {"embed_tokens.weight": embedding.bfloat16()}
    torch.save(weights, source / "pytorch_model.bin")
    checkpoints.assert_equal(converted(source, target)[1], checkpoints.tensors())


def test_an_embedding_of_its_own_is_kept(tmp_path):
    target = checkpoints.write_target(
        tmp_path / "target", torch.randn(checkpoints.VOCABULARY, checkpoints.HIDDEN)
    )
    weights = checkpoints.tensors()
    weights["embed_tokens.weight"] = torch.randn(checkpoints.VOCABULARY, checkpoints.HIDDEN)
    source = checkpoints.write(tmp_path / "head", checkpoints.flat(), weights)
    checkpoints.assert_equal(converted(source, target)[1], weights)


def test_speculators_with_every_norm(tmp_path, target):
    norms = {f"fc_norm.{i}.weight": torch.full((checkpoints.HIDDEN,), i + 1.0) for i in range(3)}
    config = checkpoints.speculators(fc_norm=True, norm_output=True, norm_before_residual=True)
    source = checkpoints.write(tmp_path / "head", config, checkpoints.tensors("layers.0") | norms)
    config, weights = converted(source, target)
    assert [config[flag] for flag in ("fc_norm", "norm_output", "norm_before_residual")] == [
        True
    ] * 3
    assert "norm_before_fc" not in config
    assert config["rope_theta"] == 500000.0
    assert "rope_parameters" not in config
    checkpoints.assert_equal(weights, checkpoints.tensors() | norms)


@pytest.mark.parametrize(("meaning", "kept"), [("fed-back", True), ("before-head", False)])
def test_norm_output_means_two_things(tmp_path, target, meaning, kept):
    source = checkpoints.write(
        tmp_path / "head", checkpoints.flat(norm_output=True), checkpoints.tensors()
    )
    with pytest.raises(ValueError, match="--norm-output"):
        converted(source, target)
    assert converted(source, target, norm_output=meaning)[0].get("norm_output", False) is kept


def test_an_unwritten_residual_is_asked_for(tmp_path, target):
    config = checkpoints.speculators()
    del config["norm_before_residual"]
    source = checkpoints.write(tmp_path / "head", config, checkpoints.tensors("layers.0"))
    with pytest.raises(ValueError, match="--norm-before-residual"):
        converted(source, target)
    assert converted(source, target, norm_before_residual=True)[0]["norm_before_residual"] is True


def test_target_ids_become_offsets(tmp_path, target):
    weights = checkpoints.tensors()
    weights["d2t"] = weights["d2t"] + torch.arange(checkpoints.DRAFTED)
    weights["t2d"] = weights["t2d"].to(torch.uint8)
    source = checkpoints.write(tmp_path / "head", checkpoints.flat(), weights)
    checkpoints.assert_equal(converted(source, target)[1], checkpoints.tensors())


def test_a_map_of_two_readings_is_refused(tmp_path, target):
    weights = checkpoints.tensors()
    del weights["t2d"]
    source = checkpoints.write(tmp_path / "head", checkpoints.flat(), weights)
    # Increasing offsets without t2d: they would be target ids just as well.
    with pytest.raises(ValueError, match="offsets or target ids"):
        converted(source, target)


def test_a_missing_t2d_is_made_where_d2t_has_one_reading(tmp_path, target):
    ids = torch.arange(checkpoints.DRAFTED) + 3
    weights = checkpoints.tensors() | {"d2t": ids - torch.arange(checkpoints.DRAFTED)}
    del weights["t2d"]
    source = checkpoints.write(tmp_path / "head", checkpoints.flat(), weights)
    _, found = converted(source, target)
    assert found["t2d"].nonzero()[:, 0].equal(ids)
    assert found["d2t"].equal(weights["d2t"])


@pytest.mark.parametrize("to", ["flat", "speculators"])
def test_four_captured_states_are_counted_where_vllm_looks(tmp_path, target, to):
    ids = (2, 4, 6, 8)
    source = checkpoints.write(
        tmp_path / "head", checkpoints.flat(ids), checkpoints.tensors(captured=4)
    )
    config, _ = converted(source, target, to=to, layer_ids_convention="entered")
    assert config.get("transformer_layer_config", config)["num_aux_hidden_states"] == 4
    convert(tmp_path / "head-converted", tmp_path / "again", target)
    assert layer_ids(checkpoints.read(tmp_path / "again")[0]) == list(ids)


def test_scaled_rotary_positions_stay_scaled(tmp_path, target):
    scaling = {"rope_type": "llama3", "factor": 8.0}
    config = checkpoints.flat(rope_parameters={"rope_theta": 7e5, **scaling})
    source = checkpoints.write(tmp_path / "head", config, checkpoints.tensors())
    config, _ = converted(source, target)
    assert (config["rope_theta"], config["rope_scaling"]) == (7e5, scaling)


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        ({}, {"d2t": torch.zeros(checkpoints.DRAFTED, dtype=torch.long)}, "the maps contradict"),
        ({}, {"d2t": None}, "without d2t"),
        ({}, {"optimizer.step": torch.zeros(1)}, "'optimizer.step' is none of an EAGLE-3"),
        ({"draft_vocab_size": 8}, {}, "draft_vocab_size=8, but lm_head.weight has 16"),
        ({"fc_norm": True}, {}, "fc_norm=True"),
        ({"num_hidden_layers": 2}, {}, "num_hidden_layers=2, but tensors of 1"),
        ({"model_type": "qwen3"}, {}, "model_type='qwen3'"),
        ({}, {"fc.bias": torch.zeros(checkpoints.HIDDEN)}, "not an EAGLE-3 head"),
        ({}, {"t2d": None, "d2t": None, "lm_head.weight": None}, "no lm_head.weight"),
    ],
)
def test_contradictions_are_refused(tmp_path, target, config, change, message):
    weights = checkpoints.tensors() | change
    weights = {name: tensor for name, tensor in weights.items() if tensor is not None}
    source = checkpoints.write(tmp_path / "head", checkpoints.flat(**config), weights)
    with pytest.raises(ValueError, match=re.escape(message)):
        convert(source, tmp_path / "out", target)
    assert not (tmp_path / "out").exists()


def test_a_head_of_another_target_is_refused(tmp_path):
    source = checkpoints.write(tmp_path / "head", checkpoints.flat(), checkpoints.tensors())
    other = checkpoints.write_target(tmp_path / "other", hidden_size=32)
    with pytest.raises(ValueError, match=r"hidden size 16.*other has 32"):
        convert(source, tmp_path / "out", other)


def test_the_command(tmp_path, target, capsys):
    source = checkpoints.write(tmp_path / "head", checkpoints.flat(LEFT), checkpoints.tensors())
    command = ["convert-head", str(source), str(tmp_path / "out"), "--target", str(target)]
    assert cli.main(command) == 0
    assert "entered 2, 5, 7 (the ids are 1, L//2-1, L-4 of 10 layers)" in capsys.readouterr().out
    assert cli.main(command) == 2
    assert "holds a checkpoint already" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_names_the_setting(tmp_path, target):
    source = checkpoints.write(tmp_path / "head", checkpoints.flat(), checkpoints.tensors())
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"file/out could not be written .*another OUT"):
        convert(source, tmp_path / "file" / "out", target)
