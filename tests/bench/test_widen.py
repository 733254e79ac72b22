"""The files of a wide pair, the command, and what is refused."""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM

from tests.bench.wide import WIDE, Pairs, error, make_pairs, make_small, model_of, states
from vllm_eagle3.bench import widen as command
from vllm_eagle3.bench.widen import widen
from vllm_eagle3.heads.checkpoint import Checkpoint
from vllm_eagle3.heads.conventions import ENTERED, LAYER_IDS
from vllm_eagle3.heads.description import describe
from vllm_eagle3.heads.target import TargetShape


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    return make_pairs(tmp_path_factory.mktemp("widen"))


def test_the_head_captures_the_same_layers_of_a_deeper_target(pairs: Pairs) -> None:
    target = TargetShape.read(pairs.wide.target)
    head = describe(Checkpoint.open(pairs.wide.head), target)
    assert (target.num_layers, target.default_layers) == (10, (2, 5, 7))
    assert (head.layers_entered, head.convention.value) == ((2, 4, 5), ENTERED)
    assert head.problems == ()
    assert head.checkpoint.config[LAYER_IDS] == [2, 4, 5]  # where vLLM's runner looks for them
    small, wide = (load_file(p / "model.safetensors") for p in (pairs.small.head, pairs.wide.head))
    assert wide["d2t"].equal(small["d2t"])
    assert wide["t2d"].equal(small["t2d"])


def test_every_tensor_is_in_a_file_of_the_index(pairs: Pairs) -> None:
    index = json.loads((pairs.wide.target / "model.safetensors.index.json").read_text())
    stored = {
        name: (file.name, weight.nbytes)
        for file in pairs.wide.target.glob("*.safetensors")
        for name, weight in load_file(file).items()
    }
    assert index["weight_map"] == {name: file for name, (file, _) in stored.items()}
    assert index["metadata"]["total_size"] == sum(size for _, size in stored.values())
    assert len(set(index["weight_map"].values())) == 6  # two layers in each, and the rest
    with torch.device("meta"):
        expected = LlamaForCausalLM(AutoConfig.from_pretrained(pairs.wide.target)).state_dict()
    assert stored.keys() == expected.keys() - {"lm_head.weight"}


def test_what_it_is_stands_everywhere(pairs: Pairs) -> None:
    for path in pairs.wide:
        config = json.loads((path / "config.json").read_text())
        sizes = (config[key] for key in ("hidden_size", "head_dim", "num_attention_heads"))
        assert tuple(sizes) == (512, 32, 16)
        assert config["rms_norm_eps"] == 1e-3 * 9 / 64
        assert "not a better model" in config["widened"]["purpose"]
        card = (path / "README.md").read_text()
        assert "not a better model; every number made with it says so" in card
        assert "vocabulary (320 tokens)" in card.replace("\n", " ")
    assert AutoTokenizer.from_pretrained(pairs.wide.target)("abc").input_ids


def test_the_seed_decides_the_free_weights_alone(tmp_path: Path) -> None:
    small = make_small(tmp_path)
    tokens = torch.arange(30)[None]
    made = [
        widen(*small, tmp_path / str(index), WIDE, "bfloat16", seed)[0].path
        for index, seed in enumerate((0, 0, 1))
    ]
    first, same, other = (model_of(path, torch.bfloat16).state_dict() for path in made)
    assert all(weight.equal(same[name]) for name, weight in first.items())
    name = "model.layers.3.mlp.down_proj.weight"
    assert first[name].dtype == torch.bfloat16
    assert not first[name].equal(other[name])
    assert error(states(made[2], tokens).logits, states(made[0], tokens).logits) < 1e-5


def test_the_command_says_what_it_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = make_small(tmp_path)
    monkeypatch.setattr(command, "widen", lambda *a, **k: widen(*a, WIDE, **k))
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    options = [str(small.target), str(tmp_path / "wide"), "--head", str(small.head)]
    command.run(parser.parse_args(options))
    printed = capsys.readouterr().out
    assert "% of them zero" in printed
    assert "not a better model" in printed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 64}, "hidden_size=64 is too small"),
        ({"num_layers": 7}, "num_layers=7 is too small: this source needs 8"),
        ({"num_heads": 12}, "num_heads=12 must be a multiple of twice num_kv_heads=4"),
        ({"num_heads": 8, "num_kv_heads": 4}, "num_heads=8 is too small: this source needs 12"),
        ({"num_kv_heads": 3, "num_heads": 12}, "num_kv_heads=3 is too small: this source needs 4"),
        ({"head_dim": 24}, "head_dim=24 must be a multiple of the source's 16"),
        ({"intermediate_size": 190}, "intermediate_size=190 is too small: this source needs 192"),
        ({"intermediate_size": 255}, "intermediate_size=255 must be even"),
    ],
)
def test_a_shape_that_cannot_hold_the_source_is_refused(
    tmp_path: Path, pairs: Pairs, changes: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        widen(*pairs.small, tmp_path / "wide", replace(WIDE, **changes))
    assert not (tmp_path / "wide").exists()


def test_sources_that_are_no_such_pair_are_refused(tmp_path: Path) -> None:
    small = make_small(tmp_path)

    def refused(config: Path, changes: dict[str, Any], message: str) -> None:
        stored = config.read_text()
        config.write_text(json.dumps(json.loads(stored) | changes))
        with pytest.raises(ValueError, match=message):
            widen(*small, tmp_path / "wide", WIDE)
        config.write_text(stored)

    target, head = small.target / "config.json", small.head / "config.json"
    refused(target, {"architectures": ["Qwen3ForCausalLM"]}, "only LlamaForCausalLM")
    refused(target, {"rope_scaling": {"rope_type": "yarn"}}, "scales its rotary embedding")
    refused(head, {"hidden_size": 64}, "give a head of this target")
    refused(head, {"architectures": ["LlamaForCausalLM"]}, "convert-head")
    refused(head, {LAYER_IDS: [1, 2, 3], "eagle_config": {}}, "convention")
    with pytest.raises(ValueError, match="is not empty"):
        widen(*small, small.target, WIDE)
    save_file(
        {"model.layers.0.self_attn.q_proj.bias": torch.ones(1)}, small.target / "b.safetensors"
    )
    with pytest.raises(ValueError, match="no rule to widen"):
        widen(*small, tmp_path / "wide", WIDE)
