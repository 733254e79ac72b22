"""What `vllm-eagle3 inspect` says of a head, and of the ways to serve it."""

import json
from pathlib import Path

import pytest
import torch

import vllm_eagle3
from tests.heads import checkpoints
from tests.heads.checkpoints import ENTERED, HIDDEN, LEFT
from vllm_eagle3 import cli
from vllm_eagle3.heads.conventions import LAYER_IDS

DEMO = Path(vllm_eagle3.__file__).parent / "demo" / "head"


def inspected(capsys, head: Path, *options: str) -> tuple[int, dict]:
    code = cli.main(["inspect", str(head), "--json", *options])
    return code, json.loads(capsys.readouterr().out)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return checkpoints.write_target(tmp_path / "target")


def test_the_shipped_head(capsys):
    assert cli.main(["inspect", str(DEMO)]) == 0
    text = capsys.readouterr().out
    for line in (
        "kind                EAGLE-3.1\n",
        "draft vocabulary    16384 of 49152 tokens (d2t: offsets, t2d agrees)\n",
        "captured layers     default (no ids stored: every engine captures 2, L//2 and L-3)\n",
        "  yes chain by vLLM",
        "  yes tree by vllm-eagle3",
    ):
        assert line in text


def test_ids_may_count_layers_either_way_without_a_target(tmp_path, capsys):
    source = checkpoints.write(
        tmp_path / "head", checkpoints.flat((2, 15, 27)), checkpoints.tensors()
    )
    assert cli.main(["inspect", str(source)]) == 0
    assert "2, 15, 27, entered or left cannot be told (give --target" in capsys.readouterr().out


def test_a_head_that_fits(tmp_path, target, capsys):
    source = checkpoints.write(tmp_path / "head", checkpoints.flat(), checkpoints.tensors())
    code, found = inspected(capsys, source, "--target", str(target))
    assert (code, found["fits_target"], found["layers_entered"]) == (0, True, [2, 5, 7])
    assert found["dtype"] == "BF16"
    assert found["serving"] == {
        "method": "eagle3",
        "chain": True,
        "tree": True,
        "refusals": [],
        "warnings": [],
        "notes": [],
    }


def test_what_concerns_sglang_alone_is_no_warning(target, capsys, tmp_path):
    config = checkpoints.flat(**{LAYER_IDS: list(ENTERED)})
    source = checkpoints.write(tmp_path / "head", config, checkpoints.tensors())
    _, found = inspected(capsys, source, "--target", str(target))
    assert found["serving"]["warnings"] == []
    [note] = found["serving"]["notes"]
    assert note.startswith("SGLang reads layer ids as layers left")
    assert cli.main(["inspect", str(source), "--target", str(target)]) == 0
    assert f"      note: {note}\n" in capsys.readouterr().out


def test_layers_left_draft_badly_as_they_lie(tmp_path, target, capsys):
    config = checkpoints.flat(eagle_aux_hidden_state_layer_ids=list(LEFT))
    source = checkpoints.write(tmp_path / "head", config, checkpoints.tensors())
    code, found = inspected(capsys, source, "--target", str(target))
    assert code == 0
    assert found["convention"]["value"] == "left"
    assert "one too early" in found["serving"]["warnings"][0]


@pytest.mark.parametrize(("ids", "warned"), [((2, 4, 7), True), (LEFT, False)])
def test_layer_ids_where_vllm_does_not_look(tmp_path, target, capsys, ids, warned):
    """In eagle_config: vLLM captures its default, which may be right."""
    config = checkpoints.flat(ids) | {"eagle_config": {LAYER_IDS: ids, "conventions": "vllm"}}
    if ids == LEFT:
        del config["eagle_config"]["conventions"]
    source = checkpoints.write(tmp_path / "head", config, checkpoints.tensors())
    _, found = inspected(capsys, source, "--target", str(target))
    unread = [text for text in found["serving"]["warnings"] if "captures [2, 5, 7], not" in text]
    assert bool(unread) == warned


def test_a_head_of_another_target(tmp_path, capsys):
    source = checkpoints.write(tmp_path / "head", checkpoints.flat(), checkpoints.tensors())
    other = checkpoints.write_target(tmp_path / "other", vocab_size=65)
    code, found = inspected(capsys, source, "--target", str(other))
    assert (code, found["fits_target"]) == (1, False)
    assert "vocabulary of 64 tokens" in found["serving"]["refusals"][0]


def test_a_target_too_shallow_for_three_states(tmp_path, capsys):
    source = checkpoints.write(tmp_path / "head", checkpoints.flat(), checkpoints.tensors())
    for depth, fits in ((6, False), (7, True)):
        target = checkpoints.write_target(tmp_path / str(depth), num_hidden_layers=depth)
        _, found = inspected(capsys, source, "--target", str(target))
        assert (found["fits_target"], found["serving"]["chain"]) == (fits, fits)


def test_eagle_3_1(tmp_path, capsys):
    norms = {f"fc_norm.{i}.weight": torch.ones(HIDDEN) for i in range(3)}
    config = checkpoints.speculators(fc_norm=True, norm_output=True)
    source = checkpoints.write(tmp_path / "head", config, checkpoints.tensors("layers.0") | norms)
    _, found = inspected(capsys, source)
    assert (found["kind"], found["layout"]) == ("EAGLE-3.1", "speculators")
    assert found["norm_output"]["value"] is True


@pytest.mark.parametrize("name", ["fc_norm", "norm_output", "norm_before_residual"])
def test_switches_where_vllm_does_not_look(tmp_path, target, capsys, name):
    """In eagle_config alone: vLLM would build another head; convert-head moves them up."""
    norms = {f"fc_norm.{i}.weight": torch.ones(HIDDEN) for i in range(3)}
    weights = checkpoints.tensors() | (norms if name == "fc_norm" else {})
    nested = checkpoints.flat(eagle_config={name: True, "conventions": "vllm"})
    source = checkpoints.write(tmp_path / "head", nested, weights)
    code, found = inspected(capsys, source)
    assert (code, found["serving"]["chain"], found["serving"]["tree"]) == (1, False, False)
    [refusal] = found["serving"]["refusals"]
    assert f"{name} stands in eagle_config, where vLLM does not look" in refusal
    convert = ["convert-head", str(source), str(tmp_path / "out"), "--target", str(target)]
    assert cli.main(convert) == 0
    capsys.readouterr()
    code, found = inspected(capsys, tmp_path / "out")
    assert (code, found["serving"]["refusals"]) == (0, [])
    assert checkpoints.read(tmp_path / "out")[0][name] is True


def test_norm_before_fc_is_read_in_both_places(tmp_path, capsys):
    weights = checkpoints.tensors() | {"input_norm.weight": torch.ones(3 * HIDDEN)}
    switch = {"norm_before_fc": True}
    for place, changes in (("top", switch), ("nested", {"eagle_config": switch})):
        source = checkpoints.write(tmp_path / place, checkpoints.flat(**changes), weights)
        code, found = inspected(capsys, source)
        assert (code, found["serving"]["tree"]) == (0, True)


@pytest.mark.parametrize("bias", [False, True])
def test_eagle_1(tmp_path, capsys, bias):
    weights = {
        "fc.weight": torch.zeros(HIDDEN, 2 * HIDDEN),
        "layers.0.self_attn.q_proj.weight": torch.zeros(HIDDEN, HIDDEN),
    }
    if bias:
        weights["fc.bias"] = torch.zeros(HIDDEN)
    source = checkpoints.write(tmp_path / "head", checkpoints.eagle_repository(), weights)
    code, found = inspected(capsys, source)
    assert found["kind"] == "EAGLE-1/EAGLE-2/HASS"
    assert (code, found["serving"]["chain"]) == (int(bias), not bias)
    assert found["serving"]["method"] == "eagle"
    assert found["serving"]["tree"] is not bias


def test_something_else(tmp_path, capsys):
    source = checkpoints.write(
        tmp_path / "head", checkpoints.flat(), {"model.layers.0.mlp.up_proj.weight": torch.ones(2)}
    )
    code, found = inspected(capsys, source)
    assert (code, found["kind"], found["serving"]["chain"]) == (1, "unknown", False)
    assert cli.main(["inspect", str(source)]) == 1
    refusal = "refused: no EAGLE head: fc.weight or the norms do not match\n"
    assert capsys.readouterr().out == refusal


def test_a_head_that_is_not_here(tmp_path, capsys):
    assert cli.main(["inspect", "somebody/head"]) == 2
    assert "`hf download somebody/head --local-dir DIR`" in capsys.readouterr().err
    assert cli.main(["inspect", str(tmp_path / "typo")]) == 2
    assert "hf download" not in capsys.readouterr().err


def test_a_target_that_is_not_here(tmp_path, capsys):
    assert cli.main(["inspect", str(DEMO), "--target", str(tmp_path / "typo")]) == 2
    assert f"--target {tmp_path / 'typo'}: no such folder\n" in capsys.readouterr().err
    assert cli.main(["inspect", str(DEMO), "--target", "somebody/model"]) == 2
    assert "`hf download somebody/model --local-dir DIR`" in capsys.readouterr().err


def test_any_number_of_captured_states_serves_if_vllm_finds_their_layers(tmp_path, capsys):
    config = checkpoints.flat((2, 4, 6, 8))
    weights = checkpoints.tensors(captured=4)
    unread = checkpoints.write(tmp_path / "unread", config, weights)
    code, found = inspected(capsys, unread)
    assert (code, found["serving"]["chain"], found["serving"]["tree"]) == (1, False, False)
    assert "captures three layers, fc takes 4" in found["serving"]["refusals"][0]
    config |= config["eagle_config"]
    code, found = inspected(capsys, checkpoints.write(tmp_path / "read", config, weights))
    assert (code, found["serving"]["chain"], found["serving"]["tree"]) == (0, True, True)


def test_a_base_that_the_trainer_ignored(tmp_path, capsys):
    config = checkpoints.eagle_repository(rope_theta=5e5)
    source = checkpoints.write(tmp_path / "head", config, checkpoints.tensors())
    _, found = inspected(capsys, source)
    assert found["rotary"]["value"] is None
    assert any("10000 whatever the config" in text for text in found["serving"]["warnings"])


def test_a_truncated_file(tmp_path, capsys):
    source = checkpoints.write(tmp_path / "head", checkpoints.flat(), checkpoints.tensors())
    weights = source / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert cli.main(["inspect", str(source)]) == 2
    assert "is truncated" in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_an_incomplete_head(tmp_path, capsys, missing):
    source = checkpoints.write(tmp_path / "head", checkpoints.flat(), checkpoints.tensors())
    (source / missing).unlink()
    assert cli.main(["inspect", str(source)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
