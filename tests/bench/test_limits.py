import json
import struct

import pytest
import torch

from tests.engine import tiny
from tests.heads import checkpoints
from vllm_eagle3.bench.limits import BYTES_PER_SECOND, StepCost, read_cost


def write_checkpoint(path, config, **shapes):
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    header = {
        name: {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}
        for name, shape in shapes.items()
    }
    text = json.dumps({"__metadata__": {}, **header}).encode()
    (path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    return path


CONFIG = {"hidden_size": 8, "num_attention_heads": 4, "num_hidden_layers": 3}
TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def test_a_steps_bytes():
    cost = StepCost(target=1000, head=100, head_once=10, target_kv=6, head_kv=2)
    per_byte = 1000 / BYTES_PER_SECOND
    assert cost.step_ms(4, 50, 0) == pytest.approx(2 * (1000 + 4 * 50 * 6) * per_byte)
    drafting = 1000 + 3 * 100 + 10 + 4 * 50 * (6 + 3 * 2)
    assert cost.step_ms(4, 50, 3) == pytest.approx(2 * drafting * per_byte)


def test_embeddings_are_looked_up_and_tied_ones_also_multiplied(tmp_path):
    shapes = {TABLE: [100, 8], "model.norm.weight": [8]}
    tied = read_cost(write_checkpoint(tmp_path / "tied", CONFIG, **shapes), None)
    untied = write_checkpoint(tmp_path / "untied", CONFIG, **shapes, **{HEAD: [100, 8]})
    assert tied.target == read_cost(untied, None).target == 808
    assert (tied.head, tied.target_kv, tied.head_kv) == (0, 3 * 16, 16)


def test_a_real_pair(tmp_path):
    pair = tiny.write_pair(tmp_path)
    cost = read_cost(pair.target, pair.head)
    tensors = tiny.head_tensors()
    assert cost.head_once == tensors["fc.weight"].numel()
    skipped = ("fc.weight", "d2t", "t2d")
    assert cost.head == sum(t.numel() for name, t in tensors.items() if name not in skipped)
    assert cost.target_kv == tiny.LAYERS * cost.head_kv == tiny.LAYERS * 2 * 64


def test_an_eagle_1_head_reads_its_fc_and_the_targets_output_matrix_in_every_forward(tmp_path):
    H = checkpoints.HIDDEN
    weights = {
        "fc.weight": torch.zeros(H, 2 * H),
        "layers.0.self_attn.q_proj.weight": torch.zeros(H, H),
    }
    head = checkpoints.write(tmp_path / "head", checkpoints.eagle_repository(), weights)
    shapes = {TABLE: [100, 8], "model.norm.weight": [8]}
    tied = write_checkpoint(tmp_path / "tied", CONFIG, **shapes)
    cost = read_cost(tied, head)
    assert (cost.head, cost.head_once) == (3 * H * H + 100 * 8, 0)
    untied = write_checkpoint(tmp_path / "untied", CONFIG, **shapes, **{HEAD: [90, 8]})
    assert read_cost(untied, head).head == 3 * H * H + 90 * 8


def test_what_is_not_a_local_checkpoint_has_no_cost(tmp_path):
    assert read_cost("org/model", None) is None
    assert read_cost(tmp_path, None) is None
