"""Heads of every kind on disk: what they compute, and what their files say they are."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.train import small
from vllm_eagle3.heads.checkpoint import Checkpoint
from vllm_eagle3.heads.conventions import LAYER_IDS
from vllm_eagle3.heads.description import EAGLE1, EAGLE3, EAGLE31, describe
from vllm_eagle3.heads.serving import serving
from vllm_eagle3.heads.target import TargetShape
from vllm_eagle3.train.data import epoch_batches
from vllm_eagle3.train.export import export, load_head
from vllm_eagle3.train.objectives import OBJECTIVES

KINDS = {
    "eagle3": EAGLE3,
    "eagle3.1": EAGLE31,
    "eagle3-top": EAGLE3,
    "eagle1": EAGLE1,
    "hass": EAGLE1,
}


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_a_loaded_head_computes_what_the_exported_one_did(name: str, tmp_path: Path) -> None:
    objective = OBJECTIVES[name]
    target, head = small.head_for(objective, torch.float32)
    tokens = next(epoch_batches(small.documents(4), 512, 64, seed=0))
    batch = objective.read(target, tokens, head)
    path = export(head, tmp_path, dtype="float32")
    loaded = load_head(path, target.embedding, target.output_matrix)
    assert loaded.config == head.config
    with torch.no_grad():
        expected = objective.loss(head, batch, objective.settings)
        result = objective.loss(loaded, batch, objective.settings)
    torch.testing.assert_close(result.losses_K, expected.losses_K)


@pytest.mark.parametrize("name", ["eagle3", "eagle3-top"])
def test_layer_ids_are_where_vllm_looks_for_them(name: str, tmp_path: Path) -> None:
    _, head = small.head_for(OBJECTIVES[name], torch.float32)
    verdict = serving(describe(Checkpoint.open(export(head, tmp_path))))
    assert (verdict.chain, verdict.tree, verdict.refusals) == (True, True, ())
    # The engine's runner reads the one, its head counts the other.
    config = json.loads((tmp_path / "config.json").read_text())
    ids = list(head.config.aux_layer_ids)
    assert config[LAYER_IDS] == config["eagle_config"][LAYER_IDS] == ids


@pytest.mark.parametrize(("name", "written"), [("eagle3", False), ("eagle3-top", True)])
def test_default_layer_ids_are_left_out(name: str, written: bool, tmp_path: Path) -> None:
    """So that SGLang, which counts ids otherwise than vLLM, captures the same layers."""
    target, head = small.head_for(OBJECTIVES[name], torch.float32)
    depth = target.config.num_hidden_layers
    export(head, tmp_path, num_target_layers=depth)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (LAYER_IDS in config, LAYER_IDS in config["eagle_config"]) == (written, written)
    loaded = load_head(tmp_path, target.embedding, num_target_layers=depth)
    assert loaded.config.aux_layer_ids == head.config.aux_layer_ids
    shape = TargetShape("target", target.config.hidden_size, target.config.vocab_size, depth)
    description = describe(Checkpoint.open(tmp_path), shape)
    verdict = serving(description, shape)
    assert description.layers_entered == head.config.aux_layer_ids
    assert (verdict.tree, verdict.warnings, bool(verdict.notes)) == (True, (), written)


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_a_heads_files_leave_no_convention_open(name: str, tmp_path: Path) -> None:
    _, head = small.head_for(OBJECTIVES[name], torch.float32)
    # Without a target to compare with, and with a rotary base that is not everybody's.
    found = describe(Checkpoint.open(export(head, tmp_path)))
    assert found.kind == KINDS[name]
    assert not found.problems
    assert found.rotary.value == head.config.rope_theta == 20000.0
    assert found.norm_output.value == head.config.norm_output
    assert found.fc_norm == head.config.fc_norm
    if found.kind != EAGLE1:
        assert found.layers_entered == head.config.aux_layer_ids
        assert found.num_captured == len(head.config.aux_layer_ids)
        assert found.vocabulary.size == 64
    weights = load_file(tmp_path / "model.safetensors")
    assert all(w.dtype == torch.bfloat16 for w in weights.values() if w.is_floating_point())


def test_an_eagle1_head_has_neither_vocabulary_nor_output_matrix(tmp_path: Path) -> None:
    target, head = small.head_for(OBJECTIVES["eagle1"], torch.float32)
    names = set(load_file(export(head, tmp_path) / "model.safetensors"))
    layer = "layers.0"
    assert names == {
        "fc.weight",
        *(f"{layer}.self_attn.{p}_proj.weight" for p in "qkvo"),
        *(f"{layer}.mlp.{p}_proj.weight" for p in ("gate", "up", "down")),
        f"{layer}.post_attention_layernorm.weight",
    }
    with pytest.raises(ValueError, match="needs the target's output matrix"):
        load_head(tmp_path, target.embedding)


def test_what_is_no_head_of_this_target_is_refused(tmp_path: Path) -> None:
    target, head = small.pair(torch.float32)
    with pytest.raises(ValueError, match=r"config\.json and model\.safetensors"):
        load_head(tmp_path, target.embedding)
    with pytest.raises(ValueError, match=r"\(96, 32\), this target has \(96, 31\)"):
        load_head(export(head, tmp_path), target.embedding[:, 1:])


def test_a_head_that_vllm_computes_otherwise_is_refused(tmp_path: Path) -> None:
    target, head = small.pair(torch.float32)
    path = export(head, tmp_path)
    config = json.loads((path / "config.json").read_text())

    def load(num_target_layers: int | None = 8, **changes: object):
        (path / "config.json").write_text(json.dumps(config | changes))
        return load_head(path, target.embedding, num_target_layers=num_target_layers)

    for changes, message in (
        ({"norm_before_residual": True}, "norm_before_residual not known"),
        ({"norm_before_fc": True}, "norm_before_fc not known"),
        ({"eagle_config": {"norm_before_fc": True}}, "norm_before_fc not known"),
        *(
            ({"eagle_config": {name: True}}, f"{name} stands in eagle_config, .*convert-head")
            for name in ("fc_norm", "norm_before_residual", "norm_output")
        ),
        ({"fc_norm": True}, r"fc_norm\.0\.weight missing"),
        ({"intermediate_size": 40}, r"down_proj\.weight of shape \(32, 48\), not \(32, 40\)"),
    ):
        with pytest.raises(ValueError, match=message):
            load(**changes)
    for key in ("head_dim", "vocab_size"):
        del config[key]
        with pytest.raises(ValueError, match=rf"{key}.*convert-head"):
            load()


def test_captured_layers_are_those_of_vllms_runner_where_the_target_is_known(
    tmp_path: Path,
) -> None:
    target, head = small.pair(torch.float32)
    path = export(head, tmp_path)
    config = json.loads((path / "config.json").read_text())
    key, ids = "eagle_aux_hidden_state_layer_ids", [1, 3, 6]
    config.pop(key, None)

    def layers(num_target_layers: int | None, **changes: object) -> tuple[int, ...]:
        (path / "config.json").write_text(json.dumps(config | changes))
        loaded = load_head(path, target.embedding, num_target_layers=num_target_layers)
        return loaded.config.aux_layer_ids

    assert layers(8, **{key: ids}) == (1, 3, 6)
    assert layers(8, eagle_config={key: ids}) == layers(8, eagle_config={}) == (2, 4, 5)
    assert layers(None, eagle_config={key: ids}) == (1, 3, 6)
    with pytest.raises(ValueError, match="does not name the layers"):
        layers(None, eagle_config={})
